"""The papers' recipes: every value has a source, the estimate is right, and both stages run with tiny
parts of the same classes."""

import os
import socket
from itertools import groupby

import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny
from transformers import AutoProcessor

from aligned_mllm.core import InputError, load_json
from aligned_mllm.data.encode import IGNORED, encode, messages_of
from aligned_mllm.data.forms import parse_record
from aligned_mllm.data.records import Records
from aligned_mllm.training.estimate import summarize_records
from aligned_mllm.models.compose import CHATS, composed_model, in_form
from aligned_mllm.models.load import load_model
from aligned_mllm.training.papers.viral import ROWS, paper_recipe, paper_recipe_names, sources_of, stage1_of
from aligned_mllm.training.dry_run import dry_run
from aligned_mllm.training.smoke_test import tiny_data, tiny_settings
from aligned_mllm.training.config import configured
from aligned_mllm.training.published import PUBLISHED
from aligned_mllm.train import main
from aligned_mllm.training.run import smoke_test

FEW = {"use_cpu": True, "max_steps": 2}
ALL_ROWS = bool(os.environ.get("ALL_ROWS"))  # every row, in two minutes; otherwise those that differ in kind
FORECAST = (
    "viral_stage1_vicuna7b_clip",
    "viral_stage1_vicuna7b_siglip2",
    "viral_table2_radio",
    "viral_table2_depth_anything",
    "viral_table5_layers14to18",
)
REHEARSED = (
    "table4_a_plain",
    "table4_c_encoder",
    "table1_vicuna7b_siglip2_viral",
    "table1_qwen7b_clip_viral",
    "table2_sam",
    "table4_b_residual_post",
    "table4_d_residual_pre",
    "table4_e_projected",
    "table5_relation",
    "table5_layers14to18",
)


def estimate_of(name, **settings) -> dict:
    return dry_run(name, configured(name, "", "", {"use_cpu": True, **settings}), settings)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory):
    "Data and the parts of two pairs of models."
    folder = tmp_path_factory.mktemp("tiny")
    data = tiny_data(folder / "data")
    return data, {
        name: tiny_settings(paper_recipe(f"viral_stage1_{name}"), data, folder / name)
        for name in ("vicuna7b_clip", "qwen7b_clip")
    }


@pytest.mark.parametrize("name", paper_recipe_names())
def test_every_row_resolves_and_says_where_it_stands(name):
    config = configured(name, "DATA", "RUN", {"use_cpu": True})
    assert set(sources_of(name)) == set(paper_recipe(name)) and all(
        len(place) > 10 for place in sources_of(name).values()
    )
    assert config.stage == 1 or paper_recipe(stage1_of(name))["language_model"] == config.language_model
    assert config.gradient_accumulation_steps * config.per_device_train_batch_size == config.global_batch_size


@pytest.mark.parametrize("name", paper_recipe_names() if ALL_ROWS else FORECAST)
def test_every_row_has_an_estimate(name, no_network):
    found = estimate_of(name)
    assert found["Steps"]["steps"] == (2181 if name.startswith("viral_stage1") else 5198)
    assert found["What trains"]["vision_tower"].startswith("trained 0,")
    assert ("viral" in found["What trains"]) == bool(paper_recipe(name).get("viral.weight"))
    assert found.get("Objective viral", {}).get("features", "coincide") == "coincide"
    assert set(found["Settings"]) >= set(paper_recipe(name))


def lora(width: int, keys: int, inside: int, layers: int, rank: int = 128) -> int:
    "LoRA on q, k, v, o, gate, up, down, by hand."
    return layers * rank * (2 * (width + width) + 2 * (width + keys) + 3 * (width + inside))


def head(width: int, teacher: int, hidden: int = 2048) -> int:
    return width * hidden + hidden + hidden * hidden + hidden + hidden * teacher + teacher


