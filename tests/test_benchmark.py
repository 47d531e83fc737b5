"The benchmark runs, and its numbers agree with each other."

import json
from dataclasses import replace

import pandas as pd
import pytest

from aligned_mllm.experiments.benchmark import flop_per_token, main
from aligned_mllm.experiments.benchmark_setup import MODES, SHAPES, Options, student_and_teacher


def test_a_short_benchmark_is_consistent(tmp_path, capsys):
    words = "--device cpu --shapes tiny --batch 3 --steps 1 --blocks 3 --pictures 1 --full".split()
    assert main([*words, "--output", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "speed.csv", index_col="mode")
    facts = json.loads((tmp_path / "speed.json").read_text())
    shape = SHAPES["tiny"]
    assert list(table.index) == list(MODES) and shape.tokens == 25 + shape.words
    assert (table["tokens/s"] / table["samples/s"] - shape.tokens).abs().max() < 1e-6
    assert (table["samples/s"] * table["ms/step"] / 1e3 - 3).abs().max() < 1e-6
    flop = flop_per_token(facts["parameters"], full=True)
    assert (table["TFLOP/s"] * 1e12 / table["tokens/s"] / flop - 1).abs().max() < 1e-9
    blocks = pd.DataFrame(facts["blocks"])
    second = blocks.groupby("block")["mode"].apply(list).iloc[1]
    assert second == [*list(MODES)[1:], "plain"], "the order of modes rotates"
    ratios = blocks.pivot(index="block", columns="mode", values="seconds")
    medians = ratios.div(ratios["plain"], axis=0).median()
    assert (medians - table["time/plain"]).abs().max() < 1e-9 and table.loc["plain", "time/plain"] == 1
    assert "time/plain" in capsys.readouterr().out


def test_seas_benchmark_trains_the_projector_alone(tmp_path):
    words = "--device cpu --objective sea --batch 3 --steps 1 --blocks 2 --pictures 1".split()
    assert main([*words, "--output", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "speed.csv", index_col="mode")
    facts = json.loads((tmp_path / "speed.json").read_text())
    assert list(table.index) == ["plain", "memory", "disk"] and facts["options"]["objective"] == "sea"
    flop = flop_per_token(facts["parameters"], full=False)
    assert (table["TFLOP/s"] * 1e12 / table["tokens/s"] / flop - 1).abs().max() < 1e-9
    student = student_and_teacher(SHAPES["tiny"], Options(modes=("plain",), objective="sea"))[0]
    trained = {name.split(".")[1] for name, value in student.named_parameters() if value.requires_grad}
    assert trained == {"multi_modal_projector"}


def test_the_large_shapes_are_llavas():
    shape = SHAPES["llava7b"]
    width = shape.text["hidden_size"]
    inner = shape.text["intermediate_size"]
    depth = shape.text["num_hidden_layers"]
    words = shape.text["vocab_size"]
    parameters = depth * (4 * width**2 + 3 * width * inner + 2 * width) + width + width * words
    assert shape.tokens == 704 and abs(parameters / 6.6e9 - 1) < 0.01


@pytest.mark.parametrize(
    "words, said",
    [
        (["--device", "cpu", "--shapes", "llava7b"], "GPU"),
        (["--steps", "0", "--device", "cpu"], "steps"),
        (["--modes", "disk"], "plain"),
        (["--objective", "sea", "--modes", "plain", "online", "--device", "cpu"], "labels"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, said, capsys):
    assert main(words) == 2 and said in capsys.readouterr().err


def test_adapters_are_not_counted_as_model():
    counts = [student_and_teacher(replace(SHAPES["tiny"], rank=rank), Options())[2] for rank in (0, 4)]
    assert counts[0] == counts[1]
