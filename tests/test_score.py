"""aligned-mllm score from questions to page: answers that depend on no batch size, resumed after a kill,
refused where they are of something else, judged by hand-worked numbers."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from html import escape

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import FORKS, into_file
from PIL import Image, ImageDraw
from test_benchmarks import FILES, NAMES, TABLES, folder_of, write_table
from tiny_models import tiny

from aligned_mllm.apps.score_folder import ScoreFolder
from aligned_mllm.cli import main as cli
from aligned_mllm.core import InputError, load_json
from aligned_mllm.data.encode import IGNORED, encode
from aligned_mllm.evals.answer_file import AnswerFile, questions_digest
from aligned_mllm.evals.asking import answer_batches, generated_answers, likeliest_choices, prompt_record
from aligned_mllm.evals.benchmark import BenchmarkQuestion, all_right, benchmark_named, verdict_table
from aligned_mllm.evals.benchmark_data import limited
from aligned_mllm.evals.benchmark_scores import (
    drawn_scores,
    interval_table,
    majority_line,
    mcnemar,
    unit_draws,
    verdict_counts,
)
from aligned_mllm.evals.statistics import wilson
from aligned_mllm.models.load import save_adapter
from aligned_mllm.reporting.score import score

NOUNS = ("red circle", "blue square", "tower", "two red towers and one blue circle")
COUNT = 24
SHORT = {"max_new_tokens": 5, "draws": 40}


def drawn(number: int) -> Image.Image:
    picture = Image.new("RGB", (40, 40), "white")
    shape = (ImageDraw.Draw(picture).ellipse, ImageDraw.Draw(picture).rectangle)[number % 2]
    shape((4 + number, 8, 20 + number, 24), fill=("red", "blue", "green")[number % 3])
    return picture


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Questions in the form of POPE's files, in two categories, with their pictures."
    folder = tmp_path_factory.mktemp("pope")
    (folder / "val2014").mkdir()
    rows = []
    for number in range(COUNT):
        drawn(number % 6).save(folder / "val2014" / f"{number % 6}.png")
        text = f"Is there a {NOUNS[number % 4]} in the image?"
        row = {"question_id": number, "image": f"{number % 6}.png", "text": text}
        rows.append({**row, "label": ("yes", "no")[number // 2 % 2]})
    for part, name in ((rows[::2], "popular"), (rows[1::2], "random")):
        lines = "\n".join(map(json.dumps, part))
        (folder / f"coco_pope_{name}.json").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Two tiny LLaVAs of transformers, with different weights."
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("first", 0), ("second", 1)):
        model, processor = tiny("llava")
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def scored(models, data, tmp_path_factory):
    "Both models, with the blind line."
    output = tmp_path_factory.mktemp("scores") / "scores"
    score([models / "first", models / "second"], ["pope"], data, output, blind=True, **SHORT)
    return output


def test_its_answers_can_be_browsed(scored, models, data):
    folder = ScoreFolder(scored)
    for name in ("first", "second"):
        facts = folder.facts["pope"][name]
        kept = pd.read_csv(scored / name / "pope" / "verdicts.csv", dtype={"id": str}, keep_default_na=False)
        found = folder.verdicts("pope", name, facts["rule"])
        assert found.id.tolist() == kept.id.tolist() and found.answer.tolist() == kept.answer.tolist()
        assert found.verdict.tolist() == pd.to_numeric(kept.verdict).tolist()
        assert facts["data"] == str(data.resolve()) and folder.source(name) == (models / name).resolve()
        assert not folder.changed("pope", name)


def mixed_questions(data) -> list[BenchmarkQuestion]:
    "With no image, one, two, and prompts of different lengths."
    files = sorted((data / "val2014").glob("*.png"))
    texts = ["what is left", "where is the red tower and the blue circle above", "a <image> in the text ?"]
    return [
        BenchmarkQuestion(f"{count}-{number}", tuple(files[number : number + count]), text, ("yes",))
        for count in range(3)
        for number, text in enumerate(texts)
    ]


def texts_of(batches) -> dict[str, str]:
    return {row["id"]: row["answer"] for rows in batches for row in rows}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"])
def test_answers_do_not_depend_on_the_batch(family, data):
    model, processor = tiny(family)
    questions = mixed_questions(data)
    settings = {"max_new_tokens": 6}
    one, eight = (
        texts_of(answer_batches(model, processor, questions, batch_size=n, **settings)) for n in (1, 8)
    )
    assert one == eight and len(one) == len(questions) and len(set(one.values())) > 1


def test_an_answer_is_that_of_transformers_own_call(data):
    model, processor = tiny("llava")
    question = mixed_questions(data)[4]
    content = [{"type": "image"}, {"type": "text", "text": question.prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=question.pictures(), return_tensors="pt")
    new = model.eval().generate(**inputs, do_sample=False, max_new_tokens=6)[
        0, inputs["input_ids"].shape[1] :
    ]
    expected = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert generated_answers(model, processor, [question], 6)[0]["answer"] == expected


def test_a_cut_answer_is_marked(data):
    model, processor = tiny("llava")
    question = mixed_questions(data)[:1]
    row = generated_answers(model, processor, question, 3)[0]
    assert row["cut"]
    first = model.generate(
        **{
            k: v[None]
            for k, v in encode(prompt_record(question[0]), [], processor, False).items()
            if k == "input_ids"
        },
        do_sample=False,
        max_new_tokens=1,
    )[0, -1]
    model.generation_config.eos_token_id = int(first)  # its first token now ends the answer
    assert generated_answers(model, processor, question, 3)[0]["cut"] is False


def test_likelihoods_are_sums_over_the_tokens_of_the_choice(data):
    model, processor = tiny("llava")
    choices = ("yes", "a photo of two red towers", "no")
    question = replace(mixed_questions(data)[3], choices=choices)
    expected = []
    for choice in choices:
        sample = encode(prompt_record(question, choice), question.pictures(), processor)
        labels = sample["labels"].clone()
        labels[labels == processor.tokenizer.eos_token_id] = IGNORED
        kept = {"input_ids": sample["input_ids"][None], "pixel_values": sample["pixel_values"]}
        with torch.inference_mode():
            logits = model.eval()(**kept).logits[0].log_softmax(-1)
        learnt = (labels != IGNORED).nonzero()[:, 0]
        assert processor.tokenizer.decode(labels[learnt]).strip() == choice
        expected.append((float(logits[learnt - 1, labels[learnt]].sum()), len(learnt)))
    sums = [value for value, _ in expected]
    means = [value / count for value, count in expected]
    other = replace(question, id="other", prompt="where", choices=("yes", "no"))
    for per_token, wanted in ((False, sums), (True, means)):
        for batch in ([question], [other, question]):
            row = likeliest_choices(model, processor, batch, per_token)[-1]
            assert np.allclose(row["log_likelihoods"], wanted, atol=1e-4)
            assert row["answer"] == choices[int(np.argmax(wanted))]
    lettered = replace(question, options=("red", "blue", "green"))
    assert likeliest_choices(model, processor, [lettered])[0]["answer"] in "ABC"


def killed_after(lines: int, output, *arguments) -> None:
    "A scoring in a process of its own, killed as soon as so many answers are kept."
    process = FORKS.Process(target=score_there, args=(output, *arguments))
    process.start()
    path = output / "first" / "pope" / "answers.jsonl"
    for _ in range(2400):
        if path.is_file() and path.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def score_there(output, source, data) -> None:
    into_file(output.with_suffix(".log"))
    torch.set_num_threads(1)
    score([source], ["pope"], data, output, batch_size=1, **SHORT)


def test_killed_in_the_middle_it_goes_on(scored, models, data, tmp_path, capsys):
    output = tmp_path / "scores"
    killed_after(5, output, models / "first", data)
    path = output / "first" / "pope" / "answers.jsonl"
    content = path.read_bytes()
    assert 5 <= content.count(b"\n") < COUNT
    path.write_bytes(content[:-7])  # as if torn in the middle of a line
    score([models / "first"], ["pope"], data, output, **SHORT)
    rows = [
        {json.loads(line)["id"]: json.loads(line) for line in open(each, encoding="utf-8")}
        for each in (path, scored / "first" / "pope" / "answers.jsonl")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == COUNT
    kept = content[:-7].splitlines()[:-1]
    assert path.read_bytes().splitlines()[: len(kept)] == kept, "kept answers are not asked again"
    for name in ("verdicts.csv", "categories.csv"):
        there = [pd.read_csv(folder / "first" / "pope" / name) for folder in (output, scored)]
        assert there[0].equals(there[1])


def test_answers_of_something_else_are_refused(scored, models, data, tmp_path):
    kept = load_json(scored / "first" / "pope" / "answers.json")
    path = scored / "first" / "pope" / "answers.jsonl"
    for name in ("model", "prompt", "benchmark", "questions", "max_new_tokens"):
        with pytest.raises(InputError, match=name):
            AnswerFile(path, {**kept, name: "another"})
    shutil.copytree(models / "second", tmp_path / "first")
    with pytest.raises(InputError, match="answers to something else: model"):
        score([tmp_path / "first"], ["pope"], data, scored, **SHORT)
    with pytest.raises(InputError, match="max_new_tokens 5 instead of 6"):
        score([models / "first"], ["pope"], data, scored, max_new_tokens=6, draws=40)
    path = tmp_path / "answers.jsonl"
    answers = AnswerFile(path, {"model": "1"})
    answers.append([{"id": "1", "answer": "yes"}])
    path.write_bytes(b"[1, 2]\n" + path.read_bytes())
    with pytest.raises(InputError, match="answers.jsonl:1"):
        AnswerFile(path, {"model": "1"})


def test_the_digest_is_of_everything_that_can_change_an_answer(data):
    questions = mixed_questions(data)
    changed = [replace(questions[3], prompt="why"), replace(questions[3], choices=("a", "b"))]
    changed.append(replace(questions[3], images=questions[4].images))
    digests = {questions_digest([*questions[:3], each, *questions[4:]]) for each in [questions[3], *changed]}
    assert len(digests) == 4
    corrected = replace(questions[3], answers=("no",))
    assert questions_digest([corrected]) == questions_digest([questions[3]])


def test_another_rule_loads_no_model(scored, models, data, monkeypatch, capsys):
    before = load_json(scored / "first" / "pope" / "scores.json")
    monkeypatch.setattr("aligned_mllm.reporting.score.load_checkpoint", None)  # a call would fail
    score([models / "first", models / "second"], ["pope"], data, scored, rule="strict", blind=True, **SHORT)
    after = load_json(scored / "first" / "pope" / "scores.json")
    assert (before["rule"], after["rule"]) == ("official", "strict")
    verdicts = pd.read_csv(
        scored / "first" / "pope" / "verdicts.csv", keep_default_na=False, na_values={"verdict": [""]}
    )
    strict = benchmark_named("pope").rules["strict"]
    for row in verdicts.itertuples():
        verdict = strict(BenchmarkQuestion(row.id, (), "", (row.expected,)), row.answer)
        assert verdict == row.verdict or (verdict is None and np.isnan(row.verdict))
    unparsed = verdicts.verdict.isna().mean()
    assert unparsed == after["unparsed"] == 1 and before["unparsed"] == 0  # a random model mumbles
    said = capsys.readouterr().out
    assert said.count("could not parse 100.0 % of the answers") == 2
    page = (scored / "scores.html").read_text(encoding="utf-8")
    assert page.count("could not parse 100.0 % of the answers") == 2
    score([models / "first", models / "second"], ["pope"], data, scored, blind=True, **SHORT)
    assert load_json(scored / "first" / "pope" / "scores.json")["scores"] == before["scores"]


def test_two_models_and_their_page(scored, data):
    table = pd.read_csv(scored / "differences.csv")
    verdicts = [pd.read_csv(scored / name / "pope" / "verdicts.csv") for name in ("first", "second")]
    right = [table_.verdict == 1 for table_ in verdicts]
    row = table.iloc[0]
    assert (row.only_first, row.only_second) == ((right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum())
    scores = [
        load_json(scored / name / "pope" / "scores.json")["scores"]["mean F1"] for name in ("first", "second")
    ]
    assert row.difference == pytest.approx(scores[1] - scores[0]) and row.low <= row.difference <= row.high
    page = (scored / "scores.html").read_text(encoding="utf-8")
    assert "http" not in page.split("<main>")[1].replace("http://www.w3.org", "") and "POPE" in page
    blind = pd.read_csv(scored / "first" / "pope" / "scores.csv").blind
    assert blind.notna().any()


def test_a_limit_is_said_and_can_be_raised(models, data, tmp_path, capsys):
    score([models / "first"], ["pope"], data, tmp_path / "scores", limit=6, **SHORT)
    facts = load_json(tmp_path / "scores" / "first" / "pope" / "scores.json")
    assert (facts["questions"], facts["total"], facts["limit"]) == (6, COUNT, 6)
    said = capsys.readouterr().out
    assert f"Only 6 of {COUNT} questions" in said
    assert f"Only 6 of {COUNT} questions" in (tmp_path / "scores" / "scores.html").read_text(encoding="utf-8")
    path = tmp_path / "scores" / "first" / "pope" / "answers.jsonl"
    few = path.read_bytes()
    score([models / "first"], ["pope"], data, tmp_path / "scores", **SHORT)
    assert path.read_bytes().startswith(few) and path.read_bytes().count(b"\n") == COUNT
    assert "Only" not in capsys.readouterr().out
    pairs = [BenchmarkQuestion(str(number), (), "", unit=str(number // 2)) for number in range(20)]
    chosen = [each.id for each in limited(pairs, 6)]
    assert len(chosen) == 6 and all(str(int(each) ^ 1) in chosen for each in chosen)


def test_an_adapter_is_scored(models, data, tmp_path):
    from peft import LoraConfig, get_peft_model

    from aligned_mllm.models.load import load_model

    model, processor = load_model(models / "first")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    save_adapter(wrapped, processor, tmp_path / "adapter", str(models / "first"))
    output = tmp_path / "scores"
    score([tmp_path / "adapter"], ["pope"], data, output, limit=4, way="likelihood", draws=40)
    facts = load_json(output / "adapter" / "pope" / "scores.json")
    assert facts["way"] == "likelihood" and facts["unparsed"] == 0 and facts["questions"] == 4
    assert facts["checksum"] != checksum_of(models / "first")
    answers = [
        json.loads(line) for line in open(output / "adapter" / "pope" / "answers.jsonl", encoding="utf-8")
    ]
    assert {each["answer"] for each in answers} <= {"Yes", "No"} and len(answers[0]["log_likelihoods"]) == 2


def checksum_of(source) -> str:
    from aligned_mllm.core import checksum
    from aligned_mllm.models.load import load_model

    return checksum(load_model(source)[0])


def test_every_benchmark_is_scored(models, tmp_path):
    "From its published form to its score, with the right way of asking; nothing is cut off the table."
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        if name in FILES:
            folder_of(name, tmp_path / "data" / name)
        else:
            file, row, _ = TABLES[name]
            write_table(tmp_path / "data" / name / file, [row])
    output = tmp_path / "scores"
    pair = [models / "first", models / "second"]
    score(pair, NAMES, tmp_path / "data", output, max_new_tokens=2, draws=5)
    page = (output / "scores.html").read_text(encoding="utf-8")
    for name in NAMES:
        facts = load_json(output / "first" / name / "scores.json")
        assert facts["questions"] == facts["total"] > 0 and facts["scores"], name
        assert facts["way"] == ("likelihood" if name == "whatsup" else "generate")
        assert page.count(escape(benchmark_named(name).title)) >= 3
    assert len(pd.read_csv(output / "differences.csv")) == len(NAMES)


def test_bad_input_is_one_line_and_status_2(models, data, tmp_path, capsys):
    def refused(*words: str) -> str:
        assert cli(["score", *words, "--output", str(tmp_path / "scores")]) == 2
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("aligned_mllm: ") and sum("aligned_mllm" in line for line in said) == 1
        return said[-1]

    first = str(models / "first")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).symlink_to(models / "first" / name)
    there = ("--data", str(data))
    assert "perhaps pope" in refused(first, "--benchmarks", "poppe", *there)
    assert "no benchmark" in refused(first, "--benchmarks", ",", *there)
    assert "nowhere" in refused(first, "--benchmarks", "pope", "--data", str(tmp_path / "nowhere"))
    assert "nowhere" in refused(str(tmp_path / "nowhere"), "--benchmarks", "pope", *there)
    assert "processor" in refused(str(tmp_path / "bare"), "--benchmarks", "pope", *there)
    assert "rule of pope" in refused(first, "--benchmarks", "pope", *there, "--rule", "mild")
    assert "twice" in refused(first, first, "--benchmarks", "pope", *there)
    assert not list(tmp_path.glob("scores/*/*/answers.jsonl"))
    (data / "val2014" / "0.png").rename(tmp_path / "0.png")
    try:
        assert "picture missing" in refused(first, "--benchmarks", "pope", *there)
    finally:
        (tmp_path / "0.png").rename(data / "val2014" / "0.png")
    assert cli(["score", "--run", str(tmp_path / "nowhere"), *there]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def made_verdicts() -> pd.DataFrame:
    "Ten pairs: 4 with both right, 3 with one, 2 with none, 1 with one right and one unparsed."
    pairs = [(1, 1)] * 4 + [(1, 0)] * 3 + [(0, 0)] * 2 + [(1, None)]
    questions = [
        BenchmarkQuestion(f"{number}{side}", (), "", ("yes",), category="ab"[number % 2], unit=str(number))
        for number in range(10)
        for side in "lr"
    ]
    verdicts = iter([value for pair in pairs for value in pair])
    return verdict_table(questions, ["x"] * 20, lambda question, answer: next(verdicts))


def pair_accuracy(verdicts) -> dict[str, float]:
    return {"pairs": float(all_right(verdicts).mean()), "rows": float(verdicts.verdict.mean())}


def test_intervals_are_over_units():
    verdicts = made_verdicts()
    table = interval_table(verdicts, pair_accuracy, drawn_scores(verdicts, pair_accuracy, 100)).set_index(
        "measure"
    )
    assert table.value["pairs"] == pytest.approx(4 / 9) and table.interval["pairs"] == "Wilson"
    assert (table.low["pairs"], table.high["pairs"]) == pytest.approx(wilson(4, 9))
    assert table.value["rows"] == pytest.approx(12 / 19) and table.interval["rows"] == "bootstrap"
    rows, units = next(unit_draws(verdicts))
    assert len(rows) == 20 and (np.bincount(units) == 2).all()
    categories = verdicts.category.to_numpy()[rows]
    assert (categories == "a").sum() == 10, "as many units of each category as there are"
    again = [drawn_scores(verdicts, pair_accuracy, draws=20) for _ in range(2)]
    assert (again[0] == again[1]).all() and again[0].std(0).min() > 0

    def only_pairs(table):
        return {"pairs": pair_accuracy(table)["pairs"]}

    quick = drawn_scores(verdicts, only_pairs, draws=20)  # without calling the aggregate
    assert np.allclose(quick[:, 0], again[0][:, 0])


def test_the_bootstrap_agrees_with_the_deviation_of_a_mean():
    verdicts = np.random.default_rng(0).random(400)
    questions = [BenchmarkQuestion(str(number), (), "", ("x",)) for number in range(400)]
    table = verdict_table(questions, ["x"] * 400, lambda question, answer: verdicts[int(question.id)])
    deviation = drawn_scores(table, lambda each: {"mean": each.verdict.mean()}, draws=400).std()
    assert deviation == pytest.approx(verdicts.std() / 20, rel=0.1)


def test_mcnemar_by_hand():
    first = made_verdicts()
    second = first.assign(verdict=1.0)
    found = mcnemar(second, first)
    assert found == {"only_first": 0, "only_second": 5, "units": 9, "p": pytest.approx(2 / 2**5)}
    assert mcnemar(first, first)["p"] == 1
    assert np.isnan(mcnemar(second.assign(verdict=0.5), first)["p"])


def test_counts_and_the_majority_line():
    questions = [
        BenchmarkQuestion(str(n), (), "", answers, category=c)
        for n, (c, answers) in enumerate(
            [
                ("a", ("yes",)),
                ("a", ("no",)),
                ("a", ("no", "No!")),
                ("b", ("yes",)),
                ("b", ("no",)),
                ("c", ()),
            ]
        )
    ]
    assert majority_line(questions) == ["no", "no", "no", "yes", "yes", ""]
    table = verdict_counts(
        verdict_table(questions, ["yes", "?"] * 3, benchmark_named("pope").rules["strict"])
    )
    found = table.set_index("category")
    assert found.unpublished["all together"] == 1 and found.unparsed["all together"] == pytest.approx(2 / 5)
    assert np.isnan(found.unparsed["c"]) and found.unparsed["b"] == pytest.approx(1 / 2)
