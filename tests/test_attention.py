"Attention rows against transformers' eager weights, for every family, without changing what the model computes."

import pytest
import torch
from family_checks import SIZES, mixed, photo
from tiny_models import FAMILIES, tiny

from aligned_mllm.analysis.attention import AttentionRows, language_model_of
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
