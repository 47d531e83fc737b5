"Shuffled visual tokens and knock-outs: for every family of models, against independent computations."

import pandas as pd
import pytest
import torch
from family_checks import SIZES, mixed, photo
from tiny_models import FAMILIES, tiny

from aligned_mllm.analysis.knockout import (
    knockout_figure,
    knockout_table,
    without_image_attention,
    without_update,
)
from aligned_mllm.analysis.permutation import (
    bag_of_patches,
    permutation_figure,
    paired_loss,
    permutation_test,
    permuted_tokens,
    projector_inputs,
)
from aligned_mllm.analysis.checkpoints import LoadedModel
from aligned_mllm.core import InputError
from aligned_mllm.data.collate import model_inputs
from aligned_mllm.data.records import Records
from aligned_mllm.models.trainable import add_lora
from aligned_mllm.worlds.small_models import embedded_model
from aligned_mllm.models.taps import Taps

PROCESSORS = {}


def tiny_loaded(family: str, wrapped: bool = False) -> LoadedModel:
    model, processor = tiny(family)
    PROCESSORS.setdefault(family, processor)
    return LoadedModel(family, add_lora(model, rank=2).eval() if wrapped else model, PROCESSORS[family])


@torch.no_grad()
def states_of(model, batch: dict, layer: int = 0) -> torch.Tensor:
    with Taps(model, [layer]) as taps:
        model(**model_inputs(batch), use_cache=False)
    return taps.states(layer)


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_shuffled_tokens_are_the_same_tokens_in_another_order(family):
    """Each view's tokens, one way or the other, and only they; the same seed gives the same order,
    another another; nothing stays behind."""
    loaded = tiny_loaded(family, wrapped=family in ("llava", "qwen2_5_vl"))
    model = loaded.model
    batch = loaded.batch([photo(0, (90, 90)), photo(1, (90, 90))], "what is above")
    plain = states_of(model, batch)  # transformers leaves hooks of its own in the first pass
    count = hooks_of(model)
    with permuted_tokens(model, 1):
        shuffled = states_of(model, batch)
    with permuted_tokens(model, 1):
        assert torch.equal(shuffled, states_of(model, batch))
    with permuted_tokens(model, 2):
        assert not torch.equal(shuffled, states_of(model, batch))
    assert torch.equal(plain, states_of(model, batch)) and hooks_of(model) == count
    mask = batch["visual_mask"]
    assert torch.equal(shuffled[~mask], plain[~mask]) and not torch.allclose(
        shuffled[mask], plain[mask], atol=1e-3
    )
    counts = batch["grids"].prod(1).tolist()
    if (
        family == "llava_next"
    ):  # tiles are cut and joined after the projector: its output is examined instead
        return
    for before, after in zip(plain[mask].split(counts), shuffled[mask].split(counts)):
        nearest = torch.cdist(after, before).min(1)
        assert nearest.values.max() < 1e-3 and sorted(nearest.indices.tolist()) == list(range(len(before)))


def test_tiles_of_llava_next_are_shuffled_each_in_itself():
    loaded = tiny_loaded("llava_next")
    batch = loaded.batch([photo(0, SIZES[0])])
    seen = []
    hook = loaded.model.model.multi_modal_projector.register_forward_hook(
        lambda module, arguments, output: seen.append(output)
    )
    states_of(loaded.model, batch)
    with permuted_tokens(loaded.model):
        states_of(loaded.model, batch)
    hook.remove()
    plain, shuffled = seen
    orders = [torch.cdist(after, before).argmin(1).tolist() for before, after in zip(plain, shuffled)]
    assert (
        len(orders) > 1
        and all(sorted(order) == list(range(25)) for order in orders)
        and orders[0] != orders[1]
    )


def test_every_projector_of_a_picture_sees_one_order():
    "Qwen3-VL puts features of earlier vision layers into later blocks: their tokens move with the others."
    loaded = tiny_loaded("qwen3_vl")
    batch = loaded.batch([photo(0, SIZES[0])])
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        for module in projector_inputs(loaded.model)[0]
    ]
    states_of(loaded.model, batch)
    with permuted_tokens(loaded.model):
        late = [
            module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
            for module in projector_inputs(loaded.model)[0]
        ]
        del seen[2:]
        states_of(loaded.model, batch)
    for hook in hooks + late:
        hook.remove()
    first = [torch.cdist(seen[-3 if number == 0 else -1], seen[number]).argmin(1) for number in (0, 1)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], torch.arange(len(first[0])))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bag_of_patches_cannot_tell_an_order(family):
    loaded = tiny_loaded(family)
    batch = loaded.batch([photo(0, (90, 90))], "what is above")

    def logits():
        with torch.no_grad():
            return loaded.model(**model_inputs(batch), use_cache=False).logits[0, -1]

    plain = logits()
    with permuted_tokens(loaded.model, 3):
        assert (logits() - plain).abs().max() > 1e-5
    with bag_of_patches(loaded.model):
        bag = logits()
        with permuted_tokens(loaded.model, 3):
            assert (logits() - bag).abs().max() < 1e-5 < (bag - plain).abs().max()