@pytest.mark.parametrize(
    "row, projector, trained, alignment, tokens",
    [
        ("table1_vicuna7b_clip_viral", 20_979_712, lora(4096, 4096, 11008, 32), head(4096, 768), 576),
        (
            "table1_vicuna7b_siglip2_viral",
            1152 * 4096 + 4096 + 4096 * 4096 + 4096,
            lora(4096, 4096, 11008, 32),
            head(4096, 768),
            729,
        ),
        (
            "table1_qwen7b_clip_viral",
            1024 * 3584 + 3584 + 3584 * 3584 + 3584,
            lora(3584, 512, 18944, 28),
            head(3584, 768),
            576,
        ),
        (
            "table1_vicuna13b_clip_viral",
            1024 * 5120 + 5120 + 5120 * 5120 + 5120,
            lora(5120, 5120, 13824, 40),
            head(5120, 768),
            576,
        ),
        ("table2_clip", 20_979_712, lora(4096, 4096, 11008, 32), head(4096, 1024), 576),
        ("table2_sam", 20_979_712, lora(4096, 4096, 11008, 32), head(4096, 256), 576),
        ("table4_d_residual_pre", 2 * 20_979_712, lora(4096, 4096, 11008, 32), None, 576),
        ("table4_e_projected", 20_979_712, lora(4096, 4096, 11008, 32), head(4096, 4096), 576),
    ],
)
def test_counts_are_those_made_by_hand(row, projector, trained, alignment, tokens):
    found = estimate_of(f"viral_{row}")
    assert found["What trains"]["projector"].startswith(f"trained {projector:,},")
    assert found["What trains"]["language_model"].startswith(f"trained {trained:,},")
    assert found["What trains"].get("viral") == (f"trained {alignment:,}, frozen 0" if alignment else None)
    assert found["A sample"]["visual tokens"].startswith(f"{tokens} ") and found["Steps"]["steps"] == 5198
    if row == "table1_vicuna7b_clip_viral":
        assert round(alignment / 1e6, 2) == 14.16
        assert (
            "frozen 6,738,423,808" in found["What trains"]["language_model"]
        )  # LLaMA-2-7B and one row for <image>, in embedding and head


def test_memory_follows_its_formula():
    found = estimate_of("viral_table1_vicuna7b_clip_plain")["Memory of one GPU, GiB (an estimate)"]
    trained = 20_979_712 + 319_815_680
    frozen = 303_507_456 + 20_979_712 + 6_738_423_808
    inside = 14 * 4096 + 2 * 4096 + 5 * 11008
    expected = {
        "weights": 2 * frozen + 4 * trained,
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "activations": 8 * 2048 * (2 * 32 * 4096 + 2 * inside),
        "logits": 10 * 8 * (2048 - 576) * 32001,
    }
    for name, size in expected.items():
        assert abs(found[name] - size / 2**30) < 1e-9, name
    assert abs(found["total"] - sum(expected.values()) / 2**30) < 1e-9


def test_the_command_says_it_without_touching_anything(tmp_path, monkeypatch, capsys, no_network):
    monkeypatch.chdir(tmp_path)
    assert main(["--recipe", "viral_table3_layer28", "--dry-run", "--set", "viral.weight=0.25"]) == 0
    said = capsys.readouterr().out
    assert (
        "5,198" in said
        and "[28] of 32 blocks" in said
        and "0.25  [set for this run]" in said
        and "5.2K steps" in said
    )
    assert list(tmp_path.iterdir()) == []
    assert main(["--recipe", "scenes_lora_viral", "--dry-run"]) == 0
    assert "trained 8,320" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
    assert main(["--recipe", "viral_table3_layer28", "--dry-run", "--set", "viral.layers=[33]"]) == 2
    assert main(["--recipe", "viral_table2_sam", "--dry-run", "--set", "viral.teacher=nobody/nothing"]) == 2
    assert "no configuration of 'nobody/nothing'" in capsys.readouterr().err


def test_words_are_counted_where_the_records_are(tiny_world):
    data, _ = tiny_world
    name = "viral_table1_vicuna7b_clip_plain"
    found = dry_run(name, configured(name, data, "", {"use_cpu": True}))
    said = summarize_records(data / "llava_v1_5_mix665k.json")
    assert found["Steps"]["samples"] == said["samples"] == 12 and found["Steps"]["steps"] == 1
    assert said["with_images"] == 0.75 and "75%" in found["A sample"]["with an image"]


