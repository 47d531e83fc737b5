"What several tests share: small drawn data, and a way to run a training as a user does."

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import aligned_mllm.experiments.recipes  # noqa: F401  registers the recipes of the small worlds
from aligned_mllm.core import data_folder
from aligned_mllm.worlds.scene_data import Sizes, write_scenes

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def train_command(recipe: str, data: Path, output: Path, *settings: str, processes: int = 1) -> list[str]:
    """`accelerate launch -m aligned_mllm.train ...`, on CPU. With --cpu alone accelerate starts
    one process, however many are asked for."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu" if processes > 1 else "--cpu",
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "-m",
        "aligned_mllm.train",
    ]
    settings = (*settings, "use_cpu=true")
    return [
        *launch,
        "--recipe",
        recipe,
        "--data",
        str(data),
        "--output",
        str(output),
        *(part for text in settings for part in ("--set", text)),
    ]


def train(*arguments, processes: int = 1, **keywords) -> subprocess.CompletedProcess:
    return subprocess.run(
        train_command(*arguments, processes=processes),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        **keywords,
    )


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
