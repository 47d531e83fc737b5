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
from aligned_mllm.objectives.sea import Sea
from aligned_mllm.training.llava_stages import FULL_STAGE2, STAGE1
from aligned_mllm.training.papers.sea import BOOK as SEA_BOOK, SEA_RECIPES, SEA_STARTS
from aligned_mllm.training.papers.viral import ROWS, paper_recipe, paper_recipe_names, sources_of, stage1_of
from aligned_mllm.training.dry_run import dry_run
from aligned_mllm.training.smoke_test import tiny_data, tiny_settings
from aligned_mllm.models.trainable import parameters_by_part
from aligned_mllm.objectives.text import TextLoss
from aligned_mllm.training.build import student_of
from aligned_mllm.training.config import configured, part_rates
from aligned_mllm.training.model import AlignedModel
from aligned_mllm.training.published import PUBLISHED
from aligned_mllm.training.recipes import recipe
from aligned_mllm.train import main
from aligned_mllm.training.run import smoke_test
from aligned_mllm.training.trainer import TermTrainer

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


SEA_MODELS = {
    "vicuna7b": ("lmsys/vicuna-7b-v1.5", 6_738_415_616, 4096),
    "gemma2b": ("google/gemma-2b", 2_506_172_416, 2048),
    "phi3": ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552, 3072),
    "llama3": ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248, 4096),
    "vicuna13b": ("lmsys/vicuna-13b-v1.5", 13_015_864_320, 5120),
}  # hub id, parameters as published, width
SEA_EYES = {  # hub id; whose labels; width of the features, grid, pairs a picture
    "clip": ("openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336", 1024, 24, 144),
    "siglip": ("google/siglip-so400m-patch14-384", "google/siglip-so400m-patch14-384", 1152, 27, 196),
    "dinov2": ("facebook/dinov2-large", "openai/clip-vit-large-patch14-336", 1024, 16, 64),
}
SEA_TOWERS = {"clip": 427_944_193, "siglip": 877_960_498}  # parameters of both towers, by hand
SEA_ROWS = {  # table: its pairs of models, the records of its stages, the last stage
    "table1": ([f"{name}_siglip" for name in SEA_MODELS], "alignment_2.5m", "Cambrian7M_withsystemprompt", 3),
    "table2": (
        [*(f"{name}_clip" for name in SEA_MODELS), "vicuna7b_siglip"],
        "blip_laion_cc_sbu_558k",
        "llava_v1_5_mix665k",
        2,
    ),
    "table4": (["vicuna7b_clip"], "blip_laion_cc_sbu_558k", "llava_v1_5_mix665k", 3),
    "table5": (["vicuna7b_dinov2"], "blip_laion_cc_sbu_558k", "llava_v1_5_mix665k", 2),
}
SEA_NAMES = [
    f"sea_{table}_{pair}_{arm}"
    for table in SEA_ROWS
    for pair in SEA_ROWS[table][0]
    for arm in ("plain", "sea")
]
SEA_FORECAST = (
    "sea_table1_gemma2b_siglip_sea",
    "sea_table2_phi3_clip_sea",
    "sea_table2_llama3_clip_plain",
    "sea_table5_vicuna7b_dinov2_sea",
)
SEA_REHEARSED = (
    "sea_table1_gemma2b_siglip_sea",
    "sea_table2_llama3_clip_plain",
    "sea_table5_vicuna7b_dinov2_sea",
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


def test_parts_train_at_their_own_rates(tiny_world, tmp_path):
    "Every weight is in one group, with the rate of its part; a rate of a frozen part is refused."
    parts = {name: tiny_world[1]["vicuna7b_clip"][name] for name in ("vision_tower", "language_model")}
    rates = {"learning_rate": 2e-5, "projector_learning_rate": 1e-4, "vision_tower_learning_rate": 2e-6}
    wanted = {**parts, **rates, "model": "composed", "stage": 3, "use_cpu": True}
    config = configured("", "", tmp_path, wanted)
    student, processor = student_of(config)
    trainer = TermTrainer(AlignedModel(student, [TextLoss()]), config, processing_class=processor)
    groups = trainer.create_optimizer().param_groups
    found = [(id(weight), group["lr"]) for group in groups for weight in group["params"]]
    by_part = parameters_by_part(student)
    assert len(found) == len(dict(found)) == sum(len(weights) for weights in by_part.values())
    for part, rate in {"vision_tower": 2e-6, "projector": 1e-4, "language_model": 2e-5}.items():
        assert {dict(found)[id(weight)] for weight in by_part[part].values()} == {rate}
    with pytest.raises(InputError, match="does not train the vision tower"):
        part_rates(configured("", "", tmp_path, {**wanted, "stage": 2}))


def test_seas_tables_are_all_there():
    assert sorted(SEA_STARTS) == sorted(SEA_NAMES) and set(SEA_STARTS.values()) < set(SEA_RECIPES)
    assert len(SEA_RECIPES) == len(SEA_NAMES) + 2 * 12  # twelve pairs of models and data


@pytest.mark.parametrize("name", SEA_NAMES)
def test_a_row_of_sea_has_the_papers_values(name):
    """Stage 1 has SEA's term or none; stage 2 never has it, and every other value is LLaVA-1.5's or the
    table's."""
    _, table, language, vision, arm = name.split("_")
    _, *records, last = SEA_ROWS[table]
    parts = {"language_model": SEA_MODELS[language][0], "vision_tower": SEA_EYES[vision][0]}
    first = recipe(SEA_STARTS[name])
    term = {key: value for key, value in first.items() if "." in key}
    prime = {"stage": 3, "vision_tower_learning_rate": 2e-6} if last == 3 else {}
    early = {**STAGE1, **parts, "chat": "plain", "records": f"{records[0]}.json{'l' * (table == 'table1')}"}
    late = {**early, "chat": "vicuna_v1", "records": f"{records[1]}.json{'l' * (table == 'table1')}"}
    late |= {"stage": 2, "pad_to_square": True, "learning_rate": 2e-5, "global_batch_size": 128, **prime}
    batch = {"per_device_train_batch_size": 32} if arm == "sea" else {}  # negatives are those of a device
    assert first == {**early, **term, **batch} and recipe(name) == {**FULL_STAGE2, **late}
    stated = {"labels": SEA_EYES[vision][1], "top": 10, "threshold": 0.0, "window": 2, "one_a_word": True}
    stated |= {"vectors": "input", "learnable": True}
    open_ = {
        field: getattr(Sea, field) for field in ("weight", "temperature", "scorer", "words", "negatives")
    }
    assert term == (
        {f"sea.{key}": value for key, value in {**stated, **open_}.items()} if arm == "sea" else {}
    )
    for each in (name, SEA_STARTS[name]):
        places = SEA_BOOK.sources(each)
        assert set(places) == set(recipe(each)) and all(len(place) > 10 for place in places.values())
        config = configured(each, "DATA", "RUN", {"use_cpu": True})
        each_device = 32 if arm == "sea" and each != name else 8
        assert config.gradient_accumulation_steps * each_device == config.global_batch_size
        for field in open_ if arm == "sea" and each != name else ():
            assert "default" in places[f"sea.{field}"], field


@pytest.mark.parametrize("name", SEA_NAMES if ALL_ROWS else SEA_FORECAST)
def test_a_row_of_sea_has_an_estimate(name, no_network):
    _, table, language, vision, arm = name.split("_")
    first, second = (estimate_of(each) for each in (SEA_STARTS[name], name))
    _, size, width = SEA_MODELS[language]
    _, labels, features, side, pairs = SEA_EYES[vision]
    projector = f"trained {features * width + width * width + 2 * width:,},"
    for found in (first, second):
        assert found["A sample"]["visual tokens"] == f"{side * side} ({side} x {side})"
        assert found["What trains"]["projector"].startswith(projector)
    trained = int(second["What trains"]["language_model"].split()[1].rstrip(",").replace(",", ""))
    assert size <= trained <= size + 2 * width  # a row for <image>, in embedding and head
    assert second["What trains"]["vision_tower"].startswith("trained 0,") == (SEA_ROWS[table][-1] == 2)
    assert list(second["Starts from"]) == [SEA_STARTS[name]] and "Objective sea" not in second
    memory = "Memory of one GPU, GiB (an estimate)"
    if arm == "sea":
        said = first["Objective sea"]
        assert said["labels"] == f"{labels} by surgery"
        assert said["pairs"] == f"at most {pairs} of {side * side} visual tokens a picture"
        plain = estimate_of(SEA_STARTS[name.removesuffix("sea") + "plain"])
        more = (first[memory]["weights"] - plain[memory]["weights"]) * 2**30 / 2  # in bfloat16
        assert abs(more - SEA_TOWERS["siglip" if "siglip" in labels else "clip"]) < 10
    else:
        assert first["Objectives"] == {"none": "text loss only"}


@pytest.mark.parametrize("name", SEA_NAMES if ALL_ROWS else SEA_REHEARSED)
def test_rehearsal_of_sea(name, tmp_path, no_network):
    term = {"sea"} if name.endswith("_sea") else set()
    folder = smoke_test(name, tmp_path / "run", {**FEW, **({"sea.window": 1} if term else {})})
    stage1 = tmp_path / "run_tiny" / "stage1"
    for where, labels in ((stage1, {"text"} | term), (folder, {"text"})):
        assert load_json(where / "done.json")["steps"] == 2
        assert set(load_json(where / "config.json")["objectives"]) == labels
        curves = pd.read_csv(where / "curves.csv")
        for label in labels:
            values = curves[curves.name == f"loss_{label}"].value
            assert len(values) == 2 and values.gt(0.1).all()
    if term:
        config = load_json(stage1 / "config.json")["objectives"]["sea"]
        assert config["window"] == 1 and config["labels"] == "random"
    wanted = recipe(name)
    model, processor = load_model(folder / "model")
    kind = wanted["language_model"].split("/")[-1].split("-")[0]
    expected = {"vicuna": "Llama", "gemma": "Gemma", "Phi": "Phi3", "Meta": "Llama"}[kind]
    assert type(model.model.language_model).__name__ == f"{expected}Model"
    eyes = {"clip": "CLIP", "siglip": "Siglip", "dinov2": "Dinov2"}[name.split("_")[3]]
    assert type(model.model.vision_tower).__name__.startswith(eyes)
    side = {"CLIP": 56, "Siglip": 60, "Dinov2": 70}[eyes]
    assert processor.image_processor.size["height"] == side and processor.image_processor.do_pad
    before, after = (load_file(where / "model" / "model.safetensors") for where in (stage1, folder))
    changed = {
        part
        for part in ("vision_tower", "multi_modal_projector", "language_model")
        for key in after
        if part in key and not torch.equal(before[key], after[key])
    }
    tower = {"vision_tower"} if wanted["stage"] == 3 else set()
    assert changed == {"multi_modal_projector", "language_model"} | tower
