"""A loss, a gradient or weights that are not finite: the step changes nothing, the run stops or leaves it
out, and no such run is ever done."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from browser import free_port
from conftest import FORKS, in_fork, into_file, train_here
from torch import nn
from transformers import TrainerCallback

from aligned_mllm.core import InputError, load_json
from aligned_mllm.experiments import jobs
from aligned_mllm.experiments.jobs import Job, run_jobs
from aligned_mllm.objectives.base import Objective, Target
from aligned_mllm.train import run
from aligned_mllm.training.config import AlignConfig
from aligned_mllm.training.finite import NotFinite, read_not_finite
from aligned_mllm.training.run_folder import last_checkpoint
from aligned_mllm.training.trainer import TermTrainer

FAULTY = 9  # the sample with a fault: on one process and on two, it belongs to the third of six steps
STEPS = 6


class Numbers(torch.utils.data.Dataset):
    "24 samples that are one number each."

    records = [SimpleNamespace(where=f"train.jsonl:{line}", id=f"s{line - 1}") for line in range(1, 25)]

    def __len__(self):
        return 24

    def __getitem__(self, index: int):
        return index


def collated(samples: list[int]) -> dict:
    return {"input_ids": torch.tensor(samples), "index": torch.tensor(samples)}


class Distance(Objective):
    name = "distance"

    def targets(self, batches):
        return [Target(len(batch["index"])) for batch in batches]


class TwoTerms(nn.Module):
    "In the place of an AlignedModel: two weights, two terms, and a fault at one sample."

    accepts_loss_kwargs = False

    def __init__(self, fault: str):
        super().__init__()
        kinds = {"text": Distance(1.0), "viral": Distance(0.5)}
        for label, objective in kinds.items():
            objective.label = label
        self.objectives = nn.ModuleDict(kinds)
        self.first = nn.Parameter(torch.zeros(()))
        self.last = nn.Parameter(torch.ones(()))
        self.fault = fault

    def forward(self, batch):
        if not batch["targets"]:
            return {"terms": [each.empty() for each in self.objectives.values()], "logits": 0 * self.last}
        faulty = batch["index"] == FAULTY
        states = self.last * (self.first - batch["index"] / 24)
        squares = {"text": states.square(), "viral": (states - 1).square()}
        if self.fault in ("nan", "inf"):
            label = {"nan": "viral", "inf": "text"}[self.fault]
            squares[label] = torch.where(faulty, float(self.fault), squares[label])
        total = {label: value.sum() for label, value in squares.items()}
        if (
            self.fault == "gradient" and faulty.any()
        ):  # the root of 0 is 0, and its slope infinite: 0 times that is a NaN
            total["text"] = total["text"] + (0 * self.first * faulty).sum().abs().sqrt()
        terms = [each.term(total[label], len(faulty)) for label, each in self.objectives.items()]
        return {"terms": terms, "logits": states}


class Small(TermTrainer):
    "The real trainer, with the files of a model of two weights."

    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), f"{output_dir}/weights.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.model.load_state_dict(torch.load(f"{resume_from_checkpoint}/weights.pt"))


class Watch(TrainerCallback):
    "The weights and all of the optimiser's numbers after each step."

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **keywords):
        numbers = [value.detach().clone() for value in (model.first, model.last)]
        for group in optimizer.state.values():
            numbers += [torch.as_tensor(value).clone() for _, value in sorted(group.items())]
        self.after.append([number.item() for number in numbers])


def small(folder: Path, fault: str = "nan", **settings) -> Small:
    common = {
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 0.1,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": 1,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    config = AlignConfig(**{"output_dir": str(folder), **common, **settings})
    watch = [Watch()]
    keywords = {"train_dataset": Numbers(), "data_collator": collated, "callbacks": watch}
    return Small(TwoTerms(fault), config, **keywords)


def message(folder: Path, *arguments, **settings) -> str:
    "Of the training, which must stop."
    with pytest.raises(NotFinite) as error:
        small(folder, *arguments, **settings).train()
    return str(error.value)


SAID = {
    "nan": "step 3: the loss viral is nan; samples ",
    "inf": "step 3: the loss text is inf; samples ",
    "gradient": "step 3: the gradient of first is not finite; samples ",
}
WAYS = {
    "plain": {},
    "no clipping": {"max_grad_norm": 0.0},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", SAID)
def test_the_run_stops_at_the_step(tmp_path, fault, way):
    said = message(tmp_path, fault, **WAYS[way])
    assert said.startswith(SAID[fault]) and len(said.splitlines()) == 1
    places = [f"train.jsonl:{line} (id 's{line - 1}')" for line in range(9, 13)]
    alone = way == "accumulated" and fault != "gradient"  # a micro-batch of its own
    assert f"samples {places[1] if alone else ', '.join(places)}. Expected" in said
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert [row[3] for row in read_not_finite(tmp_path / "not_finite.csv")] == ["stopped"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", SAID)
def test_a_step_that_is_left_out_changes_nothing(tmp_path, fault, way, capsys):
    settings = {"not_finite": "skip_step", "save_strategy": "no", **WAYS[way]}
    trainer = small(tmp_path, fault, **settings)
    trainer.train()
    (watch,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, Watch)]
    pairs = list(zip(watch.after, watch.after[1:]))
    assert [one == other for one, other in pairs] == [False, True, False, False, False]
    lines = [line for line in trainer.state.log_history if "loss" in line]
    losses = pd.DataFrame(lines).set_index("step")[["loss", "loss_text", "loss_viral"]]
    assert losses.loc[3].isna().any() and losses.drop(3).notna().all().all()
    assert (losses.loss - losses.loss_text - 0.5 * losses.loss_viral).drop(3).abs().max() < 1e-3
    said = capsys.readouterr().out
    assert "step 3 is left out: " in said and "left out: 1 step, see" in said
    if fault != "nan":
        return
    coarse = small(tmp_path / "coarse", fault, logging_steps=3, **settings)
    coarse.train()
    lines = [line for line in coarse.state.log_history if "loss" in line]
    for name in losses:  # a line is the mean of the steps that were made
        means = [losses[name].loc[1:2].mean(), losses[name].loc[4:6].mean()]
        assert [line[name] for line in lines] == pytest.approx(means, abs=2e-6)


def test_too_many_in_a_row_stop_a_run(tmp_path):
    "Also over a resume: it counts the steps before its checkpoint."
    every = {"fault": "nan", "not_finite": "skip_step", "save_steps": 1, "max_steps": 20}

    class Always(TwoTerms):
        def forward(self, batch):
            return super().forward({**batch, "index": torch.full_like(batch["index"], FAULTY)})

    for limit, start, stop in ((4, None, 4), (6, True, 6)):
        trainer = small(tmp_path, not_finite_in_a_row=limit, **every)
        trainer.model.__class__ = Always
        with pytest.raises(NotFinite, match=f"step {stop}: .*; {stop} such steps in a row"):
            trainer.train(resume_from_checkpoint=start)
        steps = [(row[0], row[3]) for row in read_not_finite(tmp_path / "not_finite.csv")]
        assert steps == [*((step, "left out") for step in range(1, stop)), (stop, "stopped")]


def test_a_stopped_run_continues_without_the_step(tmp_path):
    "The same weights as with the switch from the start; and the list names the step once."
    message(tmp_path / "run")
    resumed = small(tmp_path / "run", not_finite="skip_step")
    resumed.train(resume_from_checkpoint=True)
    whole = small(tmp_path / "whole", not_finite="skip_step")
    whole.train()
    assert all(
        torch.equal(one, other) for one, other in zip(resumed.model.parameters(), whole.model.parameters())
    )
    rows = [read_not_finite(tmp_path / name / "not_finite.csv") for name in ("run", "whole")]
    assert rows[0] == rows[1] and len(rows[0]) == 1


@pytest.mark.parametrize("last", [2, STEPS])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, last):
    "Gradients are finite, and the update is not: before a checkpoint, and after the last step."

    class Breaks(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **keywords):
            if state.global_step + 1 == last:
                model.first.data.fill_(float("inf"))

    settings = {"save_strategy": "no"} if last == STEPS else {}
    trainer = small(tmp_path, "", not_finite="skip_step", **settings)
    trainer.add_callback(Breaks())
    with pytest.raises(
        NotFinite, match=f"after step {last}: the weights first are not finite.*learning_rate"
    ):
        trainer.train()
    assert last == STEPS or last_checkpoint(tmp_path).name == "checkpoint-1"


def one_of_two(rank: int, port: int, folder: Path) -> None:
    into_file(folder / f"{rank}.log")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    found = {}
    half = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    for fault in ("nan", "gradient"):
        found[fault] = message(folder / fault, fault, **half)
    trainer = small(folder / "skipped", not_finite="skip_step", **half)
    trainer.train()
    found["weights"] = [value.item() for value in trainer.model.parameters()]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # DDP's own end may wait for ever once the group is gone


def test_two_processes_decide_alike(tmp_path):
    "The fault is in one of them alone."
    port = free_port()
    pair = [FORKS.Process(target=one_of_two, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
    assert [process.exitcode for process in pair] == [0, 0], (tmp_path / "0.log").read_text()[-2000:]
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    for fault in ("nan", "gradient"):
        assert one[fault].startswith(SAID[fault])
        assert last_checkpoint(tmp_path / fault).name == "checkpoint-2"
    assert "samples train.jsonl:10 (id 's9'). Expected" in one["nan"]
    alone = small(tmp_path / "alone", not_finite="skip_step")
    alone.train()
    assert one["weights"] == pytest.approx([value.item() for value in alone.model.parameters()], abs=1e-5)


TRAP = """
from dataclasses import dataclass

