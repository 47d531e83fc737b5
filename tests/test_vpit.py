"""VPiT's loss against a plain reading of the paper, image tokens in models with tied and untied embeddings,
records with pictures in their answers, a run from settings to an exported model that makes pictures."""

import json

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import GenerationConfig

from aligned_mllm.core import InputError, data_folder, load_json
from aligned_mllm.data.collate import Collator, Samples, truncate
from aligned_mllm.data.encode import IGNORED, encode
from aligned_mllm.data.forms import parse_record, record_to_json
from aligned_mllm.data.record import IMAGE, IMAGE_ENDS, Record, Turn
from aligned_mllm.data.records import Records
from aligned_mllm.models.generation import MixedGenerator
from aligned_mllm.models.image_tokens import add_image_tokens, picture_tokens, tokens_of_pixels
from aligned_mllm.models.load import load_model
from aligned_mllm.objectives.base import Context
from aligned_mllm.objectives.text import TextLoss
from aligned_mllm.objectives.vpit import Vpit, VpitLoss
from aligned_mllm.training.checkpoint import exported_objectives
from aligned_mllm.training.model import AlignedModel, with_targets
from aligned_mllm.training.run import run
from aligned_mllm.worlds.scenes import draw, sample_scene
from aligned_mllm.worlds.small_models import embedded_model
from tiny_models import tiny

ASKED = Record("0", ("0.png",), (Turn(f"{IMAGE}\nwhere circle", "top-left"),))
DRAWN = Record("1", ("1.png",), (Turn("draw red circle", f"red {IMAGE}"),))
EDITED = Record("2", ("2.png", "3.png"), (Turn(f"{IMAGE}\nblue", IMAGE), Turn("count", "2")))
PICTURES = {"0.png": 0, "1.png": 1, "2.png": 2, "3.png": 3}


def images_of(record: Record) -> list[Image.Image]:
    return [draw(sample_scene(PICTURES[name])) for name in record.images]


@pytest.fixture(scope="module")
def parts():
    model, processor = embedded_model(data_folder() / "parts")
    add_image_tokens(model, processor, 16)
    return model, processor


def batch_of(processor, *records) -> dict:
    samples = [encode(record, images_of(record), processor) for record in records]
    return Collator(processor.tokenizer.pad_token_id)(samples)


def by_hand(model, processor, head, record: Record) -> list[torch.Tensor]:
    """Minus the cosine for each visual token of the answers of one record, from the ids alone: after each
    <image_start> behind the first answer's begin come 16 tokens, and the state before each predicts it."""
    sample = encode(record, images_of(record), processor)
    ids = sample["input_ids"]
    start = processor.tokenizer.convert_tokens_to_ids(IMAGE_ENDS[0])
    with torch.no_grad():
        inputs = {"input_ids": ids[None], "pixel_values": sample["pixel_values"]}
        states = model.model(**inputs).last_hidden_state[0]
        tower = model.model.vision_tower(sample["pixel_values"], output_hidden_states=True)
        features = tower.hidden_states[model.config.vision_feature_layer][:, 1:]
        found = []
        for number, begin in enumerate((ids == start).nonzero()[:, 0].tolist()):
            if sample["labels"][begin] == IGNORED:
                continue  # a picture in a question
            grid = features[number].T.reshape(1, -1, 5, 5)
            pooled = nn.functional.interpolate(grid, size=(4, 4), mode="bilinear")[0].flatten(1).T
            for step in range(16):
                made = head(states[begin + step])
                found.append(-(made @ pooled[step]) / made.norm() / pooled[step].norm())
    return found


def test_the_loss_of_mixed_batches_is_the_mean_over_all_tokens(parts):
    "Question alone, generation, edit, and all three together: sums and counts by hand."
    model, processor = parts
    vpit = VpitLoss.build(Vpit(), Context(model, processor))
    aligned = AlignedModel(model, [TextLoss(), vpit])
    together = batch_of(processor, ASKED, DRAWN, EDITED)
    (ready,) = with_targets([together], aligned.objectives.values())
    term = aligned(ready)["terms"][1]
    every = []
    for record in (ASKED, DRAWN, EDITED):
        every += by_hand(model, processor, vpit.head, record)
    assert term.count == len(every) == 32
    torch.testing.assert_close(term.total, torch.stack(every).sum(), atol=1e-4, rtol=1e-4)
    assert vpit.targets([batch_of(processor, ASKED)]) == [None]
    (figure,) = vpit.figures().values()
    assert figure == pytest.approx((-term.total.item(), 32), rel=1e-5)


