"Captions token by token: the classes by hand, the three ways, and the held-out parts of a data folder."

import json
from dataclasses import asdict

import pandas as pd
import pytest
import torch

from aligned_mllm.core import InputError, data_folder
from aligned_mllm.data.collate import Collator, model_inputs
from aligned_mllm.data.encode import IGNORED, encode
from aligned_mllm.data.record import Record, Turn
from aligned_mllm.data.records import Records
from aligned_mllm.evals.caption_tokens import (
    ask_captions,
    caption_gains,
    caption_units,
    class_spans,
    token_classes,
    with_other_pictures,
)
from aligned_mllm.models.compose import composed_model
from aligned_mllm.training.tiny_parts import tiny_part
from aligned_mllm.worlds.cutouts import draw_cutouts, plural_of, read_cutouts
from aligned_mllm.worlds.photographs import (
    CaptionTests,
    PhotographSizes,
    photograph_config,
    write_photographs,
)
from aligned_mllm.worlds.scene_data import Sizes, write_scenes
from aligned_mllm.worlds.small_models import embedded_model

SIZES = CaptionTests(8, 30, 0, 6, 0, test_captions=9, unseen_captions=5)
SHAPES = ["circle", "square", "triangle", "cross"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return read_cutouts(draw_cutouts(tmp_path_factory.mktemp("drawn")))


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("data") / "photographs", source, 3, SIZES)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Records:
    sizes = Sizes(train=2, captions=7, validation=2, test=2)
    data = write_scenes(tmp_path_factory.mktemp("scenes") / "data", seed=3, sizes=sizes)
    return Records(data / "captions.jsonl", data)


def test_spans_are_whole_words_the_longest_first():
    text = "Top hats at the top right; a hatter, the left-hand Top Hat (hat)"
    names = ["hat", "top hat", "top hats"]
    found = [(text[begin:end], kind) for begin, end, kind in class_spans(text, names)]
    assert found == [
        ("Top hats", "name"),
        ("top", "place"),
        ("right", "place"),
        ("left", "place"),
        ("Top Hat", "name"),
        ("hat", "name"),
    ]
    assert class_spans("a (c++) lamp", ["c++"]) == [(3, 6, "name")]
    assert class_spans("bright stopping", []) == []


