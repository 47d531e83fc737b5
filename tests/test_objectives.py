"""The alignment objective against double precision, its masks, views, projectors and schedules; the
residuals in training and generation."""

import math
from copy import deepcopy

import pytest
import torch
from family_checks import photo, sample
from tiny_models import tiny
from torch import nn

from aligned_mllm.core import InputError, checksum, seed_everything
from aligned_mllm.data.collate import Collator, model_inputs
from aligned_mllm.models.compose import compose, word_tokenizer
from aligned_mllm.models.load import load_model
from aligned_mllm.models.trainable import add_lora, parameter_audit, train_only
from aligned_mllm.models.residual import RESIDUALS, add_residual
from aligned_mllm.models.taps import Taps
from aligned_mllm.objectives.alignment import KINDS, SCHEDULES, scheduled_weight
from aligned_mllm.objectives.base import Context
from aligned_mllm.objectives.text import TextLoss
from aligned_mllm.objectives.viral import Viral, ViralLoss
from aligned_mllm.teachers.pixels import shows_picture
from aligned_mllm.training.model import AlignedModel, with_targets

GRIDS = torch.tensor([[3, 4], [5, 5], [2, 3]])  # three views of different sizes
V = int(GRIDS.prod(1).sum())
D = 12
T = 7


def batch(seed: int = 0, layers=(2, 3)):
    "States, targets and a mask that takes a row out of the first view and all of the last."
    seed_everything(seed)
    states = {layer: torch.randn(V, D, requires_grad=True) for layer in layers}
    keep = torch.ones(V, dtype=torch.bool)
    keep[8:12] = False
    keep[-6:] = False
    return states, torch.randn(V, T), keep


def reference(objective: ViralLoss, states, targets, keep=None):
    "The mean term and its gradients in double precision, from elementary operations and token by token."
    keep = torch.ones(V, dtype=torch.bool) if keep is None else keep
    inputs = {layer: value.detach().double().requires_grad_() for layer, value in states.items()}
    weights = {name: value.detach().double().requires_grad_() for name, value in objective.named_parameters()}
    views = []
    begin = 0
    for rows, columns in GRIDS.tolist():
        views.append([index for index in range(begin, begin + rows * columns) if keep[index]])
        begin += rows * columns

    def projected(layer, x):
        if objective.kind == "relation":
            return x
        path = "projector." + (f"{layer}." if f"projector.{layer}.0.weight" in weights else "")
        for number in (0, 2, 4):
            x = weights[f"{path}{number}.weight"] @ x + weights[f"{path}{number}.bias"]
            x = x * (1 / (1 + torch.exp(-x))) if number < 4 else x
        return x

    def cosine(a, b):
        return (a * b).sum() / ((a * a).sum() ** 0.5 * (b * b).sum() ** 0.5)

    total = 0
    y = targets.double()
    for layer in objective.layers:
        p = [projected(layer, inputs[layer][index]) for index in range(V)]
        for view in views:
            for i in view:
                if objective.kind == "cosine":
                    total = total - cosine(p[i], y[i])
                else:
                    total = total + sum((cosine(p[i], p[j]) - cosine(y[i], y[j])) ** 2 for j in view) / len(
                        view
                    )
    mean = total / len(objective.layers) / int(keep.sum())
    mean.backward()
    return (
        mean.item(),
        {layer: value.grad for layer, value in inputs.items()},
        {name: value.grad for name, value in weights.items()},
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projectors, masked", [("shared", False), ("shared", True), ("each", True)])
def test_every_variant_agrees_with_double_precision(kind, projectors, masked):
    states, targets, keep = batch()
    objective = ViralLoss(D, T, [2, 3], hidden=9, kind=kind, projectors=projectors)
    term = objective.compare(states, targets, keep if masked else None, GRIDS)
    term.mean.backward()
    mean, by_layer, by_weight = reference(objective, states, targets, keep if masked else None)
    assert term.count == (int(keep.sum()) if masked else V) and abs(term.mean.item() - mean) < 1e-6
    for layer, gradient in by_layer.items():
        assert (states[layer].grad - gradient).abs().max() < 1e-6 and gradient.abs().max() > 1e-4
        assert not masked or not states[layer].grad[~keep].any()
    for name, parameter in objective.named_parameters():
        assert (parameter.grad - by_weight[name]).abs().max() < 1e-6, name


def test_the_default_is_bit_for_bit_what_it_was():
    "Names, initial weights, loss and gradients of the class as checkpoints know it."
    states, targets, _ = batch(1)
    seed_everything(5)
    now = ViralLoss(D, T, [2, 3], 0.5, 9)
    seed_everything(5)
    was = nn.ModuleDict(
        {"projector": nn.Sequential(nn.Linear(D, 9), nn.SiLU(), nn.Linear(9, 9), nn.SiLU(), nn.Linear(9, T))}
    )
    assert checksum(now) == checksum(was) and list(now.state_dict()) == list(was.state_dict())
    total = targets.new_zeros(())
    for layer in (2, 3):
        total = (
            total
            - nn.functional.cosine_similarity(
                was["projector"](states[layer]).float(), targets.float(), dim=-1
            ).sum()
        )
    term = now.compare(states, targets)
    assert torch.equal(term.total, total / 2) and (term.name, term.count, term.weight) == ("viral", V, 0.5)
    (total / 2).backward()
    term.total.backward()
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(now.parameters(), was.parameters()))