def test_a_batch_without_a_picture_to_make_is_no_nan(parts):
    model, processor = parts
    aligned = AlignedModel(model, [TextLoss(), VpitLoss.build(Vpit(), Context(model, processor))])
    (ready,) = with_targets([batch_of(processor, ASKED)], aligned.objectives.values())
    terms = aligned(ready)["terms"]
    assert terms[1].count == 0 and terms[1].total == 0
    (terms[0].total + terms[1].total).backward()
    gradients = [each.grad for each in aligned.objectives["vpit"].parameters()]
    assert all(each is not None and not each.any() for each in gradients)
    aligned.zero_grad(set_to_none=True)


def test_words_around_pictures_are_learnt_and_visual_tokens_are_not(parts):
    _, processor = parts
    sample = encode(EDITED, images_of(EDITED), processor)
    learnt = processor.tokenizer.convert_ids_to_tokens(sample["labels"][sample["labels"] != IGNORED])
    assert learnt == [*IMAGE_ENDS, "<eos>", "2", "<eos>"]
    assert sample["visual_mask"].sum() == 32 and sample["visual_answers"].sum() == 16
    assert sample["visual_answers"].nonzero().min() > sample["visual_mask"].nonzero()[15]
    assert "visual_answers" not in encode(ASKED, images_of(ASKED), processor)
    mixed = Collator(0)([sample, encode(ASKED, images_of(ASKED), processor)])
    assert mixed["visual_answers"].dtype == torch.bool and not mixed["visual_answers"][1].any()
    assert truncate(sample, len(sample["input_ids"]) - 1, EDITED)["visual_answers"].shape == (
        len(sample["input_ids"]) - 1,
    )


def test_a_placeholder_in_an_answer_is_a_picture_or_a_word():
    def raw(images, question, answer):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": "1", "image": images, "conversations": turns}

    drawn = parse_record(raw("a.png", "draw", "here <image>"))
    assert drawn.answer_images == 1 and parse_record(record_to_json(drawn)) == drawn
    repairs = []
    word = parse_record(raw("a.png", "<image>\nwhat", "an <image>"), repairs=repairs)
    assert word.answer_images == 0 and repairs == ["literal_image"] and "<image >" in word.turns[0].answer
    with pytest.raises(InputError, match="2 placeholders <image> for 3 images; turn 2, an answer"):
        parse_record(raw(["a.png", "b.png", "c.png"], "<image>\nwhat", "an <image>"))


@pytest.mark.parametrize("tied", [True, False])
def test_new_words_have_the_mean_of_all_rows(tied):
    from transformers import AutoModelForImageTextToText

    model, processor = tiny("llava")
    config = model.config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    model = AutoModelForImageTextToText.from_config(config)
    before = {name: layer.weight.detach().clone() for name, layer in layers_of(model).items()}
    known = len(processor.tokenizer)
    add_image_tokens(model, processor, 4)
    assert len(processor.tokenizer) == known + 2
    for name, layer in layers_of(model).items():
        new = layer.weight[known : known + 2]
        torch.testing.assert_close(new, before[name][:known].mean(0).expand(2, -1))
        torch.testing.assert_close(layer.weight[:known], before[name][:known])
    ends = layers_of(model)
    assert (ends["input"].weight is ends["output"].weight) == tied
    add_image_tokens(model, processor, 4)  # a second call changes nothing
    assert len(processor.tokenizer) == known + 2


def layers_of(model) -> dict:
    return {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}


