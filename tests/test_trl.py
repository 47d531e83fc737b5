"""TRL and this package, both ways: TRL's SFTTrainer trains what a run here exports, and AlignTrainer trains
what SFTTrainer saves, on one data set with its pictures inside."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import trl
from datasets import Dataset, Features, List, Value
from peft import LoraConfig, PeftModel
from PIL import Image
from tiny_models import tiny
from transformers import AutoModelForImageTextToText
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from aligned_mllm import AlignConfig, AlignTrainer, Viral, load_model, open_records
from aligned_mllm.core import checksum
from aligned_mllm.data.collate import Samples
from aligned_mllm.data.encode import IGNORED
from aligned_mllm.models.compose import composed_model
from aligned_mllm.training.tiny_parts import tiny_part

WORDS = "be brief where is the circle left right what is above two red towers"
FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "images": List(datasets.Image()),
    }
)
STEP = {
    "max_steps": 1,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": [],
}
VICUNA, QWEN = "lmsys/vicuna-7b-v1.5", "Qwen/Qwen2.5-7B-Instruct"


def said(*texts: str, system: str = "") -> list[dict]:
    "Messages of a user and an assistant in turn."
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return [{"role": "system", "content": system}] * bool(system) + turns


def data_set(*rows: tuple) -> Dataset:
    "Rows of messages and of colours, one for each picture."
    pictures = [[Image.new("RGB", (56, 56), colour) for colour in colours] for _, *colours in rows]
    table = {"messages": [messages for messages, *_ in rows], "images": pictures}
    return Dataset.from_dict(table, features=FEATURES)


DATA = data_set((said("where is the circle", "left"), "red"), (said("what is above", "two towers"), "blue"))
TALKS = data_set(
    (said("where is the circle", "left", "what is above", "two red towers"), "red"),
    (said("where is the circle", "right", system="be brief"), "blue"),
    (said("what is above", "two"), "red", "blue"),
    (said("what is above", "red"),),
)

PROMPTS = data_set((said("where is the circle", "left", "what is above", "two red towers"), "red")).map(
    lambda row: {"prompt": row["messages"][:3], "completion": row["messages"][3:]},
    remove_columns="messages",
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    "Folders of a tiny encoder and of two tiny language models."
    root = tmp_path_factory.mktemp("parts")
    names = ("openai/clip-vit-large-patch14-336", VICUNA, QWEN)
    return {name: str(tiny_part(name, root, [WORDS])) for name in names}


@pytest.fixture(scope="module")
def students(parts) -> dict[str, tuple]:
    "(model, processor) by family; the first is composed, with a chat template of this package."
    tower = parts["openai/clip-vit-large-patch14-336"]
    composed = composed_model(tower, parts[VICUNA])
    return {"composed": composed, **{family: tiny(family) for family in ("smolvlm", "qwen2_5_vl")}}


def aligned(model, source, output: Path, processor=None) -> float:
    "Train one step here; the text loss."
    args = AlignConfig(str(output), **STEP)
    objectives = [Viral(teacher="dense", hidden=16)]
    AlignTrainer(model, args, source, objectives, processing_class=processor).train()
    curves = pd.read_csv(output / "curves.csv")
    return curves[curves.name == "loss_text"].value.item()


def tuned(folder: Path, output: Path, source: Dataset = DATA, processor=None, peft=None, **settings):
    "TRL's trainer after one step, its model saved in output/saved."
    args = SFTConfig(str(output), bf16=False, **STEP, **settings)
    trainer = SFTTrainer(str(folder), args, None, source, processing_class=processor, peft_config=peft)
    before = checksum(trainer.model)
    assert np.isfinite(trainer.train().training_loss) and checksum(trainer.model) != before
    trainer.save_model(output / "saved")
    return trainer


@pytest.mark.parametrize("family", ["composed", "smolvlm", "qwen2_5_vl"])
def test_there_and_back(students, tmp_path, family):
    model, processor = students[family]
    assert np.isfinite(aligned(model, DATA, tmp_path / "first", processor))
    named = family == "qwen2_5_vl"  # its processor cannot be loaded without torchvision
    tuned(tmp_path / "first" / "model", tmp_path / "trl", processor=processor if named else None)
    saved = tmp_path / "trl" / "saved"
    DATA.to_parquet(tmp_path / "train.parquet")
    losses = []
    for name, source in (("second", DATA), ("third", tmp_path / "train.parquet")):
        student = AutoModelForImageTextToText.from_pretrained(saved) if named else str(saved)
        losses.append(aligned(student, source, tmp_path / name, processor if named else None))
    assert np.isfinite(losses[0]) and losses[0] == losses[1]


@pytest.mark.parametrize(("language", "chat"), [(VICUNA, "vicuna_v1"), (QWEN, "qwen_2")])
def test_both_make_the_same_batches(parts, language, chat):
    """Tokens, labels and pixels, for several turns, a system turn, 0 to 2 images; and of a prompt with its
    completion, whose earlier answer is not learnt."""
    _, processor = composed_model(parts["openai/clip-vit-large-patch14-336"], parts[language], chat)
    kinds = {"assistant_only_loss": TALKS, "completion_only_loss": PROMPTS}
    if language == VICUNA:  # SentencePiece begins a completion, which TRL tokenizes by itself, with a space
        kinds.pop("completion_only_loss")
    for which, source in kinds.items():
        collate = DataCollatorForVisionLanguageModeling(processor, **{which: True})
        for row, ours in zip(source, Samples(open_records(source), processor), strict=True):
            theirs = collate([row])
            assert theirs["input_ids"][0].tolist() == ours["input_ids"].tolist()
            assert theirs["labels"][0].tolist() == ours["labels"].tolist()
            assert (ours["labels"] != IGNORED).sum() > 1
            assert len(row["images"]) == 0 or torch.equal(theirs["pixel_values"], ours["pixel_values"])


@pytest.mark.parametrize(("family", "pictures"), [("composed", True), ("composed", False), ("smolvlm", True)])
def test_answers_alone_are_learnt(students, tmp_path, family, pictures):
    """`assistant_only_loss` after an export: a template of this package marks the answers itself; a published
    one is known to TRL by its text, which an export must not change. TRL's learns a newline behind, too."""
    model, processor = students[family]
    if family == "smolvlm":
        processor.chat_template = (Path(trl.__file__).parent / "chat_templates" / "smolvlm.jinja").read_text()
    aligned(model, DATA, tmp_path / "run", processor)
    source = DATA if pictures else DATA.remove_columns("images")
    trainer = tuned(tmp_path / "run" / "model", tmp_path / "trl", source, assistant_only_loss=True)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs, ours = (
        sorted(processor.tokenizer.decode(labels[labels != IGNORED]).rstrip("\n") for labels in every)
        for every in (batch["labels"], [each["labels"] for each in Samples(open_records(source), processor)])
    )
    assert theirs == ours and len(set(ours)) == 2 and "left" in "".join(ours)
    assert ("pixel_values" in batch) == pictures


def test_adapters_of_trl(students, tmp_path):
    "Adapters that SFTTrainer saved train on, merged into their model, or as adapters of a model object."
    for part in students["composed"]:
        part.save_pretrained(tmp_path / "model")
    tuned(tmp_path / "model", tmp_path / "trl", peft=LoraConfig(r=2, target_modules=["q_proj"]))
    saved = tmp_path / "trl" / "saved"
    assert not (saved / "config.json").exists()
    model, processor = load_model(tmp_path / "model")
    assert checksum(load_model(saved)[0]) != checksum(model)
    losses = [
        aligned(student, DATA, tmp_path / name, processor)
        for name, student in (
            ("merged", str(saved)),
            ("wrapped", PeftModel.from_pretrained(model, saved, is_trainable=True)),
        )
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
