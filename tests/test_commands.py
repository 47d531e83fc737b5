"""Every command of the package answers bad input with one line and exit status 2. The commands are found
by looking, so that a new one cannot be forgotten."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, free_port

from aligned_mllm import train
from aligned_mllm.core import InputError, command, environment
from aligned_mllm.training.run_folder import mark_whole

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "aligned_mllm").rglob("*.py"))
}
COMMANDS = [name for name, source in MODULES.items() if re.search(r"^def main\(", source, re.M)]
# Arguments of each command that argparse accepts and the command must refuse; FILE is a file, not a folder.
BAD = {
    "aligned_mllm.apps.serve": ["--runs", "FILE"],
    "aligned_mllm.experiments.benchmark": ["--device", "cpu", "--steps", "0"],
    "aligned_mllm.cli": ["experiment", "--seeds", "0"],
    "aligned_mllm.experiments.gpu": ["--parts", "everything", "--output", "FILE"],
    "aligned_mllm.experiments.gpu_equality": ["--tiny", "--output", "FILE"],
    "aligned_mllm.experiments.gpu_kernels": ["--tiny", "--output", "FILE"],
    "aligned_mllm.experiments.gpu_speed": ["--tiny", "--output", "FILE"],
    "aligned_mllm.experiments.gpu_stock": ["--tiny", "--output", "FILE"],
    "aligned_mllm.evals.task": ["--run", "FILE/nowhere", "--data", "FILE"],
    "aligned_mllm.reproduce.row": ["viral_table2_sam", "--data", "FILE", "--output", "FILE"],
    "aligned_mllm.reporting.score": ["FILE", "--benchmarks", "poppe", "--data", "FILE"],
    "aligned_mllm.training.launch": ["--output", "FILE"],
    "aligned_mllm.worlds.small_clip": ["--pictures", "FILE/nowhere", "--output", "FILE"],
    "aligned_mllm.worlds.train_parts": ["--output", "FILE"],
    "aligned_mllm.site.build": ["--root", "FILE/nowhere", "--output", "FILE"],
    "aligned_mllm.train": [
        "--recipe",
        "scenes_viral",
        "--data",
        "FILE",
        "--output",
        "FILE",
        "--set",
        "viral.layers=many",
    ],
}


def arguments_of(name: str, folder: Path) -> list[str]:
    (folder / "file").write_text("not a folder")
    return [word.replace("FILE", str(folder / "file")) for word in BAD[name]]


def test_every_command_has_a_bad_case():
    assert sorted(COMMANDS) == sorted(BAD)
    executed = [name for name, source in MODULES.items() if 'if __name__ == "__main__"' in source]
    assert set(executed) - set(COMMANDS) == {"aligned_mllm.experiments.runner"}  # started by Runner alone


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_input_is_one_line_and_status_2(name, tmp_path, capsys):
    assert importlib.import_module(name).main(arguments_of(name, tmp_path)) == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"aligned_mllm: .+ Expected: .+ What to do: .+\.\n", said.err) and not said.out
    assert re.search(r'if __name__ == "__main__":\n    sys\.exit\(main\(\)\)', MODULES[name])


@pytest.mark.parametrize("name", ["aligned_mllm.training.launch", "aligned_mllm.worlds.train_parts"])
def test_the_shell_sees_it(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments_of(name, tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("aligned_mllm: ")
        and done.stderr.count("\n") == 1
        and not done.stdout
    )


def test_a_closed_pipe_ends_a_command_quietly():
    code = "import sys; from aligned_mllm.core import command; sys.exit(command(print)('a' * 10**6))"
    words = [sys.executable, "-c", code]
    run = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    run.stdout.close()
    assert run.stderr.read() == "" and run.wait() == 141


def test_installed_commands_are_among_them():
    scripts = re.findall(r'"[\w-]+=(aligned_mllm[\w.]*):main"', (ROOT / "setup.py").read_text())
    assert scripts and set(scripts) <= set(COMMANDS)


def test_only_bad_input_is_answered(monkeypatch, capsys):
    def entry(error):
        raise error

    for error in (ValueError("ours"), KeyboardInterrupt(), SystemExit(4)):
        with pytest.raises(type(error)):
            command(entry)(error)
    assert command(entry)(InputError("this", "that", "act")) == 2
    assert capsys.readouterr().err == "aligned_mllm: this. Expected: that. What to do: act.\n"


def test_any_process_may_refuse_and_all_together_do_so_once(monkeypatch, capsys):
    "The launcher's store is asked who was first; without one, everybody speaks."

    @command
    def entry(fault):
        raise InputError(fault, "that", "act")

    port = free_port()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    said = []
    assert entry("nobody listens") == entry("nobody listens") == 2
    said.append(capsys.readouterr().err.count("nobody listens"))
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for rank, fault in ((1, "picture 7"), (0, "picture 3"), (1, "the model"), (0, "the model")):
        monkeypatch.setenv("RANK", str(rank))
        assert entry(fault) == 2
        said.append(capsys.readouterr().err.count(fault))
    del store
    assert said == [2, 1, 1, 1, 0]


def test_an_interrupted_training_is_one_line(monkeypatch, tmp_path, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("aligned_mllm.train.run", stopped)
    said = []
    for kept in ("to start again: no checkpoint is saved yet", "to resume from checkpoint-8"):
        assert train.main(["--data", "data", "--output", str(tmp_path)]) == 130
        said.append(f"aligned_mllm: stopped. Run the same command again {kept}")
        assert capsys.readouterr().err.strip() == said[-1]
        (tmp_path / "checkpoint-8").mkdir(exist_ok=True)
        mark_whole(tmp_path / "checkpoint-8", {"step": 8})


def test_a_copy_inside_another_repository_has_no_commit(monkeypatch, tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True)

    (tmp_path / "copy" / "aligned_mllm").mkdir(parents=True)
    monkeypatch.setattr("aligned_mllm.core.__file__", str(tmp_path / "copy" / "aligned_mllm" / "core.py"))
    found = []
    for folder in (tmp_path, tmp_path / "copy"):
        git("init")
        git("commit", "--allow-empty", "-m", "first")
        found.append(environment()["commit"])
    assert found[0] == "unknown" and re.fullmatch("[0-9a-f]{40}", found[1])