def test_every_token_has_the_class_of_the_span_in_which_it_ends(folder, tmp_path):
    "A byte-level tokenizer with merges: the pieces of each class spell its words, by hand."
    sentences = ["an elephant at the top left, a saw at the bottom right", "the trumpet"]
    path = tiny_part("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path, sentences)
    vision = tiny_part("openai/clip-vit-base-patch16", tmp_path, sentences)
    _, processor = composed_model(str(vision), str(path), "own", False, 0, torch.float32)
    turns = (Turn("<image>\na saw?", "an elephant at the top left, two left saws"), Turn("and?", "a trumpet"))
    record = Record("1", ("a.jpg",), turns)
    ids, kinds = token_classes(record, ["elephant", "saws", "trumpet"], processor)
    spelt = {"name": [], "place": [], "rest": []}
    for token, kind in zip(ids.tolist(), kinds):
        spelt[kind].append(processor.tokenizer.decode([token]))
    assert "".join(spelt["name"]).split() == ["elephant", "saws", "trumpet"]
    assert "".join(spelt["place"]).split() == ["top", "left", "left"]
    assert "".join(spelt["rest"]).split() == "an at the, two<|im_end|>a<|im_end|>".split()
    picture = Records(folder / "captions.jsonl").image("images/captions-00000.jpg")
    sample = encode(record, [picture], processor)
    assert torch.equal(sample["labels"][sample["labels"] != IGNORED], ids)
    learnt, _ = token_classes(Record("1", ("a.jpg",), turns, prompt_turns=1), ["trumpet"], processor)
    assert processor.tokenizer.decode(learnt) == "a trumpet<|im_end|>"


def by_hand(model, processor, record: Record, images: list) -> tuple[list[float], list[bool]]:
    "Loss and hit of every learnt token of one record, asked alone."
    sample = encode(record, images, processor)
    with torch.no_grad():
        logits = model(**model_inputs(Collator(0)([sample]))).logits[0]
    places = (sample["labels"] != IGNORED).nonzero()[:, 0]
    truth = sample["labels"][places]
    chances = logits[places - 1].log_softmax(-1)
    return (-chances[range(len(truth)), truth]).tolist(), (chances.argmax(-1) == truth).tolist()


def test_three_ways_are_those_of_single_records(scenes):
    "The right picture, the next one's, and the conversation without: batched and padded as alone."
    model, processor = embedded_model(data_folder() / "parts")
    table = ask_captions(model, processor, scenes, SHAPES, batch_size=3)
    every = [scenes[index] for index in range(len(scenes))]
    seen = {"picture": [each.images for each in every], "no picture": [()] * len(every)}
    seen["other picture"] = [each.images for each in [*every[1:], every[0]]]
    assert [each.images for each in with_other_pictures(every)] == seen["other picture"]
    losses = {}
    for way, images in seen.items():
        for number, (record, names) in enumerate(zip(every, images)):
            found, hits = by_hand(model, processor, record, [scenes.image(name) for name in names])
            words = f"{record.turns[0].answer} END".split()  # one word, one token
            rows = table[(table.record == number) & (table.way == way)].set_index("kind")
            for kind in ("name", "rest"):
                mine = [place for place, word in enumerate(words) if (word in SHAPES) == (kind == "name")]
                assert rows.tokens[kind] == len(mine)
                assert rows.correct[kind] == sum(hits[place] for place in mine)
                assert abs(rows.loss[kind] - sum(found[place] for place in mine)) < 1e-3
        losses[way] = table.loss[table.way == way].sum()
    assert len({round(loss, 3) for loss in losses.values()}) == 3


def test_names_by_image_count_in_their_own_image_only(scenes):
    model, processor = embedded_model(data_folder() / "parts")
    names = {scenes[index].images[0]: SHAPES if index else [] for index in range(len(scenes))}
    table = ask_captions(model, processor, scenes, names, ["no picture"])
    assert {*table.kind[table.record == 0]} == {"rest"} and {*table.kind[table.record == 1]} == {
        "name",
        "rest",
    }
    del names[scenes[2].images[0]]
    for bad, said in ((names, "no names for the image"), (["elephant"], "without one of the names")):
        with pytest.raises(InputError, match=said):
            ask_captions(model, processor, scenes, bad)
    with pytest.raises(InputError, match="ways"):
        ask_captions(model, processor, scenes, SHAPES, ["blind"])


@pytest.mark.parametrize(
    "image, answer, way, said",
    [
        (
            "<image>",
            "{% if seen %}red {% endif %}{{ text }}",
            "picture",
            "other answer tokens with its picture",
        ),
        ("", "{{ text | upper }}", "no picture", "writes its answer differently"),
    ],
)
def test_a_template_that_changes_answers_is_refused(scenes, image, answer, way, said):
    model, processor = embedded_model(data_folder() / "parts")
    processor.chat_template = (
        "{% set seen = messages[0]['content'] | length > 1 %}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}"
        f"{image}"
        "{% else %} {{ part['text'] }} {% endif %}{% endfor %}"
        "{% else %}{% set text = message['content'][0]['text'] %}"
        f"{answer} <eos>"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(InputError, match=said):
        ask_captions(model, processor, scenes, SHAPES, [way])


def test_units_are_pictures_and_with_two_seeds_seeds():
    rows = [("a", "picture", "name", 2, 4.0, 1), ("a", "picture", "rest", 2, 0.0, 2)]
    rows += [("b", "picture", "name", 1, 1.0, 1), ("b", "picture", "name", 3, 1.0, 0)]
    table = pd.DataFrame(rows, columns=["image", "way", "kind", "tokens", "loss", "correct"])
    units = caption_units(table).set_index(["kind", "unit"])
    assert units.loss.to_dict() == {
        ("name", "a"): 2.0,
        ("name", "b"): 0.5,
        ("rest", "a"): 0.0,
        ("all", "a"): 1.0,
        ("all", "b"): 0.5,
    }
    assert units.accuracy["name", "b"] == 0.25 and units.accuracy["all", "a"] == 0.75
    arms = pd.concat([table.assign(arm="x"), table.assign(arm="y", correct=table.tokens)])
    gains = caption_gains(caption_units(arms), "y", "x").set_index("kind")
    assert gains["mean"]["name"] == 0.625 and gains.units["name"] == 2 and gains.units["rest"] == 1
    seeds = pd.concat([arms.assign(seed=0), arms.assign(seed=1, correct=0)])
    units = caption_units(seeds)
    assert {*units.unit} == {0, 1} and {*units.accuracy[(units.arm == "x") & (units.unit == 1)]} == {0}
    assert units.accuracy[(units.arm == "x") & (units.unit == 0) & (units.kind == "name")].tolist() == [0.375]
    with pytest.raises(InputError, match="no picture or seed"):
        caption_gains(units, "y", "z")


def test_held_out_captions_have_their_own_names_and_compositions(folder, source):
    lines = {
        part: [json.loads(line) for line in (folder / f"{part}.geometry.jsonl").read_text().splitlines()]
        for part in ("captions", "test_captions", "unseen_captions")
    }
    names = {
        part: {item["name"] for line in each for item in line["objects"]} for part, each in lines.items()
    }
    config = json.loads((folder / "photographs.json").read_text())
    assert names["captions"] | names["test_captions"] <= set(config["names"])
    assert names["unseen_captions"] <= set(config["unseen_names"]) and config["unseen_names"]
    composed = {
        part: {
            tuple(sorted((item["name"], item["row"], item["column"]) for item in line["objects"]))
            for line in each
        }
        for part, each in lines.items()
    }
    assert not composed["captions"] & composed["test_captions"]
    for part, count in (("test_captions", 9), ("unseen_captions", 5)):
        records = Records(folder / f"{part}.jsonl", folder)
        assert len(records) == count == len({record.id for record in records})
        for record, line in zip(records, lines[part]):
            assert record.images == (line["image"],) and len(record.turns) == 1
            forms = {form for item in line["objects"] for form in (item["name"], plural_of(item["name"]))}
            assert any(kind == "name" for _, _, kind in class_spans(record.turns[0].answer, forms))
            assert record.turns[0].category == "caption"


def test_a_folder_without_held_out_captions_stays_what_it_was(source, tmp_path):
    "Sizes of 0 add no file, and other parts have the same content with and without the new ones."
    plain = write_photographs(tmp_path / "plain", source, 3, PhotographSizes(8, 30, 0, 6, 5))
    more = write_photographs(tmp_path / "more", source, 3, CaptionTests(8, 30, 0, 6, 5, test_captions=9))
    assert "test_captions" not in photograph_config(3, source, PhotographSizes())["sizes"]
    for path in plain.rglob("*.*"):
        if path.name != "photographs.json":
            assert path.read_bytes() == (more / path.relative_to(plain)).read_bytes()
    assert {path.name for path in more.glob("*.jsonl")} - {path.name for path in plain.glob("*.jsonl")} == {
        "test_captions.jsonl",
        "test_captions.geometry.jsonl",
    }
    assert asdict(CaptionTests())["unseen_captions"] == 0
