"The parts of the GPU run: all of them with tiny shapes, limits, failures, and batches that do not fit."

import time

import pandas as pd
import pytest
import torch

from aligned_mllm.experiments import gpu, gpu_equality, gpu_kernels, gpu_speed, gpu_stock
from aligned_mllm.experiments.gpu import GPU_PARTS, Part, main, reason_in, result_tables, run_parts
from aligned_mllm.experiments.gpu_part import first_that_fits, part_device

MODULES = {module.__name__: module for module in (gpu_equality, gpu_kernels, gpu_speed, gpu_stock)}
ENDLESS = "import time\nprint('begun', flush=True)\ntime.sleep(600)"
CHILD = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    "Modules of one line each, as commands of parts."
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "commands"))
    (tmp_path / "commands").mkdir()

    def add(name: str, source: str, seconds: int = 60) -> None:
        (tmp_path / "commands" / f"{name}.py").write_text(source, encoding="utf-8")
        monkeypatch.setitem(GPU_PARTS, name, Part(seconds, (name, "FOLDER"), tiny=("tiny",)))

    return add


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    "What all parts leave with tiny shapes, each by its own command."
    folder = tmp_path_factory.mktemp("gpu")
    for part in (GPU_PARTS[name] for name in GPU_PARTS if name != "desk"):  # its own tests: test_desk
        module, *words = (word.replace("FOLDER", str(folder)) for word in (*part.words, *part.tiny))
        assert MODULES[module].main(words) == 0
    return folder


def test_all_parts_leave_their_tables(tiny_run):
    tables = result_tables(tiny_run)
    assert {*GPU_PARTS, "card", "goals"} - {"desk"} == set(tables)
    assert tables["equality"].within.all() and len(tables["equality"]) == 16
    assert list(tables["speed"].index) == ["plain", "online", "plain_encoders", "online_encoders"]
    assert tables["speed"].loc["plain", "alignment, %"] == 0 and (tables["speed"]["samples/s"] > 0).all()
    assert list(tables["autotune"].index) == ["plain", "plain_encoders", "plain_tuned"]
    goals = tables["goals"]
    ratio = tables["speed"].loc["plain", "samples/s"] / tables["stock"]["samples/s"].iloc[0]
    assert goals.loc["over the stock Trainer", "found"] == pytest.approx(ratio, rel=0.2)
    assert goals.loc["plain, samples/s", "met"] == (tables["speed"].loc["plain", "samples/s"] >= 24)
    assert list(tables["memory"].index) == [1, 4]
    kernels = tables["kernels"].fillna("")
    assert (kernels[kernels.ms == ""].note != "").all() and {"eager", "sdpa"} <= set(
        kernels[kernels.ms != ""].attention
    )


def test_the_command_runs_parts_in_processes(tmp_path, capsys):
    assert main(["--tiny", "--output", str(tmp_path), "--parts", "kernels"]) == 0
    printed = capsys.readouterr().out
    assert "kernels: done" in printed and "eager" in printed
    assert pd.read_csv(tmp_path / "parts.csv").status.tolist() == ["done"]


def test_a_part_over_its_limit_is_ended_and_the_rest_run(tmp_path, commands, capsys):
    keeps = "import pathlib, sys\npathlib.Path(sys.argv[1], 'kept.csv').write_text('a')\n"
    commands("endless", keeps + CHILD + "\n" + ENDLESS, seconds=2)
    commands("broken", "print('so far')\nraise RuntimeError('this card is too small')")
    commands("last", "import sys\nprint(*sys.argv[1:])")
    start = time.perf_counter()
    assert main(["--output", str(tmp_path / "run"), "--parts", "endless,broken,last", "--tiny"]) == 1
    assert time.perf_counter() - start < 30
    found = pd.read_csv(tmp_path / "run" / "parts.csv", index_col="part", keep_default_na=False)
    assert found.status.to_dict() == {"endless": "ended at its limit", "broken": "failed", "last": "done"}
    assert found.loc["broken", "reason"] == "RuntimeError: this card is too small"
    assert "this card is too small" in capsys.readouterr().out
    assert (tmp_path / "run" / "kept.csv").read_text() == "a"
    assert (tmp_path / "run" / "last.log").read_text().split() == [str(tmp_path / "run"), "tiny"]
    child = int((tmp_path / "run" / "endless.log").read_text().split()[0])
    assert ended(child), "a process that the part had started runs on"


def ended(number: int) -> bool:
    "Whether a process is gone, or only waits to be collected."
    for _ in range(50):
        try:
            with open(f"/proc/{number}/stat", encoding="utf-8") as handle:
                if handle.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_time_is_used_up(tmp_path, commands):
    commands("endless", ENDLESS)
    commands("later", "print(1)")
    found = run_parts(["endless", "later"], tmp_path, 2, tiny=False)
    assert found.status.tolist() == ["ended at its limit", "not started"]


def test_reasons():
    assert reason_in("aligned_mllm: no GPU. Expected: one.\n") == "aligned_mllm: no GPU. Expected: one."
    assert reason_in("a\nValueError: b\nhint\n") == "ValueError: b" and reason_in("x\ny\n") == "y"


def test_smaller_batches_are_tried_where_memory_ends(tmp_path, monkeypatch):
    made = []

    def small_card(shape, options, folder, build=gpu_speed.bench_of):
        made.append(shape.batch)
        if shape.batch > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return build(shape, options, folder)

    large = gpu_speed.replace(gpu_speed.run_shape(True), batch=12)
    monkeypatch.setattr(gpu_speed, "run_shape", lambda tiny: large)
    monkeypatch.setattr(gpu_speed, "bench_of", small_card)
    assert gpu_speed.main(["--output", str(tmp_path), "--tiny", "--modes", "plain", "online"]) == 0
    assert made == [12, 10, 8] and gpu.speed_table(tmp_path).loc["plain", "batch"] == 8


def test_a_card_without_room_fails():
    def full(batch: int):
        raise torch.OutOfMemoryError(f"batch {batch}")

    with pytest.raises(torch.OutOfMemoryError, match="batch 4"):
        first_that_fits(full, [8, 4])


def test_other_errors_are_not_taken_for_memory():
    def wrong(batch: int):
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        first_that_fits(wrong, [8, 4])


def test_unequal_losses_fail(tmp_path, monkeypatch, capsys):
    made = gpu_equality.copied_setup

    def wrong(origin, device, bf16=False):
        setup = made(origin, device, bf16)
        with torch.no_grad():
            for value in setup.student.parameters():
                value.mul_(1.01)
        return setup

    monkeypatch.setattr(gpu_equality, "copied_setup", wrong)
    assert gpu_equality.main(["--output", str(tmp_path), "--tiny"]) == 2
    assert "differ too much" in capsys.readouterr().err
    assert not pd.read_csv(tmp_path / "equality.csv").within.all(), "the table stays"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_large_shapes_need_a_gpu(tmp_path, capsys):
    for module in MODULES.values():
        assert module.main(["--output", str(tmp_path)]) == 2 and "GPU" in capsys.readouterr().err
    assert part_device(tiny=True) == "cpu"
