"""What every registered objective must do, by one table: no objective has a line of its own here. Each is
tried with its own `trial` settings, in the first stage in which it may act."""

import dataclasses
import importlib
import os
import pkgutil
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from conftest import in_two_processes
from torch import nn

import aligned_mllm.objectives
from aligned_mllm.core import InputError, checksum, data_folder, load_json, save_json, seed_everything
from aligned_mllm.data.collate import Collator, Samples
from aligned_mllm.data.records import Records
from aligned_mllm.models.trainable import STAGES, train_only
from aligned_mllm.objectives.base import (
    OBJECTIVES,
    Context,
    Objective,
    Tap,
    Target,
    combine,
    objective_class,
    register,
    rows_of_all_processes,
    settings_of,
)
from aligned_mllm.objectives.text import TextLoss
from aligned_mllm.training.checkpoint import exported_objectives, load_aligned, save_aligned
from aligned_mllm.training.config import parsed_setting
from aligned_mllm.training.model import AlignedModel, with_targets
from aligned_mllm.training.run import run
from aligned_mllm.worlds.small_models import embedded_model

for module in pkgutil.iter_modules(aligned_mllm.objectives.__path__):
    importlib.import_module(f"aligned_mllm.objectives.{module.name}")
NAMES = sorted(OBJECTIVES)
COUNT = 12  # samples of a step


@dataclasses.dataclass
class HeadSettings:
    weight: float = 0.5


class Head(Objective):
    """An objective whose weights belong to the exported model: predicts the mean of each visual token
    from the one before."""

    name = "head"
    Settings = HeadSettings
    in_model = True
    stages = (2,)
    taps = (Tap("final", "before_visual"), Tap(0))

    def __init__(self, width, weight):
        super().__init__(weight)
        self.linear = nn.Linear(width, 1)

    @classmethod
    def build(cls, settings, context):
        context.reseed()
        return cls(context.width, settings.weight)

    def targets(self, batches):
        counts = [int(batch["visual_mask"].sum()) for batch in batches]
        return [Target(count) if count else None for count in counts]

    def forward(self, states, target):
        wanted = states[self.taps[1]].detach().mean(-1, keepdim=True)
        return self.term((self.linear(states[self.taps[0]]) - wanted).square().sum(), target.count)


def trial_model(name: str, data: Path, student=None):
    "An AlignedModel with one objective beside the text loss, its samples and its processor."
    kind = objective_class(name)
    loaded, processor = embedded_model(data_folder() / "parts")
    student = student or loaded
    train_only(student, STAGES[kind.stages[-1]])
    records = Records(data / "train.jsonl", data)
    objective = kind.build(settings_of(name, kind.trial), Context(student, processor, records, seed=3))
    objectives = [objective] if name == "text" else [TextLoss(), objective]
    views = objective.view_pixels()
    samples = Samples(records, processor, view_pixels={name: views} if views else {})
    return AlignedModel(student, objectives), samples, processor


@pytest.fixture(scope="module")
def trial(small_data):
    return partial(trial_model, data=small_data)


def batch_of(samples, processor, indices) -> dict:
    return Collator(processor.tokenizer.pad_token_id)([samples[index] for index in indices])


def without_images(batch: dict) -> dict:
    "The same words with nothing in them that an objective on visual tokens could use."
    return {
        **{key: value for key, value in batch.items() if key not in ("pixel_values", "view_pixels")},
        "visual_mask": torch.zeros_like(batch["visual_mask"]),
        "input_ids": batch["input_ids"].masked_fill(batch["visual_mask"], 1),
        "image_names": [],
        "grids": batch["grids"][:0],
        "boxes": batch["boxes"][:0],
        "view_of": batch["view_of"][:0],
    }


def step(model: AlignedModel, batches: list[dict]) -> tuple[dict, dict]:
    "Means of the terms and gradients of one step of several micro-batches."
    model.zero_grad()
    batches = with_targets(batches, model.objectives.values())
    counts = {
        label: sum(b["targets"][label].count for b in batches if label in b["targets"])
        for label in model.objectives
    }
    means = dict.fromkeys(counts, 0.0)
    for batch in batches:
        terms = model(batch)["terms"]
        combine(terms, counts).backward()
        for term in terms:
            means[term.name] += term.total.item() / max(counts[term.name], 1)
    return means, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_a_term_is_finite_and_counted(trial, name):
    model, samples, processor = trial(name)
    (batch,) = with_targets([batch_of(samples, processor, range(COUNT))], model.objectives.values())
    term = model(batch)["terms"][-1]
    assert term.name == name and torch.isfinite(term.total) and term.total.requires_grad
    assert term.count == batch["targets"][name].count > 0
    assert not any(tensor.requires_grad for tensor in batch["targets"][name].tensors.values())