def test_a_projector_that_mixes_its_tokens_is_refused_and_leaves_nothing_behind():
    loaded = tiny_loaded("llava")
    projector = loaded.model.model.multi_modal_projector
    batch = loaded.batch([photo(0, (90, 90))])
    states_of(loaded.model, batch)
    forward = projector.forward
    count = hooks_of(loaded.model)
    projector.forward = lambda features: forward(features.cumsum(1))
    with pytest.raises(InputError, match="mixes its tokens"), permuted_tokens(loaded.model):
        states_of(loaded.model, batch)
    assert hooks_of(loaded.model) == count
    projector.forward = lambda features: forward(features)[:, :5]
    with pytest.raises(InputError, match="mixes its tokens"), permuted_tokens(loaded.model):
        states_of(loaded.model, batch)


def few_records(data, folder) -> Records:
    (folder / "few.jsonl").write_text("".join((data / "test.jsonl").read_text().splitlines(True)[:20]))
    return Records(folder / "few.jsonl", data)


def test_the_loss_is_paired(small_data, parts, tmp_path):
    before = pd.DataFrame(
        {
            "id": ["a", "b", "c", "d"],
            "category": ["x", "x", "y", "y"],
            "question": "?",
            "correct": [True, True, True, False],
        }
    )
    after = [
        before.assign(correct=[True, False, False, False]),
        before.assign(correct=[True, True, False, False]),
    ]
    table = paired_loss(before, after).set_index("category")
    assert table.loss.tolist() == [1.5 / 4, 0.25, 0.5] and table.questions.tolist() == [4, 2, 2]
    differences = torch.tensor([0, 0.5, 1, 0])
    half = 3.182446305284263 * float(differences.std()) / 2  # t quantile with 3 degrees of freedom
    assert abs(table.high["all"] - (0.375 + half)) < 1e-6 and abs(table.low["all"] - (0.375 - half)) < 1e-6
    model, processor = embedded_model(parts)
    models = [LoadedModel(name, model, processor) for name in ("one", "two")]
    records = few_records(small_data, tmp_path)
    found = permutation_test(models, records, permutations=1, max_new_tokens=2)
    assert list(found.model.unique()) == ["one", "two"] and set(found.category) == {
        "all",
        "count",
        "existence",
        "relation",
        "attribute",
        "where",
    }
    assert (
        found[found.model == "one"]
        .drop(columns="model")
        .reset_index(drop=True)
        .equals(found[found.model == "two"].drop(columns="model").reset_index(drop=True))
    )
    assert len(permutation_figure(found).data) == 2
    with pytest.raises(InputError, match="0 permutations"):
        permutation_test(models, records, permutations=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_taken_back(family):
    """State k is state k - 1 at visual positions; text at layer k is that of the whole model and differs
    from its input; the last block's changes no word."""
    loaded = tiny_loaded(family, wrapped=family in ("llava", "qwen2_5_vl"))
    model = loaded.model
    batch = mixed(loaded.processor)
    placeholders = batch["input_ids"] == model.config.image_token_id
    before = states_of(model, batch, 1)
    whole = states_of(model, batch, 2)
    count = hooks_of(model)
    with without_update(model, 2):
        with torch.no_grad(), Taps(model, [1, 2]) as taps:
            other = model(**model_inputs(batch), use_cache=False).logits
        first = taps.states(1)
        second = taps.states(2)
    assert torch.equal(first, before)
    assert torch.allclose(
        second[placeholders], first[placeholders], atol=1e-6 if family != "qwen3_vl" else 10
    )
    assert torch.equal(second[~placeholders], whole[~placeholders]) and not torch.allclose(
        second[~placeholders], first[~placeholders], atol=1e-3
    )
    with torch.no_grad():
        logits = model(**model_inputs(batch), use_cache=False).logits
        with without_update(model, 3):
            last = model(**model_inputs(batch), use_cache=False).logits
    real = batch["attention_mask"].bool() & ~placeholders
    real[:, 0] = False
    assert not torch.equal(other[real], logits[real]) and torch.equal(
        last[~placeholders], logits[~placeholders]
    )
    assert not torch.equal(last[placeholders], logits[placeholders]) and hooks_of(model) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_from_the_first_block_a_model_is_blind_and_from_the_second_it_is_not(family):
    loaded = tiny_loaded(family, wrapped=family in ("llava", "qwen3_vl"))
    model = loaded.model
    places = None
    found = {}
    with torch.no_grad():
        for seed in (0, 5):
            batch = loaded.batch([photo(seed, (90, 90))], "what is above", "two red towers")
            places = batch["input_ids"] == model.config.image_token_id
            for layer in (None, 1, 2, 3):
                if layer is None:
                    found[seed, layer] = model(**model_inputs(batch), use_cache=False).logits[~places]
                    continue
                with without_image_attention(model, layer):
                    found[seed, layer] = model(**model_inputs(batch), use_cache=False).logits[~places]
            assert torch.equal(
                found[seed, None], model(**model_inputs(batch), use_cache=False).logits[~places]
            )
    assert torch.equal(found[0, 1], found[5, 1])
    for layer in (None, 2, 3):
        assert (found[0, layer] - found[5, layer]).abs().max() > 1e-5
    assert (found[0, 1] - found[0, None]).abs().max() > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_cuts_hold_in_generation_with_every_cache(family):
    """Blind answers to left-padded batches do not change with the picture; with and without a cache, also
    a static one, answers under a later cut are the same."""
    loaded = tiny_loaded(family)
    model = loaded.model
    processor = loaded.processor
    said = {}
    settings = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": processor.tokenizer.pad_token_id,
    }
    batch = mixed(processor, "left", with_last_answer=False)
    pictures = {"pixel_values": 1.5 * batch["pixel_values"].flip(-1)}  # tiles of zeros stay: padding
    start = batch["input_ids"].shape[1]
    with without_image_attention(model, 1):
        for name, inputs in (("one", batch), ("other", batch | pictures)):
            said[name] = model.generate(**model_inputs(inputs), **settings)[:, start:]
        said["slow"] = model.generate(**model_inputs(batch), **settings, use_cache=False)[:, start:]
    assert torch.equal(said["one"], said["other"]) and torch.equal(said["one"], said["slow"])
    for context in (lambda: without_image_attention(model, 2), lambda: without_update(model, 2)):
        with context():
            scores = [
                torch.stack(
                    model.generate(
                        **model_inputs(batch),
                        **settings,
                        output_scores=True,
                        return_dict_in_generate=True,
                        **more,
                    ).scores
                )
                for more in ({}, {"use_cache": False}, {"cache_implementation": "static"})
            ]
        finite = scores[0].isfinite()
        assert all((other - scores[0])[finite].abs().max() < 1e-4 for other in scores[1:])


