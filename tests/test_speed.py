"""The settings that make a step fast, and what each of them changes: nothing, rounding, or the order of
the samples."""

import inspect
import json

import pytest
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from aligned_mllm.experiments import benchmark
from aligned_mllm.core import InputError
from aligned_mllm.data import collate
from aligned_mllm.data.collate import Collator
from aligned_mllm.models.trainable import parameters_by_part
from aligned_mllm.objectives.viral import ViralLoss
from aligned_mllm.training.llava_stages import FAST
from aligned_mllm.training.papers.viral import paper_recipe, paper_recipe_names
from aligned_mllm.teachers.targets import Targets
from aligned_mllm.teachers.vision import load_teacher
from aligned_mllm.training.build import cast_trained_weights
from aligned_mllm.training.config import configured
from aligned_mllm.training.checkpoint import load_aligned, save_aligned
from aligned_mllm.training.model import AlignedModel, with_targets
from aligned_mllm.training.run import trainer_of
from aligned_mllm.training.trainer import TermTrainer
from aligned_mllm.training.trainer import LengthOrder

FEW = {
    "max_steps": 2,
    "logging_steps": 1,
    "evaluation_records": "",
    "save_steps": 2,
    "disable_tqdm": True,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
}
MIXED = {"weights": "bfloat16", "trained_weights": "float32", "bf16": True}
CLASSES = (
    "Llava",
    "LlavaNext",
    "LlavaOnevision",
    "Qwen2VL",
    "Qwen2_5_VL",
    "Qwen3VL",
    "InternVL",
    "Idefics3",
    "SmolVLM",
    "PaliGemma",
    "Gemma3",
)


