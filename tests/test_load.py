"""Models as people have them: older forms are read and said, nothing damaged or incomplete is believed."""

import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from conftest import ENVIRONMENT
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, tiny
from transformers import LlamaConfig, LlamaForCausalLM

from aligned_mllm.core import InputError, checksum
from aligned_mllm.models.compose import composed_model
from aligned_mllm.models.load import load_model
from aligned_mllm.models.trainable import add_lora

MATRIX = "layers.2.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    "The folder of a small LLaVA model."
    folder = tmp_path_factory.mktemp("models") / "good"
    for part in tiny("llava"):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def changed_weights(folder: Path, change) -> None:
    "Save the weights of a folder again after `change(weights, name of one matrix)`."
    weights = load_file(folder / "model.safetensors")
    change(weights, next(name for name in weights if MATRIX in name))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights, name: weights.pop(name), f"1 weights are missing, such as .*{MATRIX}"),
        (lambda weights, name: weights.update(odd=torch.ones(2)), "1 weights are unknown, such as odd"),
        (lambda weights, name: weights.update({name: weights[name][1:].clone()}), "another shape.*up_proj"),
        (lambda weights, name: weights[name].fill_(float("nan")), "not finite.*up_proj"),
    ],
)
def test_a_student_without_all_of_its_weights_is_refused(copy, change, message):
    changed_weights(copy, change)
    with pytest.raises(InputError, match=message):
        load_model(copy)


def test_parts_are_held_to_the_same(good, tmp_path):
    model, processor = load_model(good)
    for name, part in (("tower", model.model.vision_tower), ("language", model.model.language_model)):
        part.save_pretrained(tmp_path / name)
    processor.image_processor.save_pretrained(tmp_path / "tower")
    processor.tokenizer.save_pretrained(tmp_path / "language")
    with pytest.raises(InputError, match="1 weights are missing, such as lm_head.weight"):
        composed_model(str(tmp_path / "tower"), str(tmp_path / "language"))


def test_pickled_weights_are_read_and_said_but_nothing_else_in_them(copy, capsys):
    weights = load_file(copy / "model.safetensors")
    expected = checksum(load_model(copy)[0])
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    assert checksum(load_model(copy)[0]) == expected
    assert "weights_only=True" in capsys.readouterr().out
    torch.save({**weights, "code": Path.cwd}, copy / "pytorch_model.bin")
    with pytest.raises(InputError, match="Weights only load failed"):
        load_model(copy)


def cached_repository(cache: Path, name: str, revisions: dict[str, Path]) -> None:
    "A hub cache as huggingface_hub keeps it: each revision's folder under a commit of its own."
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    for number, (revision, folder) in enumerate(revisions.items()):
        commit = f"{number}" * 40
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)


def test_a_hub_id_takes_a_revision(good, copy, tmp_path):
    """Read in a process of its own: the cache's place is fixed when huggingface_hub is imported."""
    changed_weights(copy, lambda weights, name: weights[name].mul_(2))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "changed": True}))
    (copy / "chat_template.jinja").write_text("of the second revision")
    cached_repository(tmp_path / "hub", "owner/model", {"main": good, "v2": copy})
    code = """
from aligned_mllm.core import InputError, checksum
from aligned_mllm.models.load import load_model
from aligned_mllm.models.trainable import add_lora

for name in ("owner/model", "owner/model@v2"):
    print(checksum(load_model(name)[0]), hasattr(load_model(name)[0].config, "changed"))
print(load_model("owner/model@v2")[1].chat_template)
try:
    load_model("owner/model@v3")
except InputError as error:
    print(error)
"""
    environment = {**ENVIRONMENT, "HF_HUB_CACHE": str(tmp_path / "hub")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    main, second, own, refused = run.stdout.strip().splitlines()[-4:]
    assert main == f"{checksum(load_model(good)[0])} False"
    assert second == f"{checksum(load_model(copy)[0])} True" and main[:16] != second[:16]
    assert own == "of the second revision"
    assert "owner/model@v3" in refused and "HF_HUB_OFFLINE=1" in refused


def test_an_adapter_is_a_checkpoint(good, tmp_path):
    """As PEFT and TRL leave it: the base named in its configuration, its own processor, merged weights;
    refused with a matrix missing, and without its base."""
    wrapped = add_lora(load_model(good)[0], rank=2, dropout=0.0)
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(0))
    wrapped.peft_config["default"].base_model_name_or_path = str(good)
    wrapped.save_pretrained(tmp_path)
    _, processor = load_model(good)
    processor.chat_template = "of the adapter" + processor.chat_template
    processor.save_pretrained(tmp_path)
    model, own = load_model(tmp_path)
    assert own.chat_template.startswith("of the adapter")
    assert checksum(model) == checksum(wrapped.merge_and_unload()) != checksum(load_model(good)[0])
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if "layers.1" in name and "lora_A" in name))
    save_file(weights, file)
    with pytest.raises(InputError, match="1 weights are missing, such as .*layers.1.*lora_A"):
        load_model(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "./gone"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no model in ./gone, the base model that"):
        load_model(tmp_path)


def test_what_older_folders_lack_is_filled_in_and_said(copy, capsys):
    for file, names in {
        "processor_config.json": ("patch_size", "vision_feature_select_strategy"),
        "tokenizer_config.json": ("pad_token",),
    }.items():
        content = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({key: content[key] for key in content if key not in names}))
    model, processor = load_model(copy)
    said = capsys.readouterr().out
    assert processor.patch_size == model.config.vision_config.patch_size and "no patch_size" in said
    assert processor.tokenizer.pad_token_id is not None and "no padding token" in said