@pytest.mark.parametrize("name, end", [("vicuna7b_clip", "</s>"), ("qwen7b_clip", "<|im_end|>")])
def test_labels_are_the_answers_and_their_ends(tiny_world, processors, name, end):
    """Token by token: learnt is what follows ASSISTANT:, up to and with `end`; by another way than the
    template's spans."""
    data, _ = tiny_world
    processor = in_form(processors[name], paper_recipe(f"viral_table1_{name}_plain")["chat"])
    tokenizer = processor.tokenizer
    for record in Records(data / "llava_v1_5_mix665k.json", data)[:4]:
        made = encode(record, [Image.open(data / image) for image in record.images], processor)
        ids = made["input_ids"].tolist()
        labels = made["labels"].tolist()
        inside = False
        expected = []
        for index, token in enumerate(ids):
            expected.append(token if inside else IGNORED)
            inside = (
                inside or tokenizer.decode(ids[: index + 1]).endswith("ASSISTANT:")
            ) and tokenizer.convert_ids_to_tokens(token) != end
        assert labels == expected
        learnt = tokenizer.decode([label for label in labels if label != IGNORED])
        assert [answer.strip() for answer in learnt.split(end)] == [
            *(turn.answer for turn in record.turns),
            "",
        ]
        assert made["visual_mask"].sum() == 16 * len(record.images)


CONVERSATIONS = (  # with blanks, with an image behind its question, without an image
    (("<image>\nWhat is above?", "Two red towers."), (" Where is it? ", " Left.")),
    (("What is it?\n<image>", "A circle"),),
    (("Say yes", "Yes"),),
)
USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
GOLDEN = {  # chat: the text of each conversation, and the pieces that are learnt, by LLaVA's rules
    "vicuna_v1": (
        (
            f"<s>{USER} USER: <image>\nWhat is above? ASSISTANT: Two red towers.</s>"
            "USER:  Where is it?  ASSISTANT:  Left.</s>",
            ["Two red towers.</s>", "Left.</s>"],
        ),
        (f"<s>{USER} USER: <image>\nWhat is it? ASSISTANT: A circle</s>", ["A circle</s>"]),
        (f"<s>{USER} USER: Say yes ASSISTANT: Yes</s>", ["Yes</s>"]),
    ),
    "qwen_2": (
        (
            f"{HUMAN} USER: <image>\nWhat is above? ASSISTANT: Two red towers.<|im_end|>"
            "USER:  Where is it?  ASSISTANT:  Left.<|im_end|>",
            ["Two red towers.<|im_end|>", "Left.<|im_end|>"],
        ),
        (f"{HUMAN} USER: <image>\nWhat is it? ASSISTANT: A circle<|im_end|>", ["A circle<|im_end|>"]),
        (f"{HUMAN} USER: Say yes ASSISTANT: Yes<|im_end|>", ["Yes<|im_end|>"]),
    ),
    "plain": (
        ("<image>Two red towers.\n", ["Two red towers.\n"]),
        ("<image>A circle\n", ["A circle\n"]),
        ("Yes\n", ["Yes\n"]),
    ),
}


@pytest.fixture(scope="module")
def processors(tiny_world):
    "The processors of two pairs of models."
    _, settings = tiny_world
    return {
        name: composed_model(parts["vision_tower"], parts["language_model"], pad_to_square=False)[1]
        for name, parts in settings.items()
    }


@pytest.mark.parametrize("name", paper_recipe_names())
def test_every_recipe_writes_the_text_of_the_papers_code(processors, name):
    "The text and the learnt pieces of three conversations, written out by hand from the released rules."
    wanted = paper_recipe(name)
    pair = "qwen7b_clip" if wanted["language_model"].startswith("Qwen") else "vicuna7b_clip"
    processor = in_form(processors[pair], wanted["chat"])
    assert wanted["chat"] == ("plain" if "stage1" in name else {"q": "qwen_2", "v": "vicuna_v1"}[pair[0]])
    for turns, (text, learnt) in zip(CONVERSATIONS, GOLDEN[wanted["chat"]]):
        turns = turns[:1] if wanted["chat"] == "plain" else turns
        said = [{"from": who, "value": said} for turn in turns for who, said in zip(("human", "gpt"), turn)]
        image = {"image": "0.png"} if "<image>" in turns[0][0] else {}
        record = parse_record({"conversations": said, **image}, "here", [])
        if wanted["chat"] == "plain" and pair[0] == "v":
            text = f"<s>{text}"
        assert processor.apply_chat_template(messages_of(record)) == text
        made = encode(record, [Image.new("RGB", (56, 56))] * len(image), processor)
        labels = made["labels"].tolist()
        pieces = [list(group) for kept, group in groupby(labels, lambda label: label != IGNORED) if kept]
        assert [processor.tokenizer.decode(piece).strip(" ") for piece in pieces] == learnt


