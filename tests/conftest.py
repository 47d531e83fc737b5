"What several tests share: small drawn data, and a way to run a training as a user does."

import multiprocessing
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from browser import free_port

import aligned_mllm.experiments.recipes  # noqa: F401  registers the recipes of the small worlds
from aligned_mllm.core import data_folder
from aligned_mllm.train import main
from aligned_mllm.worlds.scene_data import Sizes, write_scenes

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
FORKS = multiprocessing.get_context("forkserver")  # processes that share one import of the libraries
FORKS.set_forkserver_preload(["aligned_mllm.train", "aligned_mllm.cli", "aligned_mllm.experiments.run"])


def train_words(recipe: str, data: Path, output: Path, *settings: str) -> list[str]:
    "The words of the command, after `accelerate launch -m aligned_mllm.train`, on CPU."
    words = ["--recipe", recipe, "--data", str(data), "--output", str(output)]
    return words + [part for text in (*settings, "use_cpu=true") for part in ("--set", text)]


def launch(*arguments, processes: int) -> subprocess.CompletedProcess:
    "`accelerate launch`, as a user types it."
    options = f"--multi_gpu --num_processes {processes} --num_machines 1 --main_process_port 0"
    options += " --mixed_precision no --dynamo_backend no -m aligned_mllm.train"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
    command += train_words(*arguments)
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def into_file(log: Path) -> None:
    "Append to a file what this process prints."
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def train_here(log: Path, words: list[str], **variables: str) -> None:
    "The command in this process, which FORKS has started; what it prints is appended to a file."
    os.environ.update(ENVIRONMENT, **variables)
    into_file(log)
    sys.exit(main(words))


def in_fork(function, *arguments):
    "Run a function in a process of FORKS; the process, which has ended unless it took five minutes."
    process = FORKS.Process(target=function, args=arguments)
    process.start()
    process.join(300)
    return process


def one_of_two(rank: int, log: Path, variables: dict[str, str], function, *arguments) -> None:
    "A function in this process, which FORKS has started as one of two; the two part at the end."
    os.environ.update(ENVIRONMENT, **variables)
    into_file(log)
    torch.set_num_threads(1)
    function(rank, *arguments)
    torch.distributed.destroy_process_group()


def in_two_processes(log: Path, function, *arguments) -> None:
    "Run function(rank, *arguments) in two processes of FORKS at once; what they print is in a file."
    work = [(rank, log, variables, function, *arguments) for rank, variables in enumerate(places(2))]
    pair = [FORKS.Process(target=one_of_two, args=each) for each in work]
    for process in pair:
        process.start()
    for process in pair:
        process.join(300)
    assert [process.exitcode for process in pair] == [0, 0], log.read_text(encoding="utf-8")[-2000:]


def log_of(output: Path) -> Path:
    "Where the processes of a run print."
    return output.parent / f"{output.name}.log"


def places(processes: int) -> list[dict[str, str]]:
    "The variables by which each of some processes finds the others; empty for one alone."
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    ranks = [str(rank) for rank in range(processes)]
    return [{"RANK": rank, "LOCAL_RANK": rank, **together} if processes > 1 else {} for rank in ranks]


def started(*arguments, processes: int = 1) -> list:
    "The command's processes, which have just begun."
    found = []
    for variables in places(processes):
        work = (log_of(arguments[2]), train_words(*arguments))
        process = FORKS.Process(target=train_here, args=work, kwargs=variables)
        process.start()
        found.append(process)
    return found


def train(*arguments, processes: int = 1) -> tuple[list[int], str]:
    "Exit statuses of the command's processes, and what they printed."
    found = started(*arguments, processes=processes)
    for process in found:
        process.join(300)
    return [process.exitcode for process in found], log_of(arguments[2]).read_text()


@pytest.fixture(scope="session")
def parts() -> Path:
    return data_folder() / "parts"


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    "Drawn scenes, few of them."
    return write_scenes(
        tmp_path_factory.mktemp("scenes") / "data", 0, Sizes(train=120, captions=96, validation=20, test=20)
    )


def pytest_terminal_summary(terminalreporter) -> None:
    """Report, even under -q, which processors were not real: without torchvision transformers has no
    video processors, without num2words no SmolVLM processor."""
    missing = [name for name in ("torchvision", "num2words") if find_spec(name) is None]
    if missing:
        terminalreporter.write_line(
            f"{' and '.join(missing)} not installed: processors with a video part were tested with a "
            "SUBSTITUTE for it, on images only",
            yellow=True,
        )
