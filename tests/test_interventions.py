"Shuffled visual tokens and knock-outs: for every family of models, against independent computations."

import pandas as pd
import pytest
import torch
from family_checks import SIZES, photo
from tiny_models import FAMILIES, tiny

from aligned_mllm.analysis.permutation import bag_of_patches, loss_figure, paired_loss, permutation_test, permuted_tokens, projector_inputs
from aligned_mllm.analysis.subjects import Subject
from aligned_mllm.core import InputError
from aligned_mllm.data.collate import model_inputs
from aligned_mllm.data.records import Records
from aligned_mllm.models.compose import add_lora
from aligned_mllm.models.parts import embedded_model
from aligned_mllm.models.taps import Taps

PROCESSORS = {}


def subject_of(family: str, wrapped: bool = False) -> Subject:
    model, processor = tiny(family)
    PROCESSORS.setdefault(family, processor)
    return Subject(family, add_lora(model, rank=2).eval() if wrapped else model, PROCESSORS[family])


@torch.no_grad()
def states_of(model, batch: dict, layer: int = 0) -> torch.Tensor:
    with Taps(model, [layer]) as taps:
        model(**model_inputs(batch), use_cache=False)
    return taps.states(layer)


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_shuffled_tokens_are_the_same_tokens_in_another_order(family):
    "Each view's tokens, one way or the other, and only they; the same seed gives the same order, another another; nothing stays behind."
    subject = subject_of(family, wrapped=family in ("llava", "qwen2_5_vl"))
    model, batch = subject.model, subject.batch([photo(0, (90, 90)), photo(1, (90, 90))], "what is above")
    plain, count = states_of(model, batch), hooks_of(model)  # transformers leaves hooks of its own in the first pass
    with permuted_tokens(model, 1):
        shuffled = states_of(model, batch)
    with permuted_tokens(model, 1):
        assert torch.equal(shuffled, states_of(model, batch))
    with permuted_tokens(model, 2):
        assert not torch.equal(shuffled, states_of(model, batch))
    assert torch.equal(plain, states_of(model, batch)) and hooks_of(model) == count
    mask = batch["visual_mask"]
    assert torch.equal(shuffled[~mask], plain[~mask]) and not torch.allclose(shuffled[mask], plain[mask], atol=1e-3)
    counts = batch["grids"].prod(1).tolist()
    if family == "llava_next":  # tiles are cut and joined after the projector: what leaves it is looked at instead
        return
    for before, after in zip(plain[mask].split(counts), shuffled[mask].split(counts)):
        nearest = torch.cdist(after, before).min(1)
        assert nearest.values.max() < 1e-3 and sorted(nearest.indices.tolist()) == list(range(len(before)))


def test_tiles_of_llava_next_are_shuffled_each_in_itself():
    subject = subject_of("llava_next")
    batch, seen = subject.batch([photo(0, SIZES[0])]), []
    hook = subject.model.model.multi_modal_projector.register_forward_hook(lambda module, arguments, output: seen.append(output))
    states_of(subject.model, batch)
    with permuted_tokens(subject.model):
        states_of(subject.model, batch)
    hook.remove()
    plain, shuffled = seen
    orders = [torch.cdist(after, before).argmin(1).tolist() for before, after in zip(plain, shuffled)]
    assert len(orders) > 1 and all(sorted(order) == list(range(25)) for order in orders) and orders[0] != orders[1]


def test_every_projector_of_a_picture_sees_one_order():
    "Qwen3-VL puts features of earlier vision layers into later blocks: their tokens move with the others."
    subject = subject_of("qwen3_vl")
    batch, seen = subject.batch([photo(0, SIZES[0])]), []
    hooks = [module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0])) for module in projector_inputs(subject.model)[0]]
    states_of(subject.model, batch)
    with permuted_tokens(subject.model):
        late = [module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0])) for module in projector_inputs(subject.model)[0]]
        del seen[2:]
        states_of(subject.model, batch)
    for hook in hooks + late:
        hook.remove()
    first = [torch.cdist(seen[-3 if number == 0 else -1], seen[number]).argmin(1) for number in (0, 1)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], torch.arange(len(first[0])))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bag_of_patches_cannot_tell_an_order(family):
    subject = subject_of(family)
    batch = subject.batch([photo(0, (90, 90))], "what is above")

    def logits():
        with torch.no_grad():
            return subject.model(**model_inputs(batch), use_cache=False).logits[0, -1]

    plain = logits()
    with permuted_tokens(subject.model, 3):
        assert (logits() - plain).abs().max() > 1e-5
    with bag_of_patches(subject.model):
        bag = logits()
        with permuted_tokens(subject.model, 3):
            assert (logits() - bag).abs().max() < 1e-5 < (bag - plain).abs().max()


def test_a_projector_that_mixes_its_tokens_is_refused_and_leaves_nothing_behind():
    subject = subject_of("llava")
    projector, batch = subject.model.model.multi_modal_projector, subject.batch([photo(0, (90, 90))])
    states_of(subject.model, batch)
    forward, count = projector.forward, hooks_of(subject.model)
    projector.forward = lambda features: forward(features.cumsum(1))
    with pytest.raises(InputError, match="mixes its tokens"), permuted_tokens(subject.model):
        states_of(subject.model, batch)
    assert hooks_of(subject.model) == count
    projector.forward = lambda features: forward(features)[:, :5]
    with pytest.raises(InputError, match="mixes its tokens"), permuted_tokens(subject.model):
        states_of(subject.model, batch)


def test_the_loss_is_paired(small_data, parts):
    before = pd.DataFrame({"id": ["a", "b", "c", "d"], "category": ["x", "x", "y", "y"], "question": "?", "correct": [True, True, True, False]})
    after = [before.assign(correct=[True, False, False, False]), before.assign(correct=[True, True, False, False])]
    table = paired_loss(before, after).set_index("category")
    assert table.loss.tolist() == [1.5 / 4, 0.25, 0.5] and table.questions.tolist() == [4, 2, 2]
    differences = torch.tensor([0, 0.5, 1, 0])
    half = 3.182446305284263 * float(differences.std()) / 2  # t quantile with 3 degrees of freedom
    assert abs(table.high["all"] - (0.375 + half)) < 1e-6 and abs(table.low["all"] - (0.375 - half)) < 1e-6
    model, processor = embedded_model(parts)
    subjects, records = [Subject(name, model, processor) for name in ("one", "two")], Records(small_data / "test.jsonl", small_data)
    found = permutation_test(subjects, records, permutations=1, max_new_tokens=2)
    assert list(found.model.unique()) == ["one", "two"] and set(found.category) == {"all", "count", "existence", "relation", "attribute", "where"}
    assert found[found.model == "one"].drop(columns="model").reset_index(drop=True).equals(found[found.model == "two"].drop(columns="model").reset_index(drop=True))
    assert len(loss_figure(found).data) == 2
    with pytest.raises(InputError, match="0 permutations"):
        permutation_test(subjects, records, permutations=0)