def test_equal_views_average_their_matrices():
    seed_everything(0)
    h = torch.randn(18, D)
    y = torch.randn(18, T)
    grids = torch.tensor([[3, 3], [3, 3]])
    found = ViralLoss(D, T, [1], kind="relation").compare({1: h}, y, grids=grids).mean
    matrices = [
        [nn.functional.cosine_similarity(x[None], x[:, None], dim=-1) for x in value.split(9)]
        for value in (h, y)
    ]
    expected = sum(nn.functional.mse_loss(a, b) for a, b in zip(*matrices)) / 2
    assert abs(found - expected) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_has_no_influence(kind):
    states, targets, keep = batch()
    objective = ViralLoss(D, T, [2, 3], hidden=9, kind=kind)
    first = objective.compare(states, targets, keep, GRIDS).total
    with torch.no_grad():
        for value in (targets, *states.values()):
            value[~keep] = 1e4 * torch.randn_like(value[~keep])
    assert torch.equal(objective.compare(states, targets, keep, GRIDS).total, first)
    nothing = objective.compare(states, targets, torch.zeros(V, dtype=torch.bool), GRIDS)
    assert nothing.count == 0 and nothing.total == 0 and nothing.mean == 0


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_add_up(kind):
    states, targets, keep = batch()
    objective = ViralLoss(D, T, [2, 3], hidden=9, kind=kind)
    whole = objective.compare(states, targets, keep, GRIDS)
    edges = [0, 12, 37, V]
    terms = []
    for view in range(3):
        part = slice(edges[view], edges[view + 1])
        terms.append(
            objective.compare(
                {layer: value[part] for layer, value in states.items()},
                targets[part],
                keep[part],
                GRIDS[view : view + 1],
            )
        )
    assert sum(term.count for term in terms) == whole.count
    assert torch.allclose(sum(term.total for term in terms), whole.total, atol=1e-5)


PADDED = [(300, 100), (60, 200)]  # width and height in pixels: both are padded to squares


def padded_batch(processor) -> dict:
    "One sample with two pictures, one with one, as collated, with the teacher's pixels."
    samples = [
        {**sample(processor, [photo(seed, size) for seed, size in enumerate(sizes)]), "view_pixels": {}}
        for sizes in (PADDED, PADDED[:1])
    ]
    batch = Collator(processor.tokenizer.pad_token_id)(samples)
    batch["view_pixels"] = {"viral": [torch.zeros(3, 40, 40)] * len(batch["grids"])}
    return batch


