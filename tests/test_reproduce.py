"""aligned-mllm reproduce: published numbers that name what the library has, missing data named at once,
scores of known answers in the paper's unit, and the whole walk in small."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from aligned_mllm.cli import main as cli
from aligned_mllm.core import InputError, load_json
from aligned_mllm.evals.benchmark import BENCHMARKS, all_benchmarks, verdict_table
from aligned_mllm.evals.benchmark_data import open_questions
from aligned_mllm.evals.tiny_benchmarks import TINY_BENCHMARKS, write_tiny_benchmark
from aligned_mllm.reproduce.pieces import benchmark_piece, record_folders, require_pieces, row_pieces
from aligned_mllm.reproduce.row import TINY_WARNING, claim_row, reproduce, row_estimate, row_stages
from aligned_mllm.reproduce.row_table import asking_folder, judged_column, row_notes, row_table
from aligned_mllm.training.papers.sea import SEA_RECIPES
from aligned_mllm.training.papers.viral import ROWS
from aligned_mllm.training.recipes import book_of, paper_row, recipe, scored_recipes
from aligned_mllm.training.smoke_test import tiny_data

VIRAL = "viral_table1_vicuna7b_clip_viral"
SMALL = "viral_table4_b_residual_post"  # three benchmarks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "All data of a small row, as it is downloaded: stage 1 in a folder of its own, its pictures in images."
    folder = tmp_path_factory.mktemp("data")
    tiny_data(folder)
    (folder / "LLaVA-Pretrain" / "images").mkdir(parents=True)
    (folder / "blip_laion_cc_sbu_558k.json").rename(
        folder / "LLaVA-Pretrain" / "blip_laion_cc_sbu_558k.json"
    )
    (folder / "00000").rename(folder / "LLaVA-Pretrain" / "images" / "00000")
    for name in TINY_BENCHMARKS:
        write_tiny_benchmark(name, folder / "benchmarks" / name)
    return folder


def test_every_published_row_names_what_the_library_has():
    all_benchmarks()
    names = scored_recipes()
    assert len(names) == len(ROWS) + 21
    for name in names:
        row = paper_row(name)
        assert list(row.values) == [column.name for column in row.columns] and row.source.startswith("arXiv")
        assert not row.baseline or set(row.values) <= set(paper_row(row.baseline).values)
        assert recipe(name)["stage"] > 1
        for column in row.columns:
            assert bool(column.benchmark) == bool(column.ways())
            for way in column.ways():
                benchmark = BENCHMARKS[column.benchmark]
                assert way.prompt in ("", *benchmark.prompts) and way.rule in ("", *benchmark.rules)
            assert not column.benchmark or column.benchmark in TINY_BENCHMARKS
    for name in (each for each in names if each.startswith("sea")):
        assert book_of(name).stage1(name).endswith(name.rsplit("_", 1)[1])


def test_gains_that_the_papers_state_follow_from_their_rows():
    """VIRAL's abstract (version 2): up to 17.3 %, 9.4 % on average: MMVP of the SigLIP v2 row, and the mean
    of the five percentages of the first row. SEA: 7.61 % for Gemma, the mean of relative gains."""

    def gains(name, columns=None):
        row = paper_row(name)
        plain = paper_row(row.baseline).values
        return [100 * (row.values[key] / plain[key] - 1) for key in columns or row.values]

    percent = ["CV-Bench2D", "MMVP", "What's Up", "POPE", "MMStar"]
    assert np.mean(gains(VIRAL, percent)) == pytest.approx(9.45, abs=0.01)
    assert gains("viral_table1_vicuna7b_siglip2_viral", ["MMVP"])[0] == pytest.approx(17.3, abs=0.05)
    assert np.mean(gains("sea_table2_gemma2b_clip_sea")) == pytest.approx(7.61, abs=0.01)


@pytest.mark.parametrize(
    "name, words",
    [
        ("viral_table1_vicuna7b_clip_virl", "viral_table1_vicuna7b_clip_viral"),
        ("viral_stage1_qwen7b_clip", "a stage 1.*viral_table1_qwen7b_clip_plain"),
        ("sea_table1_phi3_siglip_plain", "no scores are published.*sea_table1_phi3_siglip_sea"),
        ("scenes_viral", "no scores are published"),
    ],
)
def test_other_recipes_are_refused_with_near_ones(name, words):
    with pytest.raises(InputError, match=words):
        reproduce(name, "data", "output")


def test_unreported_recipes_are_stages_or_rows_without_sea():
    without = set(SEA_RECIPES) - set(scored_recipes())
    assert {name for name in without if "stage1" not in name} == {
        f"sea_table1_{language}_siglip_plain"
        for language in ("gemma2b", "phi3", "vicuna7b", "llama3", "vicuna13b")
    }


def test_data_is_found_as_it_is_downloaded(data):
    assert record_folders(data, "llava_v1_5_mix665k.json") == (data, data)
    first = data / "LLaVA-Pretrain"
    assert record_folders(data, "blip_laion_cc_sbu_558k.json") == (first, first / "images")
    stages = row_stages(VIRAL, data, "out", {"viral.weight": 0.1, "lora_rank": 4, "max_length": 512})
    images = str(first / "images")
    assert (stages[0].data, stages[0].settings) == (first, {"images": images, "max_length": 512})
    assert stages[1].settings["viral.weight"] == 0.1 and stages[1].settings["lora_rank"] == 4
    for name in ("viral_table1_qwen7b_clip_plain", "sea_table5_vicuna7b_dinov2_sea"):
        assert [piece.missing for piece in row_pieces(name, data)] == [""] * len(row_pieces(name, data))


def test_everything_missing_is_named_at_once_and_nothing_is_written(data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    (copy / "llava_v1_5_mix665k.json").unlink()
    shutil.rmtree(copy / "LLaVA-Pretrain" / "images")
    shutil.rmtree(copy / "benchmarks" / "mme")
    (copy / "benchmarks" / "mmvp" / "MMVP Images" / "3.jpg").unlink()
    shutil.rmtree(copy / "benchmarks" / "whatsup_words" / "prompts")
    (copy / "benchmarks" / "pope" / "coco_pope_random.json").unlink()
    with pytest.raises(InputError) as error:
        reproduce(VIRAL, copy, tmp_path / "output")
    said = str(error.value)
    assert said.startswith("6 of 8 pieces") and not (tmp_path / "output").exists()
    named = ("00000/00000", "llava_v1_5_mix665k.json", "MME.tsv", "3.jpg", "AdaptVis", "random accuracy")
    assert all(words in said for words in named)
    assert "huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K" in said and "lmms-lab-encoder/MME" in said


def test_questions_without_published_answers_are_missing(data, tmp_path):
    folder = tmp_path / "benchmarks" / "vizwiz"
    shutil.copytree(data / "benchmarks" / "vizwiz", folder)
    rows = load_json(folder / "val.json")
    (folder / "val.json").write_text(json.dumps([{**row, "answers": []} for row in rows]), encoding="utf-8")
    assert "questions with answers for overall" in benchmark_piece(tmp_path, "vizwiz", ["overall"]).missing
    require_pieces([benchmark_piece(data, "vizwiz", ["overall"])], data)


def test_an_estimate_downloads_and_writes_nothing(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = row_estimate("viral_table1_vicuna13b_clip_viral")
    stages = [section for title, section in found.items() if title.startswith("Stage")]
    assert [(stage["samples"], stage["steps"]) for stage in stages] == [(558128, 2181), (665298, 5198)]
    assert stages[1]["loss"] == "text + viral"
    assert all(line.startswith("MISSING") for line in found["Data in FOLDER"].values())
    assert list(found["Models"])[:2] == ["lmsys/vicuna-13b-v1.5", "openai/clip-vit-large-patch14-336"]
    assert cli(["reproduce", SMALL, "--dry-run", "--data", str(data)]) == 0
    said = capsys.readouterr().out
    assert "12 samples in" in said and "24 questions in" in said and "MISSING" not in said
    assert list(tmp_path.iterdir()) == []


def answered(column, folder, scores, answer) -> None:
    "Write answers as if a model had given them: answer(question) to each, for every prompt."
    for way in column.ways():
        path = scores / asking_folder(way) / "stage2" / column.benchmark / "answers.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        questions = open_questions(column.benchmark, folder, way.prompt)
        lines = [json.dumps({"id": each.id, "answer": answer(each)}) for each in questions]
        path.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("name", [VIRAL, "sea_table5_vicuna7b_dinov2_sea"])
def test_right_answers_have_the_highest_score_in_the_papers_unit(name, data, tmp_path):
    row = paper_row(name)
    folder = data / "benchmarks"
    for column in row.columns:
        if column.benchmark:
            answered(column, folder, tmp_path, lambda each: each.answers[0])
    table = row_table(row, paper_row(row.baseline).values, "stage2", folder, tmp_path, draws=5)
    scored = table[table.questions.notna()]
    best = [600.0 if column == "MME" else 100.0 for column in scored.benchmark]  # MME: three subtasks
    assert list(scored.official) == best and list(scored.own) == best
    assert list(table.paper) == list(row.values.values())
    assert table[table.questions.isna()].benchmark.tolist() == [
        column.name for column in row.columns if not column.benchmark
    ]
    plain = table.set_index("benchmark").baseline
    assert plain["POPE"] == paper_row(row.baseline).values["POPE"]


def test_a_score_is_that_of_score_under_the_same_rule(data, tmp_path):
    "Half-right answers: our number is the benchmark's own of the same verdicts; a limit takes whole units."
    column = next(each for each in paper_row(VIRAL).columns if each.benchmark == "pope")
    folder = data / "benchmarks"
    answered(column, folder, tmp_path, lambda each: "Yes." if len(each.prompt) % 2 else "No, there is not.")
    for way in column.ways():
        questions = open_questions("pope", folder, way.prompt)
        benchmark = BENCHMARKS["pope"]
        answers = ["Yes." if len(each.prompt) % 2 else "No, there is not." for each in questions]
        verdicts = verdict_table(questions, answers, benchmark.rules[way.rule or "official"])
        expected = 100 * np.mean([benchmark.aggregate(verdicts)[name] for name in way.measures])
        found = judged_column(column, way, "stage2", folder, tmp_path, draws=20)
        assert found["value"] == pytest.approx(expected) and found["low"] <= expected <= found["high"]
    few = judged_column(column, column.official, "stage2", folder, tmp_path, limit=6, draws=5)
    assert (few["questions"], few["total"]) == (6, 24)


def test_an_output_of_another_recipe_is_refused(tmp_path):
    claim_row(SMALL, tmp_path / "row", False, {})
    claim_row(SMALL, tmp_path / "row", False, {"max_length": 512})
    for name, tiny in ((VIRAL, False), (SMALL, True)):
        with pytest.raises(InputError, match=f"holds the reproduction of {SMALL}"):
            claim_row(name, tmp_path / "row", tiny, {})
    assert cli(["reproduce", VIRAL, "--tiny", "--output", str(tmp_path / "row")]) == 2
    assert [path.name for path in (tmp_path / "row").iterdir()] == ["reproduce.json"]


def test_the_whole_walk_in_small_and_again(tmp_path, monkeypatch, capsys):
    "Both stages, scores, table and page; a second call trains and asks nothing, and gives the same table."
    output = tmp_path / "row"
    words = ["reproduce", SMALL, "--tiny", "--output", str(output), "--set", "max_steps=2"]
    assert cli(words) == 0
    said = capsys.readouterr().out
    assert said.count(TINY_WARNING) == 2 and said.rstrip().endswith("reproduction.md")
    assert [load_json(output / stage / "done.json")["steps"] for stage in ("stage1", "stage2")] == [2, 2]
    table = pd.read_csv(output / "reproduction.csv")
    assert table.paper.tolist() == [57.51, 26.67, 87.17] and table.baseline.tolist() == [56.82, 28.2, 85.7]
    assert table[["official", "own", "official_low", "own_high"]].notna().all(axis=None)
    page = (output / "reproduction.md").read_text(encoding="utf-8")
    for part in (TINY_WARNING, "arXiv 2509.07979v2, Table 4", "max_steps=2", "| 57.51 | 56.82 |"):
        assert part in page
    before = {path: path.read_bytes() for path in output.rglob("answers.jsonl")}
    assert len(before) == 6
    monkeypatch.setattr("aligned_mllm.training.run.trainer_of", None)  # a call would fail
    monkeypatch.setattr("aligned_mllm.reporting.score.load_checkpoint", None)
    assert cli(words) == 0
    assert "is done" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in output.rglob("answers.jsonl")} == before
    assert pd.read_csv(output / "reproduction.csv").equals(table)


def test_notes_tell_what_differs():
    line = {"benchmark": "POPE", "note": "F1", "questions": 6, "total": 24, "published": 9000}
    line |= {"official_unparsed": 0.5, "own_unparsed": 0.0, "paper": 1.0, "baseline": np.nan}
    said = row_notes(pd.DataFrame([line]))[0]
    assert "only 6 of 24" in said and "9,000 as published" in said and "50.0%" in said