def test_saved_and_loaded_the_tokens_are_the_same(parts, tmp_path):
    "And a picture is read from them as before; a plain transformers model is refused."
    from aligned_mllm.models.load import mark_changed
    from transformers import AutoModelForImageTextToText

    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    mark_changed(tmp_path)
    again, other = load_model(tmp_path)
    batch, same = (batch_of(each, DRAWN, ASKED) for each in (processor, other))
    assert torch.equal(batch["input_ids"], same["input_ids"])
    chosen = ("input_ids", "attention_mask", "pixel_values")
    with torch.no_grad():
        logits = [each(**{name: batch[name] for name in chosen}).logits for each in (model, again)]
    torch.testing.assert_close(*logits)
    torch.testing.assert_close(*(tokens_of_pixels(each, batch["pixel_values"]) for each in (model, again)))
    with pytest.raises(ValueError, match="aligned_llava"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_upsampled_tokens_and_single_ones_pass_the_projector(parts):
    "64 tokens from 5 x 5 patches; a single token, made by the model, is not taken for a picture."
    model, processor = embedded_model(data_folder() / "parts")
    add_image_tokens(model, processor, 64)
    tokens = tokens_of_pixels(model, batch_of(processor, ASKED)["pixel_values"])
    assert tokens.shape == (1, 64, 64)
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        whole = projector.linear_2(projector.act(projector.linear_1(tokens)))
        torch.testing.assert_close(projector(tokens[:, 5:6]), whole[:, 5:6])
    features = torch.randn(1, 25, 8, dtype=torch.bfloat16)
    assert picture_tokens(features, 4).dtype == torch.bfloat16


def trained(data, folder, count: int, **settings) -> tuple:
    "The embedded model, and the folder of a run that starts from it: so many pictures of one question."
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()[:count]]
    turns = [{"from": "human", "value": "red circle"}, {"from": "gpt", "value": "<image>"}]
    rows = [
        {"id": str(number), "image": line["image"], "conversations": turns}
        for number, line in enumerate(lines)
    ]
    (data / "drawn.json").write_text(json.dumps(rows))
    model, processor = embedded_model(data_folder() / "parts")
    model.save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    common = {"model": str(folder / "start"), "records": "drawn.json", "image_tokens": 16}
    common |= {"vpit.weight": 1.0, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    return model, run("", data, folder / "run", {**common, **settings, "use_cpu": True, "disable_tqdm": True})


def test_a_run_leaves_a_model_that_makes_pictures(small_data, tmp_path):
    "From settings: stage 2 with pictures in answers; loaded again, head included, it says <image_start>."
    _, folder = trained(small_data, tmp_path, 24, max_steps=24, save_steps=12, logging_steps=4)
    curves = pd.read_csv(folder / "curves.csv").pivot(index="step", columns="name", values="value")
    assert curves.loss_vpit.iloc[-1] < curves.loss_vpit.iloc[0] - 0.3
    torch.testing.assert_close(-curves.loss_vpit.iloc[-1], curves["vpit.cosine"].iloc[-1], atol=1e-3, rtol=0)
    loaded, processor = load_model(folder / "model")
    (vpit,) = exported_objectives(folder / "model", Context(loaded, processor))
    assert list(load_json(folder / "model" / "objectives.json")) == ["vpit"]
    generate = MixedGenerator(loaded, vpit.head, processor)
    prompt = Record("0", (), (Turn("red circle", ""),))
    (answer,) = generate([(prompt, [])], GenerationConfig(max_new_tokens=30))
    assert answer.text == IMAGE and not answer.cut
    records = Records(small_data / "drawn.json", small_data)
    pixels = Samples(records, processor)[0]["pixel_values"]
    cosine = (answer.pictures[0].tokens * tokens_of_pixels(loaded, pixels)[0]).sum(-1).mean()
    assert cosine > 0.3


def test_with_lora_the_new_words_train_as_well(small_data, tmp_path):
    "Their rows alone, in and out; the adapter's folder holds them beside a base model without these words."
    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 2, "lora_rank": 4}
    model, folder = trained(small_data, tmp_path, 8, **settings)
    merged, _ = load_model(folder / "model")
    adapted, _ = load_model(folder / "adapter")
    words = merged.config.aligned_image_words
    for name, layer in layers_of(merged).items():
        assert torch.equal(layer.weight, layers_of(adapted)[name].weight)
        before = layers_of(model)[name].weight
        assert torch.equal(layer.weight[: words[0]], before)
        assert (layer.weight[words] - before.mean(0)).abs().max() > 1e-3


def test_what_cannot_be_is_refused(small_data, tmp_path):
    model, processor = embedded_model(data_folder() / "parts")
    with pytest.raises(InputError, match="25 visual tokens for pictures of 40 pixels|one of"):
        add_image_tokens(model, processor, 9)
    with pytest.raises(InputError, match="an image in an answer, for a model without <image_start>"):
        encode(DRAWN, images_of(DRAWN), processor)
    with pytest.raises(InputError, match="vpit for a model without image tokens"):
        VpitLoss.build(Vpit(), Context(model, processor))
    with pytest.raises(InputError, match="in stage 1"):
        settings = {"model": "embedded", "image_tokens": 16, "stage": 1, "vpit.weight": 1.0, "use_cpu": True}
        run("", small_data, tmp_path / "run", settings)
