"""Attention rows against transformers' eager weights, for every family, without changing what the model
computes."""

import pytest
import torch
from family_checks import SIZES, mixed, photo
from tiny_models import FAMILIES, tiny

from aligned_mllm.analysis.attention import (
    ACTIVE_CONTEXTS,
    AttentionRows,
    attention_rows,
    generated_rows,
    language_model_of,
)
from aligned_mllm.analysis.attention_tables import query_mask, views_of_samples
from aligned_mllm.analysis.checkpoints import LoadedModel
from aligned_mllm.analysis.overlay import attention_figure
from aligned_mllm.core import InputError, seed_everything
from aligned_mllm.data.collate import model_inputs


def eager_weights(model, batch: dict) -> list[torch.Tensor]:
    "transformers' own full matrices, layer by layer: (B, H, S, S)."
    decoder = language_model_of(model)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**model_inputs(batch), use_cache=False, output_attentions=True).attentions
    decoder.set_attn_implementation(before)
    return weights


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_eager_weights_and_the_model_computes_what_it_did(family, side):
    model, processor = tiny(family)
    batch = mixed(processor, side)
    with torch.no_grad():
        own = model(**model_inputs(batch), use_cache=False).logits
        with AttentionRows(model, batch["attention_mask"].bool()) as rows:
            heard = model(**model_inputs(batch), use_cache=False).logits
        again = model(**model_inputs(batch), use_cache=False).logits
    real = batch["attention_mask"].bool()
    assert torch.equal(own, again) and (own - heard)[real].abs().max() < 1e-5
    full_weights = eager_weights(model, batch)
    assert len(full_weights) == 3
    for layer, weights in enumerate(full_weights, start=1):
        for sample, (kept, full) in enumerate(zip(rows.kept[layer], weights)):
            assert kept.shape == (2, int(real[sample].sum()), real.shape[1])
            assert (kept - full[:, real[sample]]).abs().max() < 1e-4, (family, layer, sample)


def changed(family: str, **text):
    "A tiny model whose language model has other settings, and its processor."
    model, processor = tiny(family)
    for name, value in text.items():
        setattr(model.config.text_config, name, value)
    seed_everything(0)
    return type(model)(model.config).eval(), processor


GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def paligemma2(**text):
    "PaliGemma around Gemma 2, whose scores have a soft cap: eager is its only implementation."
    from transformers import Gemma2Config, PaliGemmaForConditionalGeneration

    model, processor = tiny("paligemma")
    old = model.config.text_config
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    model.config.text_config = Gemma2Config(**{name: getattr(old, name) for name in names}, **text)
    seed_everything(0)
    return PaliGemmaForConditionalGeneration(model.config).eval(), processor