def test_padding_and_several_images_count_as_chosen():
    """By default padding is left out and every image counts; the released code's ways are two settings."""
    model, processor = tiny("llava_padded")
    batch = padded_batch(processor)
    sizes = batch["grids"].prod(1).tolist()
    places = zip(batch["boxes"].tolist(), batch["grids"].tolist())
    kept = torch.cat([shows_picture(tuple(box), tuple(grid)) for box, grid in places])
    single = torch.arange(sum(sizes)) >= sum(sizes[:2])
    assert 0 < kept.sum() < len(kept)
    for settings, expected in (
        ({}, kept),
        ({"count_padding": True}, torch.ones_like(kept)),
        ({"skip_several_images": True}, kept & single),
        ({"count_padding": True, "skip_several_images": True}, single),
    ):
        viral = Viral(teacher="encoder", hidden=8, **settings)
        (target,) = ViralLoss.build(viral, Context(model, processor)).targets([batch])
        assert torch.equal(target["keep"], expected) and target.count == expected.sum()


def test_the_last_layer_is_read_before_or_after_the_final_norm():
    model, processor = tiny("llava_padded")
    batch = padded_batch(processor)
    context = Context(model, processor)
    found = {}
    for normed in (False, True):
        viral = Viral(teacher="encoder", layers=[context.depth], hidden=8, final_norm=normed)
        objective = ViralLoss.build(viral, context)
        aligned = AlignedModel(model, [TextLoss(), objective])
        with torch.no_grad():
            (made,) = with_targets([batch], [objective])
            found[normed] = aligned(made)["terms"][-1].mean
            states = model(**model_inputs(batch), output_hidden_states=True).hidden_states[-1]
        if normed:  # what the released code reads
            target = made["targets"]["viral"]
            by_hand = objective.compare(
                {context.depth: states[batch["visual_mask"]]}, target["features"], target["keep"]
            )
            assert torch.equal(found[True], by_hand.mean)
    assert (found[True] - found[False]).abs() > 1e-4
    with pytest.raises(InputError, match=f"the last layer, {context.depth}, among them"):
        ViralLoss.build(Viral(teacher="encoder", layers=[1], hidden=8, final_norm=True), context)


@pytest.mark.parametrize("progress", [0.0, 0.05, 0.25, 0.5, 1.0])
def test_schedules_follow_their_formulas(progress):
    expected = {
        "constant": 0.5,
        "linear": 0.5 - 0.5 * progress,
        "cosine": 0.5 * math.cos(math.pi * progress / 2) ** 2,
        "warmup": min(0.5, 5 * progress),
    }
    assert set(expected) == set(SCHEDULES)
    states, targets, _ = batch()
    for kind in SCHEDULES:
        assert abs(scheduled_weight(0.5, kind, progress) - expected[kind]) < 1e-12
        objective = ViralLoss(D, T, [2], 0.5, 9, schedule=kind)
        objective.progress = progress
        assert (
            objective.compare(states, targets).weight
            == objective.empty().weight
            == scheduled_weight(0.5, kind, progress)
        )
    assert scheduled_weight(0.5, "warmup", 0.25, warmup=0.5) == 0.25


def test_a_frozen_projector_stays_and_is_saved(tmp_path):
    from transformers import Trainer, TrainingArguments

    states, targets, _ = batch()
    objective = ViralLoss(D, T, [2, 3], hidden=9, trainable=False)
    objective.compare(states, targets).total.backward()
    assert (
        all(parameter.grad is None for parameter in objective.parameters()) and states[2].grad.abs().sum() > 0
    )
    whole = nn.ModuleDict({"student": nn.Linear(3, 3), "objective": objective})
    optimizer = Trainer(whole, TrainingArguments(tmp_path, report_to="none", use_cpu=True)).create_optimizer()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in whole["student"].parameters()}
    assert list(objective.state_dict()) == list(ViralLoss(D, T, [2, 3], hidden=9).state_dict())
    audit = parameter_audit(small_model()[0], {"alignment": objective}).loc["alignment"]
    assert audit["trained"] == 0 and audit["frozen"] == sum(
        parameter.numel() for parameter in objective.parameters()
    )
    assert not objective.empty().total.requires_grad


