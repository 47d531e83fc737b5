"""What a run leaves is a plain transformers checkpoint: a process that cannot import this package
computes the same. A checkpoint that is not plain raises an error."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT
from PIL import Image
from tiny_models import WORDS, bytes_tokenizer, text_sizes, vision_sizes

from aligned_mllm.core import InputError, data_folder, load_json, seed_everything
from aligned_mllm.models.compose import CHATS, composed_model
from aligned_mllm.models.load import CHANGES, load_model
from aligned_mllm.reporting.model_card import model_card
from aligned_mllm.train import run
from aligned_mllm.training.claim import claim_folder
from aligned_mllm.training.config import WEIGHTS, configured
from aligned_mllm.training.run import finish, report_parameters, trainer_of
from aligned_mllm.training.trainer import TermTrainer
from aligned_mllm.worlds.small_models import embedded_model

FEW = {
    "max_steps": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "evaluation_records": "",
    "disable_tqdm": True,
    "per_device_train_batch_size": 8,
}

FOREIGN = """
import json, sys
sys.modules["aligned_mllm"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
picture, question, *folders = sys.argv[1:]
found = {}
for folder in folders:
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
    except ValueError as error:
        found[folder] = {"refused": str(error)}
        continue
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    batch = processor(images=Image.open(picture).convert("RGB"), text=text, return_tensors="pt")
    said = model.generate(**batch, do_sample=False, max_new_tokens=6)
    images = processor.image_processor
    found[folder] = {
        "logits": model(**batch).logits[0, -1].tolist(),
        "said": said[0].tolist(),
        "text": text,
        "do_pad": getattr(images, "do_pad", None),
        "class": type(images).__name__,
        "pixels": batch["pixel_values"].double().sum().item(),
        "crop": getattr(images, "do_center_crop", None),
    }
print(json.dumps(found))
"""


def published_parts(root):
    "A CLIP encoder and a causal language model with Vicuna's special tokens, saved as their authors would."
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    seed_everything(0)
    CLIPVisionModel(CLIPVisionConfig(**vision_sizes())).save_pretrained(root / "tower")
    CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}).save_pretrained(
        root / "tower"
    )
    tokenizer = bytes_tokenizer("", "<s>", "</s>", "<unk>", {})
    tokenizer.save_pretrained(root / "words")
    LlamaForCausalLM(LlamaConfig(**text_sizes(tokenizer, initializer_range=0.3))).save_pretrained(
        root / "words"
    )
    return str(root / "tower"), str(root / "words")


@pytest.fixture(scope="module")
def exports(small_data, tmp_path_factory):
    "Every kind of export, and what a foreign process says of it."
    root = tmp_path_factory.mktemp("exports")
    folders = {
        name: run(recipe, small_data, root / name, {**FEW, **settings}) / "model"
        for name, recipe, settings in (
            ("full", "scenes_viral", {}),
            ("lora", "scenes_lora_viral", {"lora_rank": 4}),
            ("dora", "scenes_lora_viral", {"lora_rank": 4, "lora_dora": True}),
            ("post", "scenes_plain", {"residual": "post_projection", "residual_layer": 3}),
            ("pre", "scenes_plain", {"residual": "pre_projection", "residual_layer": 3}),
            ("code", "scenes_position_code", {}),
            ("norm", "scenes_visual_norm", {}),
            ("rotary", "scenes_rope2d", {}),
        )
    }
    tower, words = published_parts(root)
    folders["composed"] = (
        run(
            "scenes_plain",
            small_data,
            root / "composed",
            {
                **FEW,
                "model": "composed",
                "vision_tower": tower,
                "language_model": words,
                "pad_to_square": True,
            },
        )
        / "model"
    )
    picture = root / "wide.png"
    Image.open(sorted(small_data.rglob("*.png"))[0]).convert("RGB").resize((90, 40)).save(picture)
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, picture, "where red", *folders.values()],
        env=ENVIRONMENT,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return picture, folders, {name: found[str(folder)] for name, folder in folders.items()}


@pytest.mark.parametrize("name", ["full", "lora", "dora", "composed"])
def test_a_foreign_process_computes_the_same(exports, name):
    picture, folders, found = exports
    model, processor = load_model(folders[name])
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where red"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    batch = processor(images=Image.open(picture), text=text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits[0, -1]
        said = model.generate(**batch, do_sample=False, max_new_tokens=6)
    assert (logits - torch.tensor(found[name]["logits"])).abs().max() < 1e-5 and logits.std() > 0.01
    assert said[0].tolist() == found[name]["said"] and text == found[name]["text"]


def test_vicunas_sentence_and_square_padding_are_saved(exports):
    _, folders, found = exports
    composed = found["composed"]
    assert composed["text"] == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. USER: <image>\nwhere red ASSISTANT:"
    )
    assert composed["do_pad"] is True and not composed["crop"] and composed["class"].startswith("Llava")
    assert load_json(folders["composed"] / "processor_config.json")["image_processor"]["do_pad"] is True
    assert CHATS["vicuna_v1"] in (folders["composed"] / "chat_template.jinja").read_text()


def test_padding_is_what_the_saved_processor_does(exports, tmp_path):
    "A wide picture keeps its sides: they would be cut off by the encoder's own processing."
    picture, folders, _ = exports
    tower, words = published_parts(tmp_path)
    _, padding = composed_model(tower, words, pad_to_square=True)
    _, cutting = composed_model(tower, words, pad_to_square=False)
    saved = load_model(folders["composed"])[1]
    marked = Image.open(picture).copy()
    marked.paste((255, 0, 0), (0, 0, 8, 40))  # the left margin, which a square in the middle does not show
    seen = {
        name: [
            each.image_processor(images=image, return_tensors="pt")["pixel_values"]
            for image in (marked, Image.open(picture))
        ]
        for name, each in (("padding", padding), ("saved", saved), ("cutting", cutting))
    }
    moved = {name: (one - other).abs().max().item() for name, (one, other) in seen.items()}
    assert moved["cutting"] == 0 < moved["saved"] == moved["padding"]


@pytest.mark.parametrize("name", ["post", "pre", "code", "norm", "rotary"])
def test_a_changed_model_is_refused_by_transformers_and_restored_here(exports, name):
    picture, folders, found = exports
    assert "aligned_llava" in found[name]["refused"]
    readme = (folders[name] / "README.md").read_text()
    model, processor = load_model(folders[name])
    (change,) = [change for change in CHANGES if getattr(model.config, change, None)]
    assert "load_model" in readme and change in readme and model.config.model_type == "llava"
    batch = processor(images=Image.open(picture), text="<image> where red", return_tensors="pt")
    with torch.no_grad():
        whole = model(**batch).logits
        stock = type(model).from_pretrained(
            folders[name], config=model.config
        )  # a class, called by name, only warns of the type
        assert (stock.eval()(**batch).logits - whole).abs().max() > 1e-4, (
            "transformers would have been right, silently"
        )


def test_a_plain_export_has_no_warning_in_it(exports):
    assert (
        not (exports[1]["full"] / "README.md").exists()
        and load_json(exports[1]["lora"] / "config.json")["model_type"] == "llava"
    )
    assert WORDS


MIXED = {"weights": "bfloat16", "trained_weights": "float32", "bf16": True, "use_cpu": True}
ADAPTERS = {
    "post": {**MIXED, "residual": "post_projection", "residual_layer": 3},
    "pre": {**MIXED, "residual": "pre_projection", "residual_layer": 3},
    "dora": {**MIXED, "lora_dora": True, "position_code": 1.0},
    "placed": {**MIXED, "visual_norm": True, "rotary_2d": True},
    "float32": {"use_cpu": True},
}


def update(model, start: dict) -> dict:
    "What the linear layers of the language model's blocks gained, by name."
    names = [name for name in start if "language_model.layers" in name and name.endswith("_proj.weight")]
    state = model.state_dict()
    return {name: state[name].float() - start[name].float() for name in names}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_kept_and_what_merging_takes_is_measured(small_data, tmp_path, name):
    """From a base model in a folder. The adapters' folder has the trained update to float32's last digits,
    with residual and position code; done.json has the distance of the merged model from it."""
    for part in embedded_model(data_folder() / "parts"):
        part.save_pretrained(tmp_path / "base")
    settings = {**FEW, "model": str(tmp_path / "base"), **ADAPTERS[name]}
    trainer = trainer_of(configured("scenes_lora_viral", small_data, tmp_path / "run", settings))
    claim_folder(trainer.args, "scenes_lora_viral", trainer)
    report_parameters(trainer)
    TermTrainer.train(trainer)
    start = load_model(tmp_path / "base", WEIGHTS[settings.get("weights", "float32")])[0].state_dict()
    student = trainer.model.student
    layers = {key: each for key, each in student.named_modules() if hasattr(each, "lora_A")}
    factors = {
        f"{key.removeprefix('base_model.model.')}.weight": each.get_delta_weight("default").detach()
        for key, each in layers.items()
    }
    before = {
        name: value.detach().clone() for name, value in student.named_parameters() if "projector" in name
    }
    rotary = {key: value.clone() for key, value in student.named_buffers() if "inv_freq" in key}
    finish(trainer, {})
    export = load_json(tmp_path / "run" / "done.json")["export"]
    adapted, _ = load_model(tmp_path / "run" / "adapter")
    merged, _ = load_model(tmp_path / "run" / "model")
    trained, kept = update(adapted, start), update(merged, start)
    if name != "dora":  # whose update is not a product alone
        assert factors.keys() == trained.keys()
        assert max((trained[key] - factors[key]).abs().max() for key in factors) < 1e-6
    lost = sum((kept[key] - trained[key]).square().sum() for key in trained).sqrt()
    whole = sum(value.square().sum() for value in trained.values()).sqrt()
    assert whole > 0 and export["update_error"] == pytest.approx(float(lost / whole), rel=1e-2, abs=2e-6)
    assert export["update_error"] < 1e-5 if name == "float32" else export["update_error"] > 0.01
    assert (export["logits_difference"] > 1e-3) == (name != "float32") and export["logits_deviation"] > 0.1
    projector = {key: value for key, value in before.items() if "modules_to_save" in key}
    for key, value in projector.items():
        assert torch.equal(adapted.get_parameter(plain_name(key)), value), key
    for key, value in rotary.items():  # not rounded to bfloat16, and so those of the loaded model
        assert torch.equal(dict(adapted.named_buffers())[plain_name(key)], value), key
    for kind in CHANGES:
        assert getattr(adapted.config, kind, None) == getattr(student.config, kind, None)
    config = load_json(tmp_path / "run" / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    card = model_card(tmp_path / "run")
    assert f"by {100 * export['update_error']:.2g} %" in card and "adapter/" in card


def plain_name(name: str) -> str:
    "A parameter's name without PEFT's own parts."
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


def test_adapters_move_with_a_base_that_has_no_name(small_data, tmp_path):
    output = run(
        "scenes_lora_viral",
        small_data,
        tmp_path / "run",
        {**FEW, "residual": "pre_projection", "residual_layer": 3},
    )
    shutil.move(output, tmp_path / "elsewhere")
    adapted, _ = load_model(tmp_path / "elsewhere" / "adapter")
    merged, _ = load_model(tmp_path / "elsewhere" / "model")
    state = adapted.state_dict()
    assert state.keys() == merged.state_dict().keys()
    assert max((state[name] - value).abs().max() for name, value in merged.state_dict().items()) < 1e-5
    shutil.rmtree(tmp_path / "elsewhere" / "adapter" / "base")
    with pytest.raises(InputError, match="no model in ./base"):
        load_model(tmp_path / "elsewhere" / "adapter")
