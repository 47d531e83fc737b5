"""Benchmarks while a run trains: the numbers of `aligned-mllm score`, a training that they leave as it was,
the same for two processes, and refusals before the first step."""

import json
from dataclasses import replace

import pandas as pd
import pytest
from conftest import train
from PIL import Image

from aligned_mllm.core import InputError, load_json, save_json
from aligned_mllm.reporting.score import score
from aligned_mllm.train import run
from aligned_mllm.training.config import configured
from aligned_mllm.training.evaluation import RunBenchmarks
from aligned_mllm.training.run import trainer_of

FILE = "testdev_balanced_questions.json"
SHORT = {
    "max_steps": 6,
    "eval_steps": 3,
    "save_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "evaluation_records": "",
    "learning_rate": 0.02,
    "lora_dropout": 0.2,  # so that a change of the random state is a change of the losses
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def questions(small_data):
    "The folder of drawn scenes, with questions about them in GQA's form."
    found = {}
    for line in (small_data / "train.jsonl").read_text(encoding="utf-8").splitlines()[:40]:
        record = json.loads(line)
        asked, answer = (turn["value"] for turn in record["conversations"][:2])
        text = asked.replace("<image>", "").strip()
        kinds = {"structural": ("first", "second")[len(found) % 2]}
        row = {"image": record["image"], "question": text, "answer": answer, "types": kinds}
        found[str(len(found))] = row
    save_json(found, small_data / FILE)
    return {"benchmarks": ["gqa"], "benchmark_data": str(small_data), "benchmark_limit": 21}


def curves_of(folder) -> pd.DataFrame:
    return pd.read_csv(folder / "curves.csv").pivot(index="step", columns="name", values="value")


@pytest.fixture(scope="module")
def scored(small_data, questions, tmp_path_factory):
    "A run that is scored at its start, in the middle and at its end."
    output = tmp_path_factory.mktemp("runs") / "scored"
    settings = {**SHORT, **questions, "eval_on_start": True}
    return run("scenes_lora_viral", small_data, output, settings)


def test_the_last_line_is_the_score_of_the_finished_model(scored, small_data, tmp_path):
    curves = curves_of(scored)
    names = [name for name in curves if name.startswith("gqa")]
    assert curves[names].dropna().index.tolist() == [0, 3, 6]
    assert curves.gqa.dropna().nunique() > 1, "answers that change while it trains"
    score([scored], ["gqa"], small_data, tmp_path, limit=21, draws=20)
    found = load_json(tmp_path / "scored" / "gqa" / "scores.json")
    of_score = {f"gqa/{name}".removesuffix("/overall"): value for name, value in found["scores"].items()}
    assert len(of_score) == 3
    assert curves.loc[6, names].to_dict() == pytest.approx({**of_score, "gqa/unparsed": 0}, abs=1e-6)
    kept = load_json(scored / "benchmarks.json")["gqa"]
    assert (kept["questions"], kept["total"], kept["rule"]) == (21, 40, "official")
    assert kept["questions"] == found["questions"]


def test_training_is_as_without_them(scored, small_data, tmp_path):
    "Dropout and the order of samples follow the random state, which greedy answers do not touch."
    plain = run("scenes_lora_viral", small_data, tmp_path / "plain", SHORT)
    names = ["loss", "loss_text", "loss_viral", "grad_norm"]
    pd.testing.assert_frame_equal(curves_of(scored)[names].dropna(), curves_of(plain)[names].dropna())
    checksums = [load_json(folder / "done.json")["checksum"] for folder in (scored, plain)]
    assert checksums[0] == checksums[1]


def test_two_processes_share_the_questions(scored, small_data, questions, tmp_path):
    "An odd number of questions leaves one process with fewer."
    settings = {**SHORT, **questions, "max_steps": 3, "eval_on_start": True}
    words = [f"{name}={json.dumps(value)}".replace('"', "") for name, value in settings.items()]
    words = [word.replace("[gqa]", '["gqa"]') for word in words]
    found = {}
    for processes in (1, 2):
        output = tmp_path / f"processes{processes}"
        status, said = train("scenes_lora_viral", small_data, output, *words, processes=processes)
        assert status == [0] * processes, said[-2000:]
        found[processes] = curves_of(output).loc[0].filter(like="gqa")
    assert len(found[1]) == 4
    pd.testing.assert_series_equal(found[1], found[2])


def test_other_questions_in_the_same_run_are_refused(scored, small_data, questions):
    settings = {**SHORT, **questions, "eval_on_start": True}
    with pytest.raises(InputError, match="benchmark_limit was 21 and is 12 now"):
        run("scenes_lora_viral", small_data, scored, {**settings, "benchmark_limit": 12})
    (scored / "done.json").rename(scored / "kept.json")  # as if it had been stopped
    save_json({"step": 3, "steps": 6}, scored / "progress.json")
    path = small_data / FILE
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(before.replace("where", "find"), encoding="utf-8")
        with pytest.raises(InputError, match="benchmark_questions.gqa was .* and is .* now"):
            run("scenes_lora_viral", small_data, scored, settings)
    finally:
        path.write_text(before, encoding="utf-8")
        (scored / "kept.json").rename(scored / "done.json")
    older = {key: value for key, value in load_json(scored / "config.json").items() if "benchmark" not in key}
    save_json(older, scored / "config.json")
    run("scenes_lora_viral", small_data, scored, settings)  # a folder of the time before these settings


def test_nothing_starts_without_the_questions(small_data, questions, tmp_path):
    output = tmp_path / "run"
    common = ("scenes_lora_viral", small_data, output)
    with pytest.raises(InputError, match="perhaps gqa"):
        run(*common, {**SHORT, **questions, "benchmarks": ["gqe"]})
    with pytest.raises(InputError, match="no file of the benchmark mme"):
        run(*common, {**SHORT, **questions, "benchmarks": ["mme"]})
    with pytest.raises(InputError, match="set benchmark_data, eval_strategy='steps'"):
        run(*common, {**SHORT, **questions, "eval_strategy": "no"})
    assert not (output / "progress.json").exists()


def test_questions_without_an_answer_and_answers_without_a_verdict(tmp_path, small_data, questions):
    row = {"imageId": "a", "question": "Is it red?", "types": {"structural": "verify"}}
    save_json({"1": row}, tmp_path / "gqa" / FILE)
    Image.new("RGB", (8, 8)).save(tmp_path / "gqa" / "a.jpg")
    with pytest.raises(InputError, match="without a published answer"):
        RunBenchmarks(["gqa"], tmp_path / "gqa")
    with pytest.raises(InputError, match="benchmark_limit -1"):
        RunBenchmarks(["gqa"], questions["benchmark_data"], limit=-1)
    settings = {**SHORT, **questions}
    trainer = trainer_of(configured("scenes_lora_viral", small_data, tmp_path / "run", settings))
    benchmark, chosen = trainer.benchmarks.questions["gqa"]
    unsure = replace(benchmark, rules={"unsure": lambda question, answer: None})
    trainer.benchmarks.questions["gqa"] = unsure, chosen
    found = trainer.evaluate()
    assert {name for name in found if "gqa" in name} == {"eval_gqa/unparsed"}
    assert found["eval_gqa/unparsed"] == 1
