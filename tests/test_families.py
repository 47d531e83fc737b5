"""Every family of models, as tiny random ones of transformers' own classes: layout of the visual tokens,
labels, training, padding, LoRA."""

import copy
import json

import family_checks
import numpy as np
import pytest
import torch
from family_checks import CHECKS, SIZES, answers_hidden, mixed, photo, places, record, sample
from PIL import Image
from tiny_models import FAMILIES, tiny
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available

from aligned_mllm.core import InputError
from aligned_mllm.data.collate import Collator, model_inputs
from aligned_mllm.data.encode import IGNORED, encode
from aligned_mllm.data.record import Record, Turn
from aligned_mllm.data.views import LAYOUTS, layout_of, shown_box
from aligned_mllm.models.load import load_model
from aligned_mllm.models.taps import Taps


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", CHECKS)
def test_family(family, check):
    CHECKS[check](family)


def test_every_layout_has_a_family():
    found = {
        next(kind.__name__ for kind in type(tiny(family)[1]).__mro__ if kind.__name__ in LAYOUTS)
        for family in FAMILIES
    }
    assert found | {"SmolVLMProcessor"} == set(LAYOUTS)


def test_smolvlm_with_its_own_processor():
    pytest.importorskip("num2words")
    processor = tiny("smolvlm")[1]
    assert type(processor).__name__ == "SmolVLMProcessor"
    other = tiny("idefics3")[1]
    one, two = (sample(each, [photo(0, SIZES[0]), photo(1, SIZES[1])]) for each in (processor, other))
    assert all(torch.equal(one[name], two[name]) for name in one if torch.is_tensor(one[name]))


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl", "idefics3", "gemma3"])
def test_wrong_places_are_detected(family):
    with pytest.raises(AssertionError):
        places(family, mirrored=True)