def test_two_image_tokens_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "image_token_id": 3}))
    with pytest.raises(InputError, match="image_token_id 3 in the model's config.json and"):
        load_model(copy)


def test_damage_ends_in_one_line_that_names_folder_or_file(good, tmp_path):
    """Every file cut, emptied, replaced and changed by a bit: either the same model, or one refusal. A bit
    inside the numbers of a weight cannot be known."""
    chance = random.Random(0)
    expected = checksum(load_model(good)[0])
    refused = 0
    for path in sorted(good.iterdir()):
        content = path.read_bytes()
        damaged = [content[: len(content) // 2], b"", b"{}"]
        for end in (400, 2000, 2000, 2000):
            place = chance.randrange(min(end, len(content)))
            flipped = content[place] ^ (1 << chance.randrange(8))
            damaged.append(content[:place] + bytes([flipped]) + content[place + 1 :])
        for bad in damaged:
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            shutil.copytree(good, tmp_path / "bad")
            (tmp_path / "bad" / path.name).write_bytes(bad)
            try:
                assert checksum(load_model(tmp_path / "bad")[0]) == expected, path.name
            except InputError as error:
                named = any(each.name in str(error) for each in good.iterdir())
                assert "\n" not in str(error) and (named or str(tmp_path / "bad") in str(error)), error
                refused += 1
    assert refused > 15


@pytest.fixture
def parts(good, tmp_path) -> dict[str, str]:
    "Folders of an encoder, and of a language model as Vicuna's: its tokenizer is `tokenizer.model` alone."
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 3),
        model_writer=pieces,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model, processor = load_model(good)
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    processor.image_processor.save_pretrained(tmp_path / "tower")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=330, **sizes)).save_pretrained(tmp_path / "words")
    (tmp_path / "words" / "tokenizer.model").write_bytes(pieces.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, **special}
    (tmp_path / "words" / "tokenizer_config.json").write_text(json.dumps(settings))
    return {"vision_tower": str(tmp_path / "tower"), "language_model": str(tmp_path / "words")}


def test_a_tokenizer_of_sentencepiece_alone(parts, tmp_path):
    model, processor = composed_model(**parts)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "words" / "tokenizer.model"))
    for text in ("where is the circle", "two  red\ntowers", "größe 7"):
        assert processor.tokenizer(text)["input_ids"] == [1, *plain.encode(text)]
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    text = "<image>\nwhere is it"
    again = load_model(tmp_path / "saved")[1].tokenizer
    assert again(text)["input_ids"] == processor.tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "knows 3 tokens, all of them special"),
        (b"", "knows 3 tokens, all of them special"),
        (b"half", "tokenizer.model cannot be read"),
    ],
)
def test_a_tokenizer_without_its_pieces_is_refused(parts, tmp_path, content, fault):
    file = tmp_path / "words" / "tokenizer.model"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content and file.read_bytes()[:1000])
    with pytest.raises(InputError, match=fault):
        composed_model(**parts)


def test_the_package_of_a_tokenizer_is_named(parts, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match="tokenizer.model cannot be read .*sentencepiece"):
        composed_model(**parts)