def test_one_projector_or_one_each():
    states, targets, _ = batch()
    each = ViralLoss(D, T, [2, 3], hidden=9, projectors="each")
    shared = ViralLoss(D, T, [2, 3], hidden=9)
    assert {name.rsplit(".", 2)[0] for name in each.state_dict()} == {"projector.2", "projector.3"}
    for layer in (2, 3):
        each.projector[str(layer)].load_state_dict(shared.projector.state_dict())
    one = shared.compare(states, targets)
    other = each.compare(states, targets)
    assert torch.equal(one.total, other.total)
    one.total.backward()
    other.total.backward()
    for name, parameter in shared.projector.named_parameters():
        parts = [each.get_parameter(f"projector.{layer}.{name}").grad for layer in (2, 3)]
        assert torch.allclose(parameter.grad, parts[0] + parts[1], atol=1e-6) and not torch.allclose(*parts)


def test_half_precision_states_meet_a_single_precision_projector():
    states, targets, _ = batch()
    objective = ViralLoss(D, T, [2, 3], hidden=9)
    half = {layer: value.detach().bfloat16().requires_grad_() for layer, value in states.items()}
    term = objective.compare(half, targets.bfloat16())
    term.total.backward()
    assert term.total.dtype == torch.float32 and half[2].grad.dtype == torch.bfloat16
    assert abs(term.mean - objective.compare(states, targets).mean) < 0.01
    relation = ViralLoss(D, T, [2], kind="relation")
    with torch.autocast("cpu", torch.bfloat16):
        blurred = relation.compare(states, targets, grids=GRIDS).total
    assert torch.equal(blurred, relation.compare(states, targets, grids=GRIDS).total)


@pytest.mark.parametrize(
    "setting", [{"kind": "angle"}, {"projectors": "none"}, {"schedule": "square"}, {"layers": []}]
)
def test_unknown_settings_are_refused(setting):
    with pytest.raises(InputError):
        ViralLoss(**{"width": D, "teacher_width": T, "layers": [2], **setting})


@pytest.mark.parametrize(
    "kind, targets, keep, grids",
    [
        ("cosine", torch.zeros(V, T + 1), None, GRIDS),
        ("cosine", torch.zeros(V - 1, T), None, GRIDS),
        ("cosine", torch.zeros(V, T), torch.ones(V), GRIDS),
        ("cosine", torch.zeros(V, T), torch.ones(V - 1, dtype=torch.bool), GRIDS),
        ("relation", torch.zeros(V, T), None, None),
        ("relation", torch.zeros(V, T), None, GRIDS[:2]),
        ("relation_projected", torch.zeros(V, T + 1), None, GRIDS),
    ],
)
def test_what_does_not_fit_is_refused(kind, targets, keep, grids):
    with pytest.raises(InputError):
        ViralLoss(D, T, [2], hidden=9, kind=kind).compare(batch()[0], targets, keep, grids)


# residuals


def small_model():
    "(model, processor): LLaVA with random weights, 25 visual tokens an image, 4 blocks."
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
    )

    tokenizer = word_tokenizer([f"word{index}" for index in range(60)])
    seed_everything(0)
    tower = AutoModel.from_config(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=40,
            patch_size=8,
        )
    )
    language = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            initializer_range=0.3,
        )
    )
    return compose(
        tower,
        language,
        tokenizer,
        CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}),
    )


def inputs_of(model) -> dict:
    "Four left-padded samples: one image, two images, words alone, one image."
    seed_everything(3)
    image = model.config.image_token_id
    ids = torch.randint(6, 60, (4, 60))
    ids[0, 20:45] = image
    ids[1, 3:28] = image
    ids[1, 30:55] = image
    ids[3, 8:33] = image
    attention = torch.ones_like(ids)
    ids[0, :7] = 0
    attention[0, :7] = 0
    ids[2, :30] = 0
    attention[2, :30] = 0
    return {"input_ids": ids, "attention_mask": attention, "pixel_values": torch.randn(4, 3, 40, 40)}


def with_residual(kind: str, layer: int = 2):
    model = small_model()[0]
    seed_everything(7)
    add_residual(model, layer, kind)
    return model


def features_of(model, kind: str, pixels):
    "P(z) or P'(z), by hand: (V, D)."
    projector = model.model.multi_modal_projector
    tower = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[
        model.config.vision_feature_layer
    ][:, 1:]
    return (projector if kind == "post_projection" else projector.residual_adapter)(tower).flatten(0, 1)