def test_a_visible_answer_is_detected(monkeypatch):
    """PaliGemma's own processor treats the whole text as prompt, so that earlier positions attend to the
    answer."""
    monkeypatch.setattr(
        family_checks,
        "encode",
        lambda *arguments: encode(*arguments) | {"token_type_ids": 0 * encode(*arguments)["input_ids"]},
    )
    with pytest.raises(AssertionError):
        answers_hidden("paligemma")


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (97, 61), (40, 40), (33, 250)])
@pytest.mark.parametrize("family", ["llava", "llava_padded", "paligemma"])
def test_boxes_are_what_the_processor_shows(family, size):
    """A picture whose colours are its coordinates goes through the processor, and is read back at the
    middles of four patches."""
    processor = tiny(family)[1]
    wide, high = size
    ramp = np.zeros((high, wide, 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(20, 220, wide)[None]
    ramp[..., 1] = np.linspace(20, 220, high)[:, None]
    seen = processor.image_processor(
        Image.fromarray(ramp), return_tensors="pt", do_normalize=False, do_rescale=False
    )["pixel_values"][0].float()
    left, top, right, bottom = shown_box(
        processor.image_processor, high, wide, square=family == "llava_padded"
    )
    for y, x in ((14, 14), (14, 26), (26, 14), (26, 26)):
        across = left + (right - left) * x / 40
        down = top + (bottom - top) * y / 40
        if not (0.05 < across < 0.95 and 0.05 < down < 0.95):
            continue
        red, green = seen[:2, y - 1 : y + 1, x - 1 : x + 1].mean((1, 2)).tolist()
        assert abs((red - 20) / 200 - across) < 0.02 and abs((green - 20) / 200 - down) < 0.02


def test_paligemma_is_encoded_as_its_processor_encodes_prefix_and_suffix():
    processor = tiny("paligemma")[1]
    pictures = [photo(0, SIZES[0]), photo(1, SIZES[1])]
    said = Record("", ("a", "b"), (Turn("<image><image>what is above", "two red towers", ""),), "")
    ours = encode(said, pictures, processor)
    theirs = processor(
        text="<image><image>what is above", suffix="two red towers", images=pictures, return_tensors="pt"
    )
    for name in ("input_ids", "token_type_ids", "labels", "pixel_values"):
        assert torch.equal(ours[name], theirs[name][0] if name != "pixel_values" else theirs[name]), name
    prompt = encode(said, pictures, processor, with_last_answer=False)
    asked = processor(text="<image><image>what is above", images=pictures, return_tensors="pt")
    assert torch.equal(prompt["input_ids"], asked["input_ids"][0]) and not prompt["token_type_ids"].any()


def test_pictures_between_words_and_turns():
    """Pictures in the middle of a question and in a later turn: labels and layout hold for every family
    whose template keeps the order."""
    turns = (
        Turn("what <image> is above <image> the circle", "two red towers", ""),
        Turn("<image> where", "left", ""),
    )
    pictures = [photo(seed, size) for seed, size in enumerate(SIZES)]
    for family in FAMILIES:
        processor = tiny(family)[1]
        made = encode(Record("", ("a", "b", "c"), turns, ""), pictures, processor)
        learned = processor.tokenizer.decode(
            made["labels"][made["labels"] != IGNORED], skip_special_tokens=True
        )
        assert learned.replace(" ", "") == "tworedtowersleft", (family, learned)
        assert made["visual_mask"].sum() == made["grids"].prod(1).sum()
        assert set(made["view_of"].tolist()) == {
            0,
            1,
            2,
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family, tmp_path):
    model, processor = tiny(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    if (
        type(processor).__mro__[1].__name__ in LAYOUTS and not is_torchvision_available()
    ):  # the subclass that replaces a missing video processor
        with pytest.raises(InputError, match="torchvision"):
            load_model(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        other = put_together(processor, tmp_path)
    else:
        again, other = load_model(tmp_path)
        assert type(other) is type(processor)
        assert type(getattr(other, "video_processor", None)) is type(
            getattr(processor, "video_processor", None)
        )
    one = mixed(processor)
    two = mixed(other)
    for name, value in one.items():
        if torch.is_tensor(value) and not (name == "pixel_values" and is_torchvision_available()):
            assert torch.equal(value, two[name]), name
    steps = (
        255
        * (one["pixel_values"] - two["pixel_values"])
        * torch.tensor(processor.image_processor.image_std).max()
    )
    assert steps.abs().max() <= (
        2.5 if is_torchvision_available() else 0
    )  # torchvision rounds otherwise when it resizes: by two of 255 steps at most
    with torch.no_grad():
        assert torch.allclose(model(**model_inputs(one)).logits, again(**model_inputs(one)).logits, atol=1e-5)


def put_together(processor, folder):
    """A processor of what transformers reads from a folder without torchvision: image processor,
    tokenizer, chat template and settings; the video part stays."""
    settings = json.loads((folder / "processor_config.json").read_text())
    assert {
        key: getattr(processor, key)
        for key in settings
        if hasattr(processor, key) and not isinstance(settings[key], dict)
    }.items() <= settings.items()
    other = copy.copy(processor)
    other.image_processor = AutoImageProcessor.from_pretrained(folder)
    other.tokenizer = AutoTokenizer.from_pretrained(folder)
    other.chat_template = (folder / "chat_template.jinja").read_text()
    assert type(other.image_processor) is type(processor.image_processor)
    assert settings["processor_class"] == type(processor).__name__
    return other


@pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "check", ["visual positions", "places in the image", "several images", "labels", "greedy answers"]
)
def test_torchvision_image_processors(family, check, tmp_path, monkeypatch):
    """Where torchvision is installed, transformers loads image processors that use it: the layout is
    right for them, too."""
    tiny(family)[1].save_pretrained(tmp_path)
    fast = AutoProcessor.from_pretrained(tmp_path)
    assert not type(fast.image_processor).__name__.endswith("Pil")
    monkeypatch.setattr(family_checks, "tiny", lambda name: (tiny(name)[0], fast))
    CHECKS[check](family)


def test_taps_are_transformers_own_hidden_states():
    "Also where Qwen3-VL adds features of its vision tower behind the first blocks."
    for family in ("qwen3_vl", "gemma3"):
        model, processor = tiny(family)
        with torch.no_grad(), Taps(model, [0, 1, 2, 3]) as taps:
            states = model(**model_inputs(mixed(processor)), output_hidden_states=True).hidden_states
        assert all(torch.equal(taps.states(layer), states[layer]) for layer in (0, 1, 2))
        assert torch.allclose(model.get_decoder().norm(taps.states(3)), states[3], atol=1e-5)


def test_a_sample_that_cannot_be_encoded_is_refused():
    class MllamaProcessor: ...

    for processor, words in ((MllamaProcessor(), "cross-attention"), (object(), "it is not known")):
        with pytest.raises(InputError, match=words):
            layout_of(processor)
    processor = tiny("gemma3")[1]
    processor.chat_template = None
    with pytest.raises(InputError, match="chat template"):
        encode(record(1), [photo(0, SIZES[0])], processor)
    processor = tiny("internvl")[1]
    with pytest.raises(InputError, match="image tokens"):
        encode(record(2), [photo(0, SIZES[0])], processor)
    processor = tiny("idefics3")[1]
    processor.image_processor.size = {"longest_edge": 80}
    with pytest.raises(InputError, match="multiple of 32"):
        encode(record(1), [photo(0, SIZES[0])], processor)
    processor = tiny("gemma3")[1]
    processor.full_image_sequence = processor.full_image_sequence.replace(
        processor.tokenizer.image_token, "", 1
    )
    with pytest.raises(InputError, match="15 placeholders"):
        encode(record(1), [photo(0, SIZES[0])], processor)


def test_views_count_the_pictures_of_the_batch():
    processor = tiny("internvl")[1]
    samples = [
        sample(processor, [photo(0, SIZES[0])]),
        sample(processor, []),
        sample(processor, [photo(1, SIZES[1]), photo(2, SIZES[2])]),
    ]
    batch = Collator(processor.tokenizer.pad_token_id)(samples)
    assert batch["view_of"].tolist() == [
        *samples[0]["view_of"].tolist(),
        *(samples[2]["view_of"] + 1).tolist(),
    ]
    assert len(batch["grids"]) == len(batch["boxes"]) == len(batch["view_of"])
    assert batch["boxes"].dtype == torch.float32
    assert not {"grids", "boxes", "view_of", "labels", "visual_mask", "image_names"} & set(
        model_inputs(batch)
    )