def test_a_cut_is_what_attention_without_these_weights_gives():
    """Against attention written out by hand: softmax over allowed keys alone, the picture's taken out for
    text from block 2 on."""
    from transformers import AttentionInterface

    loaded = tiny_loaded("llava")
    model = loaded.model
    batch = loaded.batch([photo(0, (90, 90))], "what is above", "two red towers")
    image = batch["visual_mask"][0]
    length = batch["input_ids"].shape[1]

    def by_hand(module, query, key, value, attention_mask, scaling=None, **_):
        key, value = (
            states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value)
        )
        allowed = (
            torch.ones(length, length).tril().bool()
            if length == query.shape[2]
            else torch.ones(query.shape[2], key.shape[2]).bool()
        )
        if length == query.shape[2] and module.layer_idx >= 1:
            allowed = allowed & ~(~image[:, None] & image[None])
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~allowed, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    with torch.no_grad(), without_image_attention(model, 2):
        found = model(**model_inputs(batch), use_cache=False).logits
        model.model.language_model.set_attn_implementation("eager")
        eager = model(**model_inputs(batch), use_cache=False).logits
    AttentionInterface.register("by_hand", by_hand)
    model.model.language_model.set_attn_implementation("by_hand")
    with torch.no_grad():
        wanted = model(**model_inputs(batch), use_cache=False).logits
    assert (found - wanted).abs().max() < 1e-5 and (eager - wanted).abs().max() < 1e-5
    with pytest.raises(InputError, match="'by_hand'"), without_image_attention(model, 2):
        pass


def test_contexts_end_also_after_an_error():
    loaded = tiny_loaded("llava")
    batch = loaded.batch([photo(0, (90, 90))])
    states_of(loaded.model, batch)
    count = hooks_of(loaded.model)
    for context in (without_update, without_image_attention):
        with pytest.raises(RuntimeError), context(loaded.model, 1):
            raise RuntimeError
        with pytest.raises(InputError, match="blocks from 1 to 3"), context(loaded.model, 4):
            pass
        with pytest.raises(InputError, match="input_ids"), context(loaded.model, 1):
            loaded.model(inputs_embeds=torch.zeros(1, 4, 32))
    assert hooks_of(loaded.model) == count


def test_knockouts_against_the_task(small_data, parts, tmp_path):
    model, processor = embedded_model(parts)
    records = few_records(small_data, tmp_path)
    table = knockout_table(
        [LoadedModel("one", model, processor), LoadedModel("two", model, processor)],
        records,
        "update",
        [1, 6],
        max_new_tokens=2,
    )
    assert len(table) == 2 * 2 * 6 and table[table.layer == 6].loss.eq(0).all()
    assert len(knockout_figure(table).data) == 4
    with pytest.raises(InputError, match="knock-out 'x'"):
        knockout_table(LoadedModel("one", model, processor), records, "x")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_every_pass_draws_orders_of_its_own(family):
    loaded = tiny_loaded(family)
    batches = [loaded.batch([photo(0, size)]) for size in (SIZES[0], SIZES[1], SIZES[0])]
    with permuted_tokens(loaded.model):
        first, other, second = ((batch["visual_mask"], states_of(loaded.model, batch)) for batch in batches)
    assert not torch.allclose(first[1][first[0]], second[1][second[0]], atol=1e-3)
    with permuted_tokens(loaded.model):
        assert torch.equal(first[1], states_of(loaded.model, batches[0])) and other[0].any()
