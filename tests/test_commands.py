"""Every command of the package answers bad input with one line and exit status 2. The commands are found
by looking, so that a new one cannot be forgotten."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT

from aligned_mllm.core import InputError, command

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
    "aligned_mllm.evals.task": ["--run", "FILE/nowhere", "--data", "FILE"],
    "aligned_mllm.training.launch": ["--output", "FILE"],
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
    assert COMMANDS == sorted(BAD)
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
    words = [sys.executable, "-m", "aligned_mllm.cli", "recipes"]
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
    monkeypatch.setenv("RANK", "1")
    assert command(entry)(InputError("this", "that", "act")) == 2 and capsys.readouterr().err == ""