def test_a_second_stage_takes_its_own_form_of_the_first_ones_model(tiny_world, processors, tmp_path):
    """Stage 1 is saved with captions and cropped pictures; stage 2 asks in Vicuna's form and pads. Another
    family keeps its own form, and a template that was not kept cannot be asked for again."""
    _, settings = tiny_world
    processor = in_form(processors["vicuna7b_clip"], "plain")
    processor.save_pretrained(tmp_path)
    saved = AutoProcessor.from_pretrained(tmp_path)
    assert saved.chat_template == CHATS["plain"] and not hasattr(saved.image_processor, "pad_to_square")
    second = in_form(saved, "vicuna_v1", pad_to_square=True)
    expected = composed_model(
        *(settings["vicuna7b_clip"][key] for key in ("vision_tower", "language_model")), pad_to_square=True
    )[1]
    assert second.chat_template == expected.chat_template
    assert second.image_processor.to_dict() == expected.image_processor.to_dict()
    with pytest.raises(InputError, match="which was not kept"):
        in_form(AutoProcessor.from_pretrained(tmp_path), "own")
    with pytest.raises(InputError, match="leave both out"):
        in_form(tiny("qwen2_5_vl")[1], "vicuna_v1")


@pytest.mark.parametrize("row", ROWS if ALL_ROWS else REHEARSED)
def test_rehearsal(row, tmp_path, no_network):
    name = f"viral_{row}"
    wanted = paper_recipe(f"viral_{row}")
    folder = smoke_test(name, tmp_path / "run", FEW)
    stage1 = tmp_path / "run_tiny" / "stage1"
    done = load_json(folder / "done.json")
    config = load_json(folder / "config.json")
    assert done["steps"] == 2 and load_json(stage1 / "done.json")["steps"] == 2
    same = set(wanted) - {
        "model",
        "language_model",
        "vision_tower",
        "residual_layer",
        "lora_rank",
        "lora_alpha",
        "global_batch_size",
        "save_steps",
        "compile_layers",
    }
    plain = {key for key in same if "." not in key}
    assert {key: config[key] for key in plain} == {key: wanted[key] for key in plain}
    objectives = {
        f"{label}.{key}": value for label, each in config["objectives"].items() for key, value in each.items()
    }
    own = {key for key in same - plain if key not in ("viral.teacher", "viral.layers", "viral.hidden")}
    assert {key: objectives[key] for key in own} == {key: wanted[key] for key in own}
    if wanted.get("viral.weight"):
        assert len(objectives["viral.layers"]) == len(wanted["viral.layers"])
    curves = pd.read_csv(folder / "curves.csv")
    assert curves[curves.name == "loss"].value.notna().all() and len(curves[curves.name == "loss"]) == 2
    if wanted.get("viral.weight"):
        assert curves[curves.name == "loss_viral"].value.abs().gt(1e-6).all()
        assert (load_json(folder / "teachers.json") == {}) == (wanted["viral.teacher"] == "encoder_projected")
    model, processor = load_model(folder / "model")
    assert type(model.model.language_model).__name__.startswith(
        "Qwen2" if "Qwen" in wanted["language_model"] else "Llama"
    )
    assert type(model.model.vision_tower).__name__.startswith(
        "Siglip" if "siglip" in wanted["vision_tower"] else "CLIP"
    )
    assert processor.image_processor.do_pad and (
        getattr(model.config, "aligned_residual", None) is not None
    ) == ("residual" in wanted)
    before, after = (load_file(where / "model" / "model.safetensors") for where in (stage1, folder))
    changed = {
        next(
            part
            for part in ("vision_tower", "multi_modal_projector", "language_model", "lm_head")
            if part in key
        )
        for key in after
        if key in before and not torch.equal(before[key], after[key])
    }
    assert changed == {"multi_modal_projector", "language_model"}


def test_what_cannot_be_rehearsed_is_said(tmp_path):
    with pytest.raises(InputError, match="small recipes are small already"):
        smoke_test("scenes_viral", tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["--recipe", "viral_table2_sam", "--tiny"])
    assert set(PUBLISHED) >= {
        paper_recipe(name)[key] for name in paper_recipe_names() for key in ("vision_tower", "language_model")
    }
