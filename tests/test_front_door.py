"""The front door: a model object, records and the settings of an objective are enough to train, on one
process or two, and they leave a plain checkpoint."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, FORKS, free_port, into_file
from tiny_models import tiny
from transformers import AutoModelForImageTextToText, TrainerCallback

from aligned_mllm import AlignConfig, AlignTrainer, Viral, load_model
from aligned_mllm.core import InputError, load_json
from aligned_mllm.data.records import Records

ROOT = Path(__file__).resolve().parents[1]
STEPS = {"max_steps": 2, "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "seed": 3}


def trained(family: str, source, output: Path, batch: int, **settings) -> AlignTrainer:
    "The eight lines of the README."
    model, processor = tiny(family)
    args = AlignConfig(str(output), per_device_train_batch_size=batch, **STEPS, **settings)
    objectives = [Viral(teacher="dense", hidden=16)]
    trainer = AlignTrainer(model, args, source, objectives, processing_class=processor)
    trainer.train()
    return trainer


def losses(run: Path) -> np.ndarray:
    "(steps, 2): text loss and alignment."
    curves = pd.read_csv(run / "curves.csv").pivot(index="step", columns="name", values="value")
    return curves[["loss_text", "loss_viral"]].dropna().to_numpy()


def half(rank: int, port: int, source: str, output: Path, log: Path) -> None:
    "One of two processes, with half of the batch each."
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update(ENVIRONMENT, **together, RANK=str(rank), LOCAL_RANK=str(rank))
    into_file(log)
    for family in ("llava", "qwen2_5_vl", "smolvlm"):
        trained(family, source, output / family, batch=2)


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory) -> Path:
    "Runs of three families on one process and, in `two`, on two."
    folder = tmp_path_factory.mktemp("front")
    arguments = (free_port(), str(small_data / "train.jsonl"), folder / "two", folder / "log.txt")
    both = [FORKS.Process(target=half, args=(rank, *arguments)) for rank in range(2)]
    for process in both:
        process.start()
    for family in ("llava", "qwen2_5_vl", "smolvlm"):
        trained(family, small_data / "train.jsonl", folder / family, batch=4)
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [0, 0], (folder / "log.txt").read_text()[-2000:]
    return folder


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
def test_the_eight_lines(runs, family):
    found = losses(runs / family)
    assert found.shape == (2, 2) and np.isfinite(found).all()
    assert abs(losses(runs / "two" / family) - found).max() < 1e-3
    layers = load_json(runs / family / "objectives.json")["viral"]
    assert layers["teacher"] == "dense" and load_json(runs / family / "done.json")["steps"] == 2
    plain = AutoModelForImageTextToText.from_pretrained(runs / family / "model")
    assert plain.config.model_type == tiny(family)[0].config.model_type


def test_every_form_of_data_trains_alike(runs, small_data, tmp_path):
    "Chat messages in a file, and rows with the pictures inside, give the losses of LLaVA's form."
    records = Records(small_data / "train.jsonl")
    rows = []
    for index, record in enumerate(records):
        messages = [
            {"role": role, "content": text}
            for turn in record.turns
            for role, text in (("user", turn.question), ("assistant", turn.answer))
        ]
        pictures = [records.image(name) for name in record.images]
        rows.append({"id": index, "messages": messages, "images": pictures})
    lines = [json.dumps({**row, "images": list(records[at].images)}) for at, row in enumerate(rows)]
    chat = small_data / "chat.jsonl"
    chat.write_text("\n".join(lines), encoding="utf-8")
    for name, source in (("chat", chat), ("rows", rows)):
        trained("llava", source, tmp_path / name, batch=4)
        assert (losses(tmp_path / name) == losses(runs / "llava")).all()


def test_a_folder_by_name_and_the_middle_layer(runs, small_data, tmp_path):
    "A model by its folder brings its processor. Settings of objectives in args count as well."
    viral = {"viral": {"teacher": "dense", "hidden": 8}}
    args = AlignConfig(str(tmp_path / "run"), objectives=viral, **STEPS)
    trainer = AlignTrainer(str(runs / "llava" / "model"), args, small_data / "train.jsonl")
    assert trainer.model.objectives["viral"].layers == [1] and args.model == ""
    named, _ = load_model(runs / "llava" / "model")
    again = AlignTrainer(named, args, small_data / "train.jsonl", [Viral(teacher="dense", hidden=8)])
    assert list(again.args.objectives) == ["text", "viral"]


def test_adapters_of_the_user_stay(small_data, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, processor = tiny("llava")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name for name, value in wrapped.named_parameters() if value.requires_grad}
    args = AlignConfig(str(tmp_path / "run"), **STEPS)
    trainer = AlignTrainer(wrapped, args, small_data / "train.jsonl", processing_class=processor)
    student = trainer.model.student
    assert {name for name, value in student.named_parameters() if value.requires_grad} == before


def test_a_tracker_gets_every_term(small_data, tmp_path, monkeypatch):
    from tensorboardX.proto.event_pb2 import Event

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trained("llava", small_data / "train.jsonl", tmp_path / "run", 4, report_to=["tensorboard"])
    (file,) = (tmp_path / "board").rglob("*tfevents*")
    content = file.read_bytes()
    tags = set()
    while content:  # length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", content[:8])
        tags |= {value.tag for value in Event.FromString(content[12 : 12 + length]).summary.value}
        content = content[16 + length :]
    assert {"train/loss", "train/loss_text", "train/loss_viral"} <= tags


def test_the_same_lines_resume_and_then_refuse(runs, small_data, tmp_path):
    source = small_data / "train.jsonl"

    def again(**keywords):
        model, processor = tiny("llava")
        args = AlignConfig(str(tmp_path / "run"), per_device_train_batch_size=4, save_steps=1, **STEPS)
        objectives = [Viral(teacher="dense", hidden=16)]
        return AlignTrainer(model, args, source, objectives, processing_class=processor, **keywords)

    class StopLater(TrainerCallback):
        def on_save(self, args, state, control, **keywords):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again(callbacks=[StopLater()]).train()
    again().train()
    assert load_json(tmp_path / "run" / "done.json")["resumed"]
    assert (losses(tmp_path / "run") == losses(runs / "llava")).all()
    (tmp_path / "run" / "checkpoint-1").mkdir()  # its process was killed while it removed the checkpoints
    with pytest.raises(InputError, match="holds a finished run"):
        again().train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    with pytest.raises(InputError, match="no such argument"):
        again().train(resume_from_checkpoint=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processing_class": None}, "without its processor"),
        ({"objectives": ["viral"]}, "the settings of one of"),
        ({"model": "nowhere/at/all"}, "no model in"),
        ({"train_dataset": "nowhere.json"}, "no file"),
        ({"half": True}, "a model in torch.float16"),
    ],
)
def test_bad_input_is_one_line(small_data, tmp_path, change, message):
    model, processor = tiny("llava")
    if change.pop("half", False):
        model = model.to(torch.float16)
    given = {
        "model": model,
        "train_dataset": small_data / "train.jsonl",
        "processing_class": processor,
        **change,
    }
    with pytest.raises(InputError, match=message):
        AlignTrainer(args=AlignConfig(str(tmp_path / "run"), **STEPS), **given)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_system_turn_without_a_place_is_refused_before_the_first_step(small_data, tmp_path):
    "Also if only a later evaluation record has one."
    model, processor = tiny("llava")
    without = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
    processor.chat_template = without + processor.chat_template
    turns = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "left"}]
    rows = [{"messages": turns}, {"messages": [{"role": "system", "content": "be brief"}, *turns]}]
    args = AlignConfig(str(tmp_path / "run"), eval_strategy="steps", **STEPS)
    with pytest.raises(InputError, match="a system turn, and the chat template leaves it out"):
        AlignTrainer(model, args, rows[:1], eval_dataset=rows, processing_class=processor)
    AlignTrainer(model, args, rows[:1], eval_dataset=rows[:1], processing_class=processor)


def test_names_of_the_package():
    import aligned_mllm

    code = "import sys, aligned_mllm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

    assert all(getattr(aligned_mllm, name) for name in aligned_mllm.NAMES) and "Viral" in dir(aligned_mllm)
    with pytest.raises(AttributeError):
        aligned_mllm.Virl  # noqa: B018
