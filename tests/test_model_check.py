"""`aligned-mllm check`: all checks hold for each known family, and a broken model is found out."""

import pytest
from tiny_models import FAMILIES, tiny

from aligned_mllm.analysis.checkpoints import LoadedModel
from aligned_mllm.analysis.model_check import CHECKS, model_check
from aligned_mllm.cli import main


@pytest.mark.parametrize("family", FAMILIES)
def test_all_checks_hold(family):
    found = model_check(LoadedModel(family, *tiny(family)))
    assert found.holds.all(), found.measured.to_dict()
    assert list(found.index) == list(CHECKS)


def failing(model, processor) -> dict[str, str]:
    found = model_check(LoadedModel("broken", model, processor))
    return found[~found.holds.astype(bool)].measured.to_dict()


def test_attention_that_ignores_its_mask_is_found():
    "Its rows still sum to one; only the logits tell."

    def without_mask(forward):
        return lambda *arguments, **keywords: forward(*arguments, **{**keywords, "attention_mask": None})

    model, processor = tiny("llava")
    for block in model.model.language_model.layers:
        block.self_attn.forward = without_mask(block.self_attn.forward)
    assert "logits ignore a mask" in failing(model, processor)["attention"]


def test_a_wrong_image_token_is_found():
    model, processor = tiny("llava")
    model.config.image_token_id = 7
    assert "visual positions" in failing(model, processor)


def test_swapped_visual_tokens_are_found():
    model, processor = tiny("llava")

    def turned(module, arguments, output):
        return output.flip(-2)

    model.model.multi_modal_projector.register_forward_hook(turned)
    assert set(failing(model, processor)) == {"places"}


def test_a_family_that_nobody_listed_gets_an_answer():
    from transformers import LlamaConfig, LlamaForCausalLM

    text = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    _, processor = tiny("llava")
    found = failing(LlamaForCausalLM(text), processor)
    assert {"visual positions", "parts"} <= set(found)
    assert all("\n" not in reason for reason in found.values())


def test_the_command(tmp_path, capsys):
    model, processor = tiny("llava")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    assert main(["check", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out.count("holds") == len(CHECKS)
    assert main(["check", str(tmp_path / "nowhere")]) == 2