@pytest.mark.parametrize("kind", RESIDUALS)
def test_a_residual_adds_exactly_the_features_at_positions(kind):
    plain = small_model()[0]
    model = small_model()[0]
    inputs = inputs_of(model)
    mask = inputs["input_ids"] == model.config.image_token_id
    model(
        **inputs, output_hidden_states=True
    )  # transformers places hooks of its own now, which must see the sum, too
    add_residual(model, 2, kind)
    with torch.no_grad(), Taps(plain, [0, 1, 2, 3]) as before, Taps(model, [0, 1, 2, 3]) as after:
        plain(**inputs), model(**inputs)
        for layer in (0, 1):
            assert torch.equal(after.states(layer), before.states(layer))
        assert torch.equal(after.states(2)[~mask], before.states(2)[~mask])
        assert torch.allclose(
            after.states(2)[mask],
            before.states(2)[mask] + features_of(model, kind, inputs["pixel_values"]),
            atol=1e-6,
        )
        assert (after.states(3)[1] != before.states(3)[1]).any() and torch.equal(
            after.states(3)[2], before.states(3)[2]
        )
        shown = model(**inputs, output_hidden_states=True).hidden_states[2]
        assert torch.equal(shown, after.states(2))
        words = {"input_ids": inputs["input_ids"][2:3]}
        assert torch.equal(
            model(**words).logits, plain(**words).logits
        )  # nothing is left from the call before
        stray = {
            "input_ids": torch.full((1, 3), model.config.image_token_id)
        }  # as a generated token might be
        assert torch.equal(model(**stray).logits, plain(**stray).logits)


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_is_the_same_with_and_without_a_cache(kind, search):
    plain = small_model()[0]
    model = with_residual(kind)
    for student in (plain, model):  # features loud enough to change what is said
        for name, value in student.model.multi_modal_projector.named_parameters():
            value.data.mul_(20 if "linear_2.weight" in name else 1)
    inputs = inputs_of(model)
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
        "suppress_tokens": [model.config.image_token_id],
        **search,
    }
    cached, whole, other = (
        student.generate(**inputs, **settings, use_cache=cache)
        for student, cache in ((model, True), (model, False), (plain, True))
    )
    assert torch.equal(cached.sequences, whole.sequences) and not torch.equal(
        cached.sequences, other.sequences
    )
    assert all(torch.allclose(one, another, atol=1e-3) for one, another in zip(cached.logits, whole.logits))
    words = slice(2 * search.get("num_return_sequences", 1), 3 * search.get("num_return_sequences", 1))
    assert torch.equal(cached.sequences[words], other.sequences[words])


@pytest.mark.parametrize("kind", RESIDUALS)
def test_steps_after_the_prompt_add_nothing(kind):
    """The states of each generated token, given the same cache, are those of a model without the residual
    from there on."""
    model = with_residual(kind)
    inputs = inputs_of(model)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        plain = small_model()[0]
        step = {"input_ids": torch.full((4, 1), 9), "attention_mask": torch.ones(4, 61)}
        one = model(**step, past_key_values=deepcopy(cache)).logits
        other = plain(**step, past_key_values=deepcopy(cache)).logits
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_checkpoint_carries_its_residual(kind, shard, tmp_path):
    model, processor = small_model()
    add_residual(model, 3, kind)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    processor.save_pretrained(tmp_path)
    again, _ = load_model(tmp_path)
    inputs = inputs_of(model)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits) and checksum(again) == checksum(model)
    assert again.config.aligned_residual == {"layer": 3, "kind": kind}
    again.save_pretrained(tmp_path / "second")
    processor.save_pretrained(tmp_path / "second")
    assert torch.equal(load_model(tmp_path / "second")[0](**inputs).logits, model(**inputs).logits)