CASES = {
    "Gemma 3, window of 20 in two of three layers": lambda: changed(
        "gemma3",
        **GROUPED,
        sliding_window=20,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "Mistral, window of 30": lambda: changed("llava_next", **GROUPED, sliding_window=30),
    "Qwen 2, window of 30 from layer 2": lambda: changed(
        "internvl",
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=30,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "Gemma 2, soft cap and window": lambda: paligemma2(
        **GROUPED, attn_logit_softcapping=0.01, sliding_window=20, query_pre_attn_scalar=8
    ),
    "Qwen 2.5 VL, three axes of positions, grouped": lambda: changed(
        "qwen2_5_vl",
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_windows_groups_and_soft_caps(case):
    model, processor = CASES[case]()
    batch = mixed(processor)
    real = batch["attention_mask"].bool()
    with torch.no_grad(), AttentionRows(model, real) as rows:
        heard = model(**model_inputs(batch), use_cache=False).logits
    with torch.no_grad():
        assert (heard - model(**model_inputs(batch), use_cache=False).logits)[real].abs().max() < 1e-5
    full_weights = eager_weights(model, batch)
    assert len(full_weights) == 3 and full_weights[0].shape[1] == 4
    for layer, weights in enumerate(full_weights, start=1):
        for sample, (kept, full) in enumerate(zip(rows.kept[layer], weights)):
            assert (kept - full[:, real[sample]]).abs().max() < 1e-4, (case, layer, sample)
    if "window" in case:  # the case is one: the last row does not reach the beginning in some layer
        assert any(float(full[0, :, int(real[0].sum()) - 1, 0].max()) == 0 for full in full_weights)
    if "cap" in case:  # and this one: scores within 0.01 of 0, so that what is seen is seen alike
        seen = full_weights[1][0, 0, 5][full_weights[1][0, 0, 5] > 0]
        assert (
            model.config.text_config._attn_implementation == "eager"
            and len(seen) > 1
            and seen.max() / seen.min() < 1.03
        )


def test_the_cap_changes_rows():
    "Without the soft cap the rows differ: the test above could fail."
    batch = None
    found = []
    for cap in (0.01, None):
        model, processor = paligemma2(**GROUPED, attn_logit_softcapping=cap, query_pre_attn_scalar=1)
        batch = mixed(processor) if batch is None else batch
        with torch.no_grad(), AttentionRows(model, batch["attention_mask"].bool()) as rows:
            model(**model_inputs(batch), use_cache=False)
        found.append(rows.kept[1][0])
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_after_generation_gives_the_weights_of_its_steps(family):
    model, processor = tiny(family)
    loaded = LoadedModel(family, model, processor)
    batch = loaded.batch([photo(0, SIZES[0])], "what is above")
    tokens, rows = generated_rows(loaded, batch, max_new_tokens=4, image_only=False)
    decoder = language_model_of(model)
    decoder.set_attn_implementation("eager")
    with torch.no_grad():
        steps = model.generate(
            **model_inputs(batch),
            do_sample=False,
            max_new_tokens=4,
            pad_token_id=processor.tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_attentions=True,
        )
    length = batch["input_ids"].shape[1]
    assert torch.equal(steps.sequences[0, length:], tokens) and len(tokens) == len(steps.attentions) > 0
    for step, weights in enumerate(steps.attentions):
        for layer, full in enumerate(weights, start=1):
            row = full[0, :, -1]  # a sliding cache holds the last keys only
            assert (rows[layer][:, step, : length + step][:, -row.shape[-1] :] - row).abs().max() < 1e-4, (
                family,
                step,
                layer,
            )
            assert rows[layer][:, step, length + step :].abs().sum() == 0


def test_only_the_wanted_rows_are_held():
    model, processor = tiny("llava")
    loaded = LoadedModel("llava", model, processor)
    batch = loaded.batch([photo(0, SIZES[0])], "what is above")
    rows = attention_rows(loaded, batch, [-3, -1, -3], layers=[2])
    assert sorted(rows) == [2] and rows[2].shape == (2, 3, 25) and torch.equal(rows[2][:, 0], rows[2][:, 2])
    assert rows[2].untyped_storage().nbytes() == rows[2].numel() * 4  # no view into a larger matrix
    full = eager_weights(model, batch)[1][0][:, [-3, -1]][..., batch["visual_mask"][0]]
    assert (rows[2][:, :2] - full).abs().max() < 1e-4 and (rows[2][:, 0] - full[:, 1]).abs().max() > 1e-4


def test_everything_is_put_back_after_an_error_and_contexts_nest():
    model, processor = tiny("llava")
    batch = mixed(processor)
    real = batch["attention_mask"].bool()
    before = model.config.text_config._attn_implementation
    with pytest.raises(InputError, match="whole sequences"), AttentionRows(model, real[:, 1:]):
        model(**model_inputs(batch), use_cache=False)
    assert model.config.text_config._attn_implementation == before == "sdpa" and not ACTIVE_CONTEXTS
    with torch.no_grad(), AttentionRows(model, real) as outer:
        with AttentionRows(model, real, layers=[2]) as inner:
            model(**model_inputs(batch), use_cache=False)
        assert torch.equal(inner.kept[2][0], outer.kept[2][0]) and sorted(inner.kept) == [2]
        model(**model_inputs(batch), use_cache=False)
    assert model.config.text_config._attn_implementation == before and not ACTIVE_CONTEXTS
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_half_precision_and_lora():
    from aligned_mllm.models.trainable import add_lora

    model, processor = tiny("llava")
    batch = mixed(processor)
    real = batch["attention_mask"].bool()
    with torch.no_grad(), AttentionRows(model, real) as rows:
        model(**model_inputs(batch), use_cache=False)
    wrapped = add_lora(model, rank=2, dropout=0.0).eval()  # starts as the model itself
    with torch.no_grad(), AttentionRows(wrapped, real) as same:
        wrapped(**model_inputs(batch), use_cache=False)
    assert torch.allclose(same.kept[3][0], rows.kept[3][0], atol=1e-6)
    half = tiny("llava")[0].to(torch.bfloat16)
    inputs = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in model_inputs(batch).items()
    }
    with torch.no_grad(), AttentionRows(half, real) as coarse:
        half(**inputs, use_cache=False)
    assert coarse.kept[3][0].dtype == torch.float32 and torch.allclose(
        coarse.kept[3][0], rows.kept[3][0], atol=0.02
    )


@pytest.mark.parametrize("family", ["llava_next", "idefics3", "qwen2_5_vl"])
def test_views_belong_to_their_samples_and_rows_are_before_the_answers(family):
    _, processor = tiny(family)
    batch = mixed(processor)
    batch = {
        **batch,
        **{name: batch[name][:2] for name in ("input_ids", "labels", "visual_mask", "attention_mask")},
    }
    views = views_of_samples(batch)
    assert torch.cat(views).tolist() == list(range(len(batch["grids"])))
    assert [int(batch["grids"][each].prod(1).sum()) for each in views] == batch["visual_mask"].sum(1).tolist()
    answer, first, question = (query_mask(batch, which) for which in ("answer", "first", "question"))
    assert (
        torch.equal(answer[:, :-1], batch["labels"][:, 1:] != -100)
        and first.sum(1).tolist() == [2, 2]
        and (first & ~answer).sum() == 0
    )
    words = processor.tokenizer.decode(batch["input_ids"][0][question[0]])
    assert (
        "what is above" in words
        and "two red towers" not in words
        and not (question & batch["visual_mask"]).any()
    )


def test_a_token_lies_over_the_picture_where_its_box_says():
    picture = photo(0, (120, 80))
    weights = torch.zeros(4 + 4)
    weights[4 + 3] = 1.0  # last token of the second view, the right half
    boxes = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])
    figure = attention_figure(picture, weights, torch.tensor([[2, 2], [2, 2]]), boxes)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert (
        len(maps) == 2
        and list(maps[1].x) == [60, 90, 120]
        and list(maps[1].y) == [0, 40, 80]
        and maps[1].z[1][1] == 1.0
    )
    (shown,) = [trace for trace in figure.data if trace.type == "image"]
    assert (shown.z[0, 0] == picture.getpixel((0, 0))).all() and shown.x0 == 0.5
    with pytest.raises(InputError, match="a box for each view"):
        attention_figure(picture, weights, torch.tensor([[2, 2], [2, 2]]))


@pytest.mark.parametrize("side", ["right", "left"])
def test_evenly_spread_attention_is_one_share_for_each_key_that_may_be_seen(side):
    "Under a window too: the number of visual keys among those that the model's own weights do not hide."
    model, processor = CASES["Gemma 3, window of 20 in two of three layers"]()
    batch = mixed(processor, side)
    real = batch["attention_mask"].bool()
    with torch.no_grad(), AttentionRows(model, real, batch["visual_mask"], even=True) as spread:
        model(**model_inputs(batch), use_cache=False)
    shares = []
    for layer, weights in enumerate(eager_weights(model, batch), start=1):
        for sample, (kept, full) in enumerate(zip(spread.kept[layer], weights)):
            seen = full[0, real[sample]] > 0
            wanted = (seen & batch["visual_mask"][sample]).sum(1) / seen.sum(1)
            assert (kept.sum(-1) - wanted).abs().max() < 1e-5
            shares.append(float(wanted[-1]))
    assert len({round(share, 4) for share in shares}) > 1  # the window makes a difference