import torch

from aligned_mllm.objectives.base import Objective, Tap, Target, register, setting


@dataclass
class TrapSettings:
    weight: float = setting(0.01, "lambda")
    sample: int = setting(0, "the sample whose term is a NaN")


@register
class Trap(Objective):
    name = "trap"
    Settings = TrapSettings
    taps = (Tap(2),)

    @classmethod
    def build(cls, settings, context):
        found = cls(settings.weight)
        found.sample = settings.sample
        return found

    def targets(self, batches):
        return [
            Target(1, {"factor": torch.tensor(float("nan") if self.sample in batch["index"] else 1.0)})
            for batch in batches
        ]

    def forward(self, states, target):
        return self.term(states[self.taps[0]].square().mean() * target["factor"], target.count)
"""
FEW = {
    "max_steps": 3,
    "logging_steps": 1,
    "save_steps": 1,
    "evaluation_records": "",
    "per_device_train_batch_size": 4,
    "train_sampling_strategy": "sequential",
    "disable_tqdm": True,
    "use_cpu": True,
}


def test_the_command_says_it_in_one_line(small_data, tmp_path):
    "A real model with LoRA: status 2, no result; with the switch, the same folder is finished."
    from aligned_mllm.train import main

    (tmp_path / "trap.py").write_text(TRAP)
    output = tmp_path / "run"
    words = ["--recipe", "scenes_lora_viral", "--data", str(small_data), "--output", str(output)]
    words += ["--import", str(tmp_path / "trap.py")]
    for key, value in {**FEW, "trap.sample": 6}.items():
        words += ["--set", f"{key}={json.dumps(value) if not isinstance(value, str) else value}"]
    with pytest.MonkeyPatch.context() as patch, open(tmp_path / "said", "w+", encoding="utf-8") as said:
        patch.setattr("sys.stderr", said)
        assert main(words) == 2
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.startswith("aligned_mllm")]
    assert (
        len(lines) == 1
        and "step 2: the loss trap is nan; samples " in lines[0]
        and "train.jsonl:7" in lines[0]
    )
    assert not (output / "done.json").exists() and not (output / "model").exists()
    curves = pd.read_csv(output / "curves.csv")
    assert set(curves.step) == {1} and curves.value.notna().all()
    assert main([*words, "--set", "not_finite=skip_step"]) == 0
    assert load_json(output / "done.json")["steps_left_out"] == 1


def test_a_learning_rate_that_is_too_high_is_never_done(small_data, tmp_path):
    with pytest.raises(InputError, match=r"step \d.*not finite|step \d.*is (nan|inf)"):
        run("scenes_plain", small_data, tmp_path / "run", {**FEW, "learning_rate": 1e30, "warmup_steps": 0})
    assert not (tmp_path / "run" / "done.json").exists()


def test_a_run_that_ends_in_steps_that_were_left_out_is_not_done(tmp_path):
    "Its weights may be spoilt, and no later step has shown that they are not."

    class AfterTheThird(TwoTerms):
        def forward(self, batch):
            faulty = trainer.state.global_step >= 3
            return super().forward(
                {**batch, "index": torch.full_like(batch["index"], FAULTY if faulty else 0)}
            )

    trainer = small(tmp_path, not_finite="skip_step", save_strategy="no")
    trainer.model.__class__ = AfterTheThird
    with pytest.raises(
        NotFinite, match=f"after step {STEPS}: the run ends in steps that were left out; 3 such"
    ):
        trainer.train()
    assert read_not_finite(tmp_path / "not_finite.csv")[-1][3] == "stopped"


class Forks:
    "A Runner whose runs are over when they have been started; `heard` has what was printed before each."

    hear = None
    heard = {}

    def __init__(self, threads: int):
        self.statuses = {}

    def start(self, words, log):
        self.heard[log.parent.name] = "".join(Forks.hear())
        self.statuses[len(self.statuses) + 1] = in_fork(train_here, log, words).exitcode
        return len(self.statuses)

    def ended(self):
        return {number: self.statuses[number] for number in list(self.statuses)[-1:]}

    def stop(self):
        pass


def test_an_arm_that_stops_is_told_at_once_and_its_neighbours_are_done(
    small_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(jobs, "Runner", Forks)
    monkeypatch.setattr(Forks, "hear", capsys.readouterr)
    (tmp_path / "trap.py").write_text(TRAP)
    imports = (str(tmp_path / "trap.py"),)
    few = {**FEW, "max_steps": 1}
    broken = Job(tmp_path / "broken", "scenes_plain", small_data, {**few, "trap.sample": 0}, imports=imports)
    after = Job(tmp_path / "after", "scenes_plain", small_data, few, after=broken.output)
    fine = Job(tmp_path / "fine", "scenes_plain", small_data, few)
    with pytest.raises(InputError, match="1 of 3 runs stopped: .*broken at step 1: the loss trap is nan"):
        run_jobs([broken, after, fine], workers=1)
    assert fine.done and not broken.done and not after.output.exists()
    assert "broken at step 1: the loss trap is nan" in Forks.heard["fine"]


def test_a_filter_that_writes_zero_is_refused():
    with pytest.raises(InputError, match="logging_nan_inf_filter"):
        AlignConfig("run", use_cpu=True, logging_nan_inf_filter=True)
    with pytest.raises(InputError, match="not_finite"):
        AlignConfig("run", use_cpu=True, not_finite="ignore")
