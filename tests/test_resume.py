"A resumed run equals an unbroken one: order of samples, counts, checkpoints, leftovers, and what a run is."

import gc
import json
import os
import random
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import in_two_processes
from torch import nn
from transformers import TrainerCallback

from aligned_mllm.core import InputError, load_json
from aligned_mllm.objectives.base import Objective, Target
from aligned_mllm.training.config import AlignConfig, configured
from aligned_mllm.training.claim import claim_folder
from aligned_mllm.training.run_folder import last_checkpoint, mark_whole, remove_leftovers
from aligned_mllm.training.trainer import TermTrainer

SAMPLES = 21  # the last of six steps has one sample: nothing is left for a second process
STEPS = 15
VALUES = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(0))


class Numbers(torch.utils.data.Dataset):
    "Samples that are one number each, with words of different lengths."

    records = [
        SimpleNamespace(images=(), turns=[SimpleNamespace(question="", answer="a word" * (index * 8 % 21))])
        for index in range(SAMPLES)
    ]
    with_images = False
    max_length = None

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index: int):
        return index


def collated(samples: list[int]) -> dict:
    return {"input_ids": torch.tensor(samples)}


class Distance(Objective):
    "The squared distance of a weight from each sample's number."

    name = "distance"

    def targets(self, batches):
        return [Target(len(batch["input_ids"])) for batch in batches]

    def forward(self, states, target):
        return self.term(states["squares"].sum(), target.count)


class OneWeight(nn.Module):
    "In the place of an AlignedModel: one weight, one term, dropout; `seen` has the samples of a step."

    accepts_loss_kwargs = False

    def __init__(self, dropout: float):
        super().__init__()
        self.objectives = nn.ModuleDict({"distance": Distance()})
        self.weight = nn.Parameter(torch.zeros(()))
        self.dropout = dropout
        self.seen = []

    def forward(self, batch):
        squares = (self.weight - VALUES[batch["input_ids"]]).square()
        distance = self.objectives["distance"]
        if not batch["targets"]:
            return {"terms": [distance.empty()], "logits": squares}
        self.seen += batch["input_ids"].tolist()
        states = {"squares": nn.functional.dropout(squares, self.dropout)}
        return {"terms": [distance(states, batch["targets"]["distance"])], "logits": squares}


class Small(TermTrainer):
    "The real trainer, with the files of a model of one weight."

    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(self.model.weight.data, f"{output_dir}/weight.pt")

    def evaluate(self, *arguments, **keywords):
        self.log({"eval_weight": self.model.weight.item()})
        return {}

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.model.weight.data = torch.load(f"{resume_from_checkpoint}/weight.pt")


class Watch(TrainerCallback):
    "Saves after given steps, whatever the settings, and notes which samples each step saw."

    def __init__(self, model: OneWeight, save_at: list[int]):
        self.model = model
        self.save_at = save_at
        self.steps = []

    def on_step_end(self, args, state, control, **keywords):
        control.should_save |= state.global_step in self.save_at
        self.steps.append(self.model.seen)
        self.model.seen = []


SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.1,
    "logging_steps": 4,
    "save_strategy": "no",
    "eval_on_start": True,
    "use_cpu": True,
    "disable_tqdm": True,
}


def small(folder: Path, save_at: list[int] = [], dropout: float = 0.0, **settings) -> Small:
    model = OneWeight(dropout)
    return Small(
        model,
        AlignConfig(**{"output_dir": str(folder), **SETTINGS, **settings}),
        train_dataset=Numbers(),
        data_collator=collated,
        callbacks=[Watch(model, save_at)],
    )


def trained(folder: Path, start: Path | None = None, **settings) -> dict:
    "The samples of each step on this process, the final weight, and the lines of the curves."
    trainer = small(folder, **settings)
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    steps = next(item.steps for item in trainer.callback_handler.callbacks if isinstance(item, Watch))
    lines = [line for line in trainer.state.log_history if "train_loss" not in line]
    for line in lines:
        line.pop("epoch", None)
    return {"steps": steps, "weight": trainer.model.weight.item(), "lines": lines}