@pytest.fixture(scope="module")
def mixed_data(small_data):
    "Drawn scenes with answers of different lengths; every third record has no picture."
    lines = [json.loads(line) for line in (small_data / "train.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        line.pop("category", None)
        line["conversations"] = line["conversations"][: 2 * (1 + index % 5)]
        if index % 3 == 1:
            line.pop("image", line.pop("images", None))
            line["conversations"][0]["value"] = (
                line["conversations"][0]["value"].replace("<image>", "").strip()
            )
    (small_data / "long.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return small_data


def made(data, folder, recipe="scenes_viral", **settings):
    return trainer_of(configured(recipe, data, folder, {**FEW, "records": "long.jsonl", **settings}))


def step(trainer, model):
    "Loss and gradients of one batch whose supervised positions differ from sample to sample."
    batch = Collator(trainer.processing_class.tokenizer.pad_token_id)(
        [trainer.train_dataset[index] for index in range(6)]
    )
    assert len(set((batch["labels"] != collate.IGNORED).sum(1).tolist())) > 1
    model.zero_grad()
    loss = sum(term.weight * term.mean for term in model(targeted(model, batch))["terms"])
    loss.backward()
    return loss.item(), {
        name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
    }


def targeted(model, batch: dict) -> dict:
    "The batch with the targets of the model's objectives."
    (found,) = with_targets([batch], model.objectives.values())
    return found


def apart(one, other) -> float:
    assert set(one) == set(other)
    return max((one[name] - other[name]).abs().max().item() for name in one)


class Old(nn.Module):
    "A student whose forward takes no `logits_to_keep`."

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def get_decoder(self):
        return self.inner.get_decoder()

    def forward(self, input_ids, attention_mask, pixel_values=None, use_cache=None, **rest):
        return self.inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            use_cache=use_cache,
            **rest,
        )


def test_supervised_logits_are_the_full_ones(mixed_data, tmp_path):
    """Loss and gradients, where positions differ by sample; a class without the argument falls back to
    all logits."""
    trainer = made(mixed_data, tmp_path)
    trainer.model.train()
    student = trainer.model.student
    objectives = list(trainer.model.objectives.values())
    loss, gradients = step(trainer, trainer.model)
    full = AlignedModel(student, objectives, supervised_logits=False)
    old = AlignedModel(Old(student), objectives)
    assert trainer.model.supervised_logits and not full.supervised_logits and not old.supervised_logits
    for model in (full, old):
        other, found = step(trainer, model)
        assert (
            abs(other - loss) < 1e-6
            and apart(
                {name.replace("student.inner.", "student."): value for name, value in found.items()},
                gradients,
            )
            < 1e-6
        )


@pytest.mark.parametrize("name", CLASSES)
def test_every_family_takes_positions(name):
    forward = getattr(transformers, f"{name}ForConditionalGeneration").forward
    assert "logits_to_keep" in inspect.signature(forward).parameters
    assert "slice_logits_to_keep" in inspect.getsource(
        inspect.getmodule(inspect.unwrap(forward))
    )  # which knows masks


def lines_of(trainer):
    torch.manual_seed(0)
    TermTrainer.train(trainer)  # the steps alone, without the finished folder
    return torch.tensor(
        [
            [line["loss"], line["loss_text"], line["grad_norm"]]
            for line in trainer.state.log_history
            if "loss" in line
        ]
    ), {
        name: value.detach().clone()
        for name, value in trainer.model.named_parameters()
        if value.requires_grad
    }


def test_accumulation_and_the_fused_optimizer(mixed_data, tmp_path):
    """Two micro-batches with unlike counts of answers: supervised or full logits, fused or plain AdamW,
    make the same steps; a step of one batch, too."""
    few = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    here, weights = lines_of(made(mixed_data, tmp_path / "a", optim="adamw_torch_fused", **few))
    for number, settings in enumerate(
        (
            {"supervised_logits": False, "optim": "adamw_torch_fused", **few},
            {"optim": "adamw_torch", **few},
            {"optim": "adamw_torch"},
        )
    ):
        there, others = lines_of(made(mixed_data, tmp_path / str(number), **settings))
        assert (here - there).abs().max() < 2e-5 * here.abs().max()
        assert (
            sum((weights[name] - others[name]).abs().gt(1e-4).sum().item() for name in weights) == 0
            or number == 2
        )


@pytest.mark.parametrize("dora", [False, True])
def test_what_trains_keeps_float32(mixed_data, tmp_path, dora):
    "Frozen in bf16, trained in float32: close to a float32 run, and steps that bf16 would round away arrive."
    recipe = {"recipe": "scenes_lora_viral", "lora_dora": dora, "lora_dropout": 0.0}
    rate = {"learning_rate": 2e-6, "lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer = made(mixed_data, tmp_path / "mixed", **recipe, **MIXED, **rate)
    student = trainer.model.student
    assert {value.dtype for value in student.parameters() if value.requires_grad} == {torch.float32}
    assert {value.dtype for value in student.parameters() if not value.requires_grad} == {torch.bfloat16}
    before = {
        name: value.detach().clone()
        for name, value in parameters_by_part(student)["projector"].items()
        if value.requires_grad
    }
    found, _ = lines_of(trainer)
    exact, _ = lines_of(made(mixed_data, tmp_path / "exact", **recipe, **rate))
    assert (found[:, 0] - exact[:, 0]).abs().max() < 0.03 * exact[:, 0].abs().max()
    name, matrix = next((name, value) for name, value in before.items() if value.dim() == 2)
    after = dict(parameters_by_part(student)["projector"])[name].detach()
    assert (after != matrix).float().mean() > 0.9
    rounded = matrix.bfloat16()
    assert ((rounded + (after - matrix).bfloat16()) != rounded).float().mean() < 0.5


def test_a_checkpoint_keeps_float32(mixed_data, tmp_path):
    "Weights that train in float32 come back to the bit, beside frozen ones in bf16."
    trainer = made(mixed_data, tmp_path / "run", recipe="scenes_viral", stage=1, **MIXED)
    kept = {
        name: value.detach().clone()
        for name, value in trainer.model.named_parameters()
        if value.requires_grad
    }
    assert any((value.bfloat16().float() != value).any() for value in kept.values())
    save_aligned(trainer.model, trainer.processing_class, tmp_path / "saved")
    with torch.no_grad():
        for value in trainer.model.parameters():
            value.mul_(0 if value.requires_grad else 1)
    load_aligned(trainer.model, tmp_path / "saved")
    assert all(
        torch.equal(value, kept[name])
        for name, value in trainer.model.named_parameters()
        if value.requires_grad
    )


def test_two_types_without_autocast_are_refused(mixed_data, tmp_path):
    with pytest.raises(InputError, match="bf16=true"):
        made(mixed_data, tmp_path, **{**MIXED, "bf16": False})


def test_lengths_come_from_the_words(mixed_data, tmp_path, monkeypatch):
    """One picture is opened; the estimates order the samples as their tokens do; batches by length carry
    less padding."""
    trainer = made(mixed_data, tmp_path, train_sampling_strategy="group_by_length")
    samples = trainer.train_dataset
    opened = []
    records = samples.records
    monkeypatch.setattr(records, "image", lambda name, kept=records.image: opened.append(name) or kept(name))
    samples.cache.clear()
    guessed = torch.tensor(collate.estimated_lengths(samples), dtype=torch.float)
    assert len(opened) == 1
    real = torch.tensor(
        [len(samples[index]["input_ids"]) for index in range(len(samples))], dtype=torch.float
    )
    assert torch.corrcoef(torch.stack([guessed, real]))[0, 1] > 0.9
    order = trainer._get_train_sampler()
    assert isinstance(order, LengthOrder) and list(order) == list(trainer._get_train_sampler())

    def filled(indices) -> float:
        batches = [real[indices[start : start + 4]] for start in range(0, len(indices) // 4 * 4, 4)]
        return sum((batch.max() * 4 - batch.sum()).item() for batch in batches) / real.sum().item()

    assert filled(list(order)) < 0.6 * filled(list(range(len(samples))))
    assert sorted(order) == list(range(len(samples)))
    TermTrainer.train(trainer)  # the steps alone, without the finished folder


def test_features_stay_where_they_were_made(mixed_data, tmp_path):
    "Between the teacher and the loss nothing asks for a copy on the CPU, or for a number."
    trainer = made(mixed_data, tmp_path)
    seen = []
    batch = Collator(0)([trainer.train_dataset[index] for index in range(4)])

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), keywords=None):
            name = getattr(function, "__name__", "")
            wide = (
                bool(arguments)
                and isinstance(arguments[0], torch.Tensor)
                and arguments[0].shape[-1:] == (teacher.width,)
            )
            if wide and name in ("cpu", "numpy", "tolist", "item"):
                seen.append(name)
            return function(*arguments, **(keywords or {}))

    teacher = load_teacher("dense")
    for room, expected in ((0, set()), (64, {"cpu"})):
        targets = Targets(teacher, cache_mib=room)
        with Watch():
            targets(batch)
        assert set(seen) == (expected if room else set())


def test_only_counted_tokens_are_projected():
    "Value, count and gradients as of projecting all and choosing then."
    torch.manual_seed(0)
    objective = ViralLoss(8, 6, [2], hidden=16).double()
    states = torch.randn(10, 8, dtype=torch.double, requires_grad=True)
    targets = torch.randn(10, 6, dtype=torch.double)
    keep = torch.tensor([True, False] * 5)
    calls = []
    objective.projector.register_forward_hook(lambda _, arguments, output: calls.append(len(output)))
    term = objective.compare({2: states}, targets, keep)
    term.total.backward()
    reference = -(nn.functional.cosine_similarity(objective.projector(states), targets)[keep]).sum()
    assert calls[0] == 5 == term.count and abs(term.total - reference) < 1e-6
    gradient = states.grad.clone()
    states.grad = None
    reference.backward()
    assert (gradient - states.grad).abs().max() < 1e-6 and (gradient[~keep] == 0).all()


def test_recipes_and_benchmark_share_their_settings(monkeypatch):
    for name in paper_recipe_names():
        assert {key: paper_recipe(name)[key] for key in FAST} == FAST
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    _, options, _ = benchmark.parsed_options(["--shapes", "llava7b"])
    assert (options.weights, options.trained, options.compiled, options.supervised) == tuple(
        FAST[name] for name in ("weights", "trained_weights", "compile_layers", "supervised_logits")
    )
    assert options.mixed == FAST["bf16"]


def test_adapters_do_not_widen_their_input():
    layer = nn.Linear(2, 2)
    layer.cast_input_dtype_enabled = True
    cast_trained_weights(layer, torch.float64)
    assert layer.weight.dtype == torch.float64 and layer.cast_input_dtype_enabled is False
