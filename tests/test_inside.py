"""The page of one or two runs: measured once, on these weights and questions only; the numbers are those
of independent computation; nothing is fetched."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from aligned_mllm.analysis.checkpoints import load_checkpoint
from aligned_mllm.analysis.word_probe import probe_table
from aligned_mllm.cli import main
from aligned_mllm.core import data_folder, save_json
from aligned_mllm.data.images import open_image
from aligned_mllm.data.records import Records
from aligned_mllm.evals.task import is_right
from aligned_mllm.reporting.case import reference_teachers
from aligned_mllm.reporting.model_report import inside
from aligned_mllm.teachers.exact_labels import patch_shares
from aligned_mllm.teachers.words import WordList
from aligned_mllm.worlds.known_objects import KnownObjects
from aligned_mllm.worlds.small_models import embedded_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_data):
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("plain", "viral")]
    for seed, run in enumerate(folders):
        model, processor = embedded_model(data_folder() / "parts", seed=seed)
        model.save_pretrained(run / "model")
        processor.save_pretrained(run / "model")
        save_json({"data": str(small_data), "seed": 0}, run / "config.json")
        objective = {"viral": {"layers": [3], "teacher": "dense", "parts": ""}}
        save_json(objective if seed else {}, run / "objectives.json")
        save_json({"steps": 4, "seconds": 2.0}, run / "done.json")
        pd.DataFrame([(2, "accuracy", 0.5)], columns=["step", "name", "value"]).to_csv(
            run / "curves.csv", index=False
        )
    return [str(run) for run in folders]


def test_the_command_measures_two_runs(runs, tmp_path, small_data, capsys):
    arguments = [
        "inside",
        *runs,
        "--output",
        str(tmp_path / "page"),
        "--questions",
        "20",
        "--pictures",
        "5",
        "--measures",
        "answers,attention",
    ]
    assert main(arguments) == 0 and capsys.readouterr().out.strip() == str(tmp_path / "page" / "inside.html")
    answers = pd.read_csv(tmp_path / "page" / "answers.csv")
    every = answers[answers.category == "all"].set_index("model")
    assert list(every.index) == ["plain", "viral"] and (every.questions == 20).all()
    more = every["more than the first"]
    assert (
        more["viral"] == pytest.approx(every.accuracy["viral"] - every.accuracy["plain"])
        and every.low["viral"] <= every.high["viral"]
        and more.isna()["plain"]
    )

    from aligned_mllm.evals.task import answers_of

    asked = Records(tmp_path / "page" / "questions.jsonl", small_data)
    assert [record.id for record in asked] == [
        record.id for record in Records(small_data / "test.jsonl", small_data)[:20]
    ]
    loaded = load_checkpoint(runs[1])
    answers = answers_of(loaded.model, loaded.processor, asked)
    right = [is_right(answer, asked[index].turns[-1].answer) for index, answer in enumerate(answers.answer)]
    assert every.accuracy["viral"] == pytest.approx(sum(right) / 20)


def test_tables_are_kept_for_these_weights_and_questions_only(runs, tmp_path):
    common = {"measures": ["attention"], "pictures": 5}
    table = tmp_path / "attention.csv"
    inside(runs[:1], tmp_path, questions=10, **common)
    made = pd.read_csv(table)
    made.assign(value=9.0).to_csv(table, index=False)  # as if kept
    inside(runs[:1], tmp_path, questions=10, **common)
    assert (pd.read_csv(table).value == 9).all()
    inside(runs[1:], tmp_path, questions=10, **common)
    assert set(pd.read_csv(table).model) == {"viral"} and (pd.read_csv(table).value < 1).all()
    pd.read_csv(table).assign(value=9.0).to_csv(table, index=False)
    inside(runs[1:], tmp_path, questions=11, **common)
    assert (pd.read_csv(table).value < 1).all()


def test_words_and_texts_can_be_named(runs, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("red\ncircle\ndog\n", encoding="utf-8")
    texts = tmp_path / "texts.txt"
    texts.write_text("red circle left\n\nblue square above\n", encoding="utf-8")
    page = tmp_path / "page"
    names = ["word_probe", "modality_gap", "token_map", "retention"]
    common = ["inside", *runs, "--output", str(page), "--questions", "30", "--pictures", "8"]
    assert main([*common, "--measures", ",".join(names)]) == 0
    probe = pd.read_csv(page / "word_probe.csv")
    before = set(probe.word)
    assert set(probe.words) == {"input", "layer 3"} and set(probe.model) == {"plain", "viral"}
    assert "yes" not in before and "dog" not in before and len(before) > 5
    assert pd.read_csv(page / "retention.csv").times.iloc[1] == pytest.approx(1)  # one language model in both
    more = ["--words", str(words), "--texts", str(texts)]
    assert main([*common, "--measures", ",".join(names), *more]) == 0
    assert set(pd.read_csv(page / "word_probe.csv").word) <= {"red", "circle"}  # a dog has no token here
    assert pd.read_csv(page / "retention.csv").texts.tolist() == [2, 2]
    html = (page / "inside.html").read_text(encoding="utf-8")
    assert "Not measured" not in html and "TACS, caption of another picture" in html
    words.write_text("dog\n", encoding="utf-8")
    assert main([*common, "--measures", "word_probe", *more]) == 0
    assert "Not measured: 0 words" in (page / "inside.html").read_text(encoding="utf-8")
    assert main([*common, "--texts", str(tmp_path / "none.txt")]) == 2
    assert "What to do" in capsys.readouterr().err


def test_right_words_where_objects_are_known(runs, small_data, tmp_path, capsys):
    "Against an independent count; the run's own words are in the list."
    words = Path(runs[1]) / "words.txt"
    words.write_text("left\t3\ncircle\t1\n", encoding="utf-8")
    page = ["--output", str(tmp_path), "--questions", "20", "--pictures", "6", "--measures", "right_words"]
    assert main(["inside", *runs, *page]) == 0
    words.unlink()
    found = pd.read_csv(tmp_path / "right_words.csv").set_index("model")
    assert list(found.index) == ["plain", "viral"] and (found.patches > 10).all()
    known = KnownObjects(small_data)
    listed = WordList(tuple(dict.fromkeys(["left", "circle", *known.words])))
    names = list(dict.fromkeys(each.images[0] for each in Records(small_data / "test.jsonl")[:20]))[:6]
    images = [open_image(name, small_data) for name in names]
    nearest = probe_table(load_checkpoint(runs[0]), images, listed, top=1)
    shares = []
    for (picture, row, column), word in nearest.set_index(["picture", "row", "column"]).word.items():
        covers = [(each, patch_shares(mask, (0, 0, 1, 1), (5, 5))) for each, mask in known[names[picture]]]
        right = {}
        for own, share in covers:
            for each in own:
                right[each] = right.get(each, 0) + share[5 * row + column]
        if labels := {each for each, share in right.items() if share >= 0.25}:
            shares.append((picture, word in labels))
    wanted = pd.DataFrame(shares, columns=["picture", "right"]).groupby("picture").right.mean().mean()
    assert found.right["plain"] == pytest.approx(wanted)


def test_what_cannot_be_measured_is_said(runs, tmp_path):
    page = inside(runs[:1], tmp_path, measures=["cknna", "lens"], questions=10, pictures=2).read_text()
    assert "Not measured: 2 pictures" in page and "Words in the image" in page
    assert not (tmp_path / "cknna.csv").exists()


@pytest.mark.parametrize("words", [["--measures", "cknn"], ["--questions", "0"], ["--data", "nowhere"]])
def test_bad_words(runs, tmp_path, words, capsys):
    assert main(["inside", runs[0], "--output", str(tmp_path), *words]) == 2
    assert "What to do" in capsys.readouterr().err


def test_four_runs_and_one_run_twice(runs, tmp_path, capsys):
    assert (
        main(["inside", *runs, *runs, "--output", str(tmp_path)]) == 2 and "4 runs" in capsys.readouterr().err
    )
    assert (
        main(["inside", runs[0], runs[0], "--output", str(tmp_path)]) == 2
        and "twice" in capsys.readouterr().err
    )


def test_teachers_of_one_name_and_two_folders_are_two(tmp_path):
    "Experiments that vary the parts have a dense teacher for each seed."
    parts = data_folder() / "parts"
    shutil.copytree(parts, tmp_path / "seed1")
    objectives = [
        {"teacher": "dense", "parts": ""},
        {"teacher": "dense", "parts": str(tmp_path / "seed1")},
        {"teacher": "dense", "parts": ""},
        {"teacher": "encoder", "parts": ""},
        {"teacher": ""},
    ]
    assert list(reference_teachers(objectives[:1])) == ["dense"]
    assert list(reference_teachers(objectives)) == ["dense (embedded)", "dense (seed1)"]