def test_missing_adapter_weights_are_noticed(tmp_path):
    from safetensors.torch import load_file, save_file

    model, processor = small_model()
    add_residual(model, 3, "pre_projection")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "residual_adapter" not in name},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(InputError, match="adapter weights"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", RESIDUALS)
def test_gradient_reaches_the_projector_through_the_residual(kind):
    "A linear loss on the states after the addition: what the residual adds to the gradient is known."
    plain = small_model()[0]
    model = with_residual(kind)
    inputs = inputs_of(model)
    mask = inputs["input_ids"] == model.config.image_token_id
    direction = torch.randn(int(mask.sum()), 48)
    for student in (plain, model):
        with Taps(student, [2]) as taps:
            student(**inputs)
        (taps.states(2, mask) * direction).sum().backward()
    expected = deepcopy(model)
    expected.zero_grad()
    (features_of(expected, kind, inputs["pixel_values"]) * direction).sum().backward()
    found, before, extra = (
        dict(student.model.multi_modal_projector.named_parameters()) for student in (model, plain, expected)
    )
    for name, parameter in found.items():
        base = before[name].grad if name in before else 0
        more = extra[name].grad if extra[name].grad is not None else 0
        assert torch.allclose(parameter.grad, base + more, rtol=1e-4, atol=1e-3), name
    assert any(value.grad is not None and value.grad.abs().sum() > 1 for value in extra.values())


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_plain_ones(kind, reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = with_residual(kind).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        inputs = inputs_of(model)
        first = model(**inputs)  # both before any backward
        second = model(**{**inputs, "pixel_values": -inputs["pixel_values"]})
        (first.logits.square().mean() + 2 * second.logits.square().mean()).backward()
        gradients.append(
            {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        )
    assert set(gradients[0]) == set(gradients[1])
    for name, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][name], rtol=1e-4, atol=1e-5), name


def test_the_adapter_trains_with_the_projector_also_under_lora(tmp_path):
    model = with_residual("pre_projection")
    inputs = inputs_of(model)
    train_only(model, ["projector"])
    counts = parameter_audit(model).loc["projector"]
    assert (
        counts["trained"]
        == 2 * sum(value.numel() for value in small_model()[0].model.multi_modal_projector.parameters())
        and counts["frozen"] == 0
    )
    same = with_residual("pre_projection")(**inputs).logits
    wrapped = add_lora(with_residual("pre_projection"), 4)
    assert torch.allclose(wrapped(**inputs).logits, same, atol=1e-5)
    wrapped.train()(**inputs).logits.square().mean().backward()
    moved = {
        name
        for name, value in wrapped.named_parameters()
        if value.grad is not None and value.grad.abs().sum() > 0
    }
    assert any("residual_adapter" in name for name in moved) and all(
        "lora" in name or "multi_modal_projector" in name for name in moved
    )
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if value.requires_grad:
                value.add_(0.01)
    trained = wrapped.eval()(**inputs).logits
    merged = wrapped.merge_and_unload()
    assert torch.allclose(merged(**inputs).logits, trained, atol=1e-4) and not torch.allclose(
        trained, same, atol=1e-2
    )
    merged.save_pretrained(tmp_path)
    small_model()[1].save_pretrained(tmp_path)
    assert torch.allclose(load_model(tmp_path)[0](**inputs).logits, trained, atol=1e-4)


@pytest.mark.parametrize("layer, kind", [(0, "post_projection"), (5, "post_projection"), (2, "between")])
def test_residuals_that_cannot_be_are_refused(layer, kind):
    with pytest.raises(InputError):
        add_residual(small_model()[0], layer, kind)


def test_an_adapter_is_not_fed_with_another_picture():
    model = with_residual("pre_projection")
    inputs = inputs_of(model)
    encoded = model.get_image_features(inputs.pop("pixel_values"))
    model(**inputs, mm_encoder_outputs={"image": encoded})
    model.get_image_features(torch.randn(4, 3, 40, 40))
    with pytest.raises(InputError, match="another image"):
        model(**inputs, mm_encoder_outputs={"image": encoded})


def test_a_second_residual_and_a_wrapped_model_are_refused():
    with pytest.raises(InputError, match="second"):
        add_residual(with_residual("post_projection"), 3, "post_projection")
    with pytest.raises(InputError, match="before|first"):
        add_residual(add_lora(small_model()[0], 4), 2, "post_projection")