DRAW = random.Random(0)
STOPS = [DRAW.randint(1, 5), 6, DRAW.randint(7, 11), STEPS]  # epochs end at 6 and 12
CELLS = {  # a step has four samples on one process and on two
    "random": [{"dropout": 0.25, "gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 1}],
    "sequential": [{"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 1}],
    "group_by_length": [{"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 1}],
}
CELLS["random"][1] |= CELLS["random"][0]


def cells(folder: Path, processes: int) -> dict:
    "For each sampler: an unbroken run, and runs from the checkpoints that it made on the way."
    gc.freeze()  # accelerate collects garbage before each training
    found = {}
    for strategy, settings in CELLS.items():
        settings = {**settings[processes - 1], "train_sampling_strategy": strategy}
        run = folder / f"{strategy}{processes}"
        found[strategy] = [trained(run, save_at=STOPS, **settings)]
        for stop in STOPS:
            found[strategy].append(trained(run, run / f"checkpoint-{stop}", save_at=STOPS, **settings))
        if processes == 2 and not settings.get("dropout"):  # resumes what one process began
            start = folder / f"{strategy}1" / f"checkpoint-{STOPS[2]}"
            found[strategy].append(trained(run, start, save_at=STOPS, **settings))
    gc.unfreeze()
    return found


def cells_on_two(rank: int, folder: Path) -> None:
    (folder / f"{rank}.json").write_text(json.dumps(cells(folder, 2)))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> tuple[dict, list[dict]]:
    "All cells on one process, and on each of two."
    folder = tmp_path_factory.mktemp("table")
    one = cells(folder, 1)
    in_two_processes(folder / "log.txt", cells_on_two, folder)
    return one, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("strategy", CELLS)
def test_a_resumed_run_is_an_unbroken_one(table, strategy):
    "The same samples at every step, the same weight and curves, bit for bit, in every epoch."
    one, two = table
    for found in (one, *two):
        whole, *again = found[strategy]
        for stop, run in zip(STOPS, again):
            assert run["steps"] == whole["steps"][stop:], (strategy, stop)
            assert run["weight"] == whole["weight"] and run["lines"] == whole["lines"], (strategy, stop)
    epochs = [one[strategy][0]["steps"][begin : begin + 6] for begin in (0, 6)]
    assert (epochs[0] == epochs[1]) == (strategy == "sequential")


@pytest.mark.parametrize("strategy", CELLS)
def test_each_sample_of_an_epoch_counts_once(table, strategy):
    """Over two processes as on one, with the same lines; where nothing is random, one process can be
    resumed on two."""
    one, (first, second) = table
    whole = one[strategy][0]
    steps = [sorted(a + b) for a, b in zip(first[strategy][0]["steps"], second[strategy][0]["steps"])]
    assert steps == [sorted(samples) for samples in whole["steps"]]
    assert sorted(sum(steps[:6], [])) == sorted(sum(steps[6:12], [])) == list(range(SAMPLES))
    assert len(steps[5]) == 1 and second[strategy][0]["steps"][5] == []
    if strategy == "random":  # has dropout
        return
    for run in (first[strategy][0], first[strategy][-1]):
        assert abs(run["weight"] - whole["weight"]) < 1e-6
        for line, other in zip(run["lines"], whole["lines"], strict=True):
            assert {name: round(value, 5) for name, value in line.items()} == {
                name: round(value, 5) for name, value in other.items()
            }


class Killed(BaseException):
    "The process is gone."


@contextmanager
def killed_before(count: int):
    "Kill at a file operation: neither it nor any later one happens. Yields the operations so far."
    done = []

    def counted(operation):
        def wrapped(*arguments, **keywords):
            if len(done) == count:
                raise Killed
            done.append(operation.__name__)
            return operation(*arguments, **keywords)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("mkdir", "replace", "unlink", "rmdir", "fsync"):
            patch.setattr(os, name, counted(getattr(os, name)))
        with suppress(Killed):
            yield done


def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path):
    """At every file operation of a save with save_total_limit=1: the newest mark is on a complete checkpoint,
    the rest goes at the next start, and the run ends as an unbroken one."""
    settings = {"dropout": 0.25, "lr_scheduler_type": "constant"}
    whole = trained(tmp_path / "run", save_at=[2, 4], **settings)
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    trainer = small(tmp_path / "run", **settings, max_steps=4, save_total_limit=1)
    trainer.train(str(tmp_path / "run" / "checkpoint-2"))
    found = []
    left = 2
    while left > 1 or found[-1] == "checkpoint-2":
        run = shutil.copytree(tmp_path / "run", tmp_path / f"killed{len(found)}")
        trainer.args.output_dir = str(run)
        with killed_before(len(found)):
            trainer._save_checkpoint(trainer.model_wrapped, None)
        for mark in run.glob("checkpoint-*/whole.json"):
            assert {path.name for path in mark.parent.iterdir()} >= names, (len(found), mark.parent)
        left = len(list(run.glob("checkpoint-*")))
        found.append(last_checkpoint(run).name)
        if found[-2:-1] != found[-1:]:
            shutil.copytree(run, tmp_path / found[-1])
        remove_leftovers(run)
        assert not list(run.rglob(".*")) and all((path / "whole.json").exists() for path in run.iterdir())
    assert len(found) > 2 * len(names) and sorted(set(found)) == ["checkpoint-2", "checkpoint-4"]
    for name in set(found):
        again = trained(tmp_path / name, tmp_path / name / name, **settings)
        assert again["weight"] == whole["weight"] and again["lines"][-1] == whole["lines"][-1]


def test_a_run_is_resumed_once_its_checkpoint_is_accepted(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint-4"
    trained(tmp_path, save_at=[4])
    trained(tmp_path, checkpoint)
    assert "resumed from checkpoint-4" in capsys.readouterr().out
    (checkpoint / "weight.pt").write_bytes(b"other")
    with pytest.raises(InputError, match="weight.pt is damaged"):
        trained(tmp_path, checkpoint)
    assert "resumed" not in capsys.readouterr().out


def test_checkpoints_are_saved_at_steps_that_are_logged(tmp_path):
    for settings in ({"save_steps": 20}, {"save_steps": 0.5}, {"save_steps": 6, "logging_steps": 3}):
        configured("", "data", tmp_path, {**settings, "use_cpu": True})
    for settings in ({"save_steps": 15}, {"save_steps": 5, "logging_steps": 3}):
        with pytest.raises(InputError, match="a multiple of logging_steps"):
            configured("", "data", tmp_path, {**settings, "use_cpu": True})


def claimed(folder: Path, teacher: str = "a1", model: str = "owner/name", **settings) -> dict:
    "The refusal of a start with these settings, or the environment that is recorded."
    teachers = [SimpleNamespace(checksum=teacher)]
    objectives = {"viral": SimpleNamespace(teachers=lambda: teachers, signature=dict, files=dict)}
    trainer = SimpleNamespace(
        model=SimpleNamespace(objectives=objectives),
        benchmarks=None,
        train_dataset=SimpleNamespace(records=SimpleNamespace(digest="d")),
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
    )
    config = AlignConfig(**{"output_dir": str(folder), "model": model, **SETTINGS, **settings})
    claim_folder(config, "", trainer)
    return load_json(folder / "environment.json")


def test_a_run_is_more_than_its_settings(tmp_path, monkeypatch, capsys):
    "Teachers by content, samples of a step, precision of the launcher; versions and processes are recorded."
    for folder, settings in ((tmp_path / "plain", {}), (tmp_path / "fixed", {"global_batch_size": 4})):
        assert claimed(folder, **settings)["processes"] == 1
        (folder / "checkpoint-3").mkdir()
        mark_whole(folder / "checkpoint-3", {"step": 3})
        assert claimed(folder, **settings)["resumed"] == [{"step": 3}]
    with pytest.raises(InputError, match="teachers.viral was .*a1.* and is .*b2.* now"):
        claimed(tmp_path / "plain", teacher="b2")
    with pytest.raises(InputError, match="gradient_accumulation_steps was 1 and is 2 now"):
        claimed(tmp_path / "plain", gradient_accumulation_steps=2)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        with pytest.raises(InputError, match="mixed_precision was .* and is bf16 now"):
            claimed(tmp_path / "plain")
    monkeypatch.setattr(AlignConfig, "world_size", 2)
    monkeypatch.setattr("aligned_mllm.training.claim.environment", lambda: {"versions": {"torch": "3.0"}})
    with pytest.raises(InputError, match="samples_per_step was 2 and is 4 now.* as many processes as before"):
        claimed(tmp_path / "plain")
    monkeypatch.setattr("aligned_mllm.training.config.accumulation_of", lambda *_: 1)
    record = claimed(tmp_path / "fixed", global_batch_size=4)
    assert record["resumed"][1] == {"step": 3, "versions.torch": "3.0", "processes": 2}
    said = capsys.readouterr().out
    assert "resumed after step 3 in another environment" in said and "processes 1, now 2" in said