ADDITIVE = [name for name in NAMES if OBJECTIVES[name].additive]


@pytest.mark.parametrize("name", ADDITIVE)
def test_accumulation_is_one_batch(trial, name):
    model, samples, processor = trial(name)
    whole = step(model, [batch_of(samples, processor, range(COUNT))])
    parts = step(model, [batch_of(samples, processor, part) for part in (range(5), range(5, COUNT))])
    assert whole[0].keys() == parts[0].keys() and set(whole[1]) == set(parts[1])
    assert all(abs(whole[0][key] - parts[0][key]) < 1e-5 for key in whole[0])
    assert all((whole[1][key] - parts[1][key]).abs().max() < 1e-5 for key in whole[1])
    assert max(gradient.abs().max() for gradient in whole[1].values()) > 1e-6


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(ADDITIVE)))
def test_accumulation_sums_the_terms_of_its_batches(trial, name):
    "A term that compares samples: each micro-batch has its own, and all are divided by one count."
    model, samples, processor = trial(name)
    parts = [batch_of(samples, processor, part) for part in (range(5), range(5, COUNT))]
    alone = [with_targets([part], model.objectives.values())[0] for part in parts]
    terms = [model(batch)["terms"][-1] for batch in alone]
    mean = sum(term.total.item() for term in terms) / sum(term.count for term in terms)
    assert step(model, parts)[0][name] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_compare_is_a_connected_zero(trial, name):
    model, samples, processor = trial(name)
    objective = model.objectives[name]
    empty = objective.empty()
    trained = [p for p in objective.parameters() if p.requires_grad]
    assert empty.total == 0 and empty.count == 0 and empty.name == name
    if trained:
        empty.total.backward()
        assert all(p.grad is not None and not p.grad.any() for p in trained)
    model.zero_grad(set_to_none=True)
    words = without_images(batch_of(samples, processor, range(3)))
    (batch,) = with_targets([words], model.objectives.values())
    terms = model(batch)["terms"]
    assert [term.name for term in terms] == list(model.objectives)
    combine(terms, {term.name: max(term.count, 1) for term in terms}).backward()
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(trial, name, tmp_path):
    model, _, processor = trial(name)
    save_aligned(model, processor, tmp_path)
    before = checksum(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert checksum(model) != before
    load_aligned(model, tmp_path)
    assert checksum(model) == before


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parts_stay_and_the_loss_falls(trial, name):
    model, samples, processor = trial(name)
    objective = model.objectives[name]
    frozen = [key for key, value in model.named_parameters() if not value.requires_grad]
    before = checksum({key: model.get_parameter(key) for key in frozen})
    teachers = [checksum(teacher.model) for teacher in objective.teachers()]
    inside = {id(p) for p in model.parameters()}
    assert not any(id(p) in inside for teacher in objective.teachers() for p in teacher.model.parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    batch = batch_of(samples, processor, range(COUNT))
    means = []
    for _ in range(8):
        means.append(step(model, [batch])[0][name])
        optimizer.step()
    assert means[-1] < means[0]
    assert checksum({key: model.get_parameter(key) for key in frozen}) == before
    assert [checksum(teacher.model) for teacher in objective.teachers()] == teachers


@pytest.mark.parametrize("name", NAMES)
def test_it_is_built_from_the_seed_alone(trial, name):
    seed_everything(0)
    one, _, _ = trial(name)
    seed_everything(1)
    other, _, _ = trial(name)
    assert checksum(one.objectives) == checksum(other.objectives)


@pytest.mark.parametrize("name", NAMES)
def test_its_settings_are_reachable_and_checked(name):
    kind = objective_class(name)
    for item in dataclasses.fields(kind.Settings):
        assert item.metadata.get("help"), f"{name}.{item.name} has no help"
    assert parsed_setting(f"{name}.weight=0.25") == (f"{name}.weight", 0.25)
    with pytest.raises(InputError, match=f"{name}.weight"):
        parsed_setting(f"{name}.wieght=0.25")
    assert kind.stages and set(kind.stages) <= {1, 2, 3}


def half(rank: int, name: str, data: str, found: str) -> None:
    "One of two processes, with its share of the samples; the first writes what both found."
    os.environ["ACCELERATE_USE_CPU"] = "true"
    PartialState(cpu=True)
    model, samples, processor = trial_model(name, Path(data))
    share = [range(5), range(5, COUNT)][rank]
    (batch,) = with_targets([batch_of(samples, processor, share)], model.objectives.values())
    targets = batch["targets"]
    counts = [float(targets[label].count) if label in targets else 0.0 for label in model.objectives]
    counts = torch.tensor(counts)
    dist.all_reduce(counts)
    terms = model(batch)["terms"]
    combine(terms, dict(zip(model.objectives, counts.tolist()))).backward()
    total = terms[-1].total.detach() / counts[-1]
    dist.all_reduce(total)
    norm = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            dist.all_reduce(gradient)
            norm += gradient.double().square().sum().item()
    if rank == 0:
        save_json({"mean": total.item(), "norm": norm**0.5, "count": counts[-1].item()}, Path(found))


@pytest.mark.parametrize("name", ADDITIVE)
def test_two_processes_are_one(trial, name, small_data, tmp_path):
    model, samples, processor = trial(name)
    means, gradients = step(model, [batch_of(samples, processor, range(COUNT))])
    norm = sum(gradient.double().square().sum().item() for gradient in gradients.values()) ** 0.5
    in_two_processes(tmp_path / "log.txt", half, name, str(small_data), str(tmp_path / "found.json"))
    found = load_json(tmp_path / "found.json")
    assert abs(found["mean"] - means[name]) < 1e-5 and abs(found["norm"] - norm) < 1e-4 * max(norm, 1)


def test_rows_of_one_process_are_its_own():
    rows = torch.randn(3, 2)
    assert rows_of_all_processes(rows)[0] is rows and rows_of_all_processes(rows)[1] == 0


def test_two_terms_on_visual_tokens_have_denominators_of_their_own(trial):
    "Means -1 and +1 over 100 and 10 units add up to 0, in either order."
    from aligned_mllm.objectives.base import Term

    one = Term("one", torch.tensor(-100.0), 100)
    two = Term("two", torch.tensor(10.0), 10)
    assert combine([one, two]) == combine([two, one]) == 0
    with pytest.raises(InputError, match="a name for each term"):
        combine([one, one])


def test_two_objectives_of_one_class(small_data, tmp_path):
    "Two teachers at two layers: each its own settings, weights and curve."
    settings = {
        "model": str(save_embedded(tmp_path)),
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        "viral.teacher": "dense",
        "viral.hidden": 16,
        "viral#second.teacher": "encoder",
        "viral#second.layers": [5],
        "viral#second.hidden": 8,
    }
    folder = run("", small_data, tmp_path / "run", settings)
    from safetensors.torch import load_file

    names = {name.split(".")[0] for name in load_file(folder / "objectives.safetensors")}
    assert names == {"viral", "viral#second"}
    assert set(load_json(folder / "teachers.json")) == names == set(load_json(folder / "objectives.json"))
    curves = (folder / "curves.csv").read_text()
    assert "loss_viral," in curves and "loss_viral#second," in curves


def save_embedded(folder):
    for part in embedded_model(data_folder() / "parts"):
        part.save_pretrained(folder / "start")
    return folder / "start"


def test_weights_that_belong_to_the_model_are_exported_with_it(small_data, tmp_path):
    from aligned_mllm.models.load import load_model

    register(Head)
    try:
        settings = {
            "model": str(save_embedded(tmp_path)),
            "max_steps": 2,
            "logging_steps": 1,
            "save_steps": 2,
        }
        settings |= {"disable_tqdm": True, "use_cpu": True, "head.weight": 0.5}
        folder = run("", small_data, tmp_path / "run", settings)
        student, processor = load_model(folder / "model")
        (head,) = exported_objectives(folder / "model", Context(student, processor))
        fresh = Head.build(HeadSettings(), Context(student, processor, seed=42))
        assert head.label == "head" and not torch.equal(head.linear.weight, fresh.linear.weight)
        with pytest.raises(InputError, match="objective 'head' in stage 1"):
            run("", small_data, tmp_path / "other", {**settings, "stage": 1})
    finally:
        OBJECTIVES.pop("head")


def test_a_weight_of_zero_is_no_objective(small_data, tmp_path):
    from aligned_mllm.training.config import configured

    config = configured(
        "", small_data, tmp_path, {"viral.teacher": "dense", "viral.weight": 0.0, "use_cpu": True}
    )
    assert list(config.active_objectives) == ["text"]


def test_the_student_may_be_copied_without_its_teachers(trial):
    model, _, _ = trial("viral")
    assert not any("teacher" in name for name in deepcopy(model.student).state_dict())
    assert all(name.startswith("projector.") for name in model.objectives["viral"].state_dict())
