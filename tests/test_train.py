"Training: trained parameters, exact normalisation, interruption, processes, export, faults."

import copy
import inspect
import json
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace

import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, in_fork, launch, started, train, train_here, train_words
from safetensors.torch import load_file

from aligned_mllm.core import InputError, checksum, load_json, sole_owner
from aligned_mllm.training.config import AlignConfig, configured, parsed_setting
from aligned_mllm.train import run
from aligned_mllm.training.run import trainer_of
from aligned_mllm.training.trainer import TermTrainer

FEW = {
    "max_steps": 6,
    "logging_steps": 1,
    "eval_steps": 6,
    "save_steps": 3,
    "disable_tqdm": True,
    "per_device_train_batch_size": 8,
}
WORDS = [f"{key}={json.dumps(value)}" for key, value in FEW.items()]


def losses(folder, name: str = "loss_text") -> pd.Series:
    curves = pd.read_csv(folder / "curves.csv")
    return curves[curves.name == name].set_index("step").value


@pytest.fixture(scope="module")
def one_run(small_data, tmp_path_factory):
    "A short run with alignment."
    return run("scenes_viral", small_data, tmp_path_factory.mktemp("one") / "run", FEW)


def test_a_run_folder_tells_all(one_run):
    names = {path.name for path in one_run.iterdir()}
    assert {
        "config.json",
        "environment.json",
        "parameters.json",
        "teachers.json",
        "curves.csv",
        "left_out.csv",
        "model",
        "objectives.safetensors",
        "done.json",
    } <= names
    assert not list(one_run.glob("checkpoint-*"))
    teachers = load_json(one_run / "teachers.json")["viral"]
    assert teachers["before"] == teachers["after"] != ""
    assert load_json(one_run / "config.json")["objectives"]["viral"]["layers"] == [3]
    assert load_json(one_run / "objectives.json")["viral"]["teacher"] == "dense"
    assert set(pd.read_csv(one_run / "curves.csv").name) >= {
        "loss",
        "loss_text",
        "loss_viral",
        "accuracy",
        "grad_norm",
    }


@pytest.mark.parametrize(
    "recipe, changed",
    [("scenes_stage1", {"projector"}), ("scenes_viral", {"projector", "language_model", "alignment"})],
)
def test_exactly_the_right_parameters_train(small_data, tmp_path, recipe, changed):
    trainer = trainer_of(configured(recipe, small_data, tmp_path / "run", {**FEW, "evaluation_records": ""}))
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    TermTrainer.train(trainer)  # the steps alone, without the finished folder
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    kinds = {
        "vision_tower": "vision_tower",
        "multi_modal_projector": "projector",
        "language_model": "language_model",
        "lm_head": "language_model",
        "objective": "alignment",
    }
    assert {next(kinds[key] for key in kinds if key in name) for name in moved} == changed


def test_accumulated_batches_are_one_large_batch(one_run, small_data, tmp_path):
    run(
        "scenes_viral",
        small_data,
        tmp_path / "run",
        {**FEW, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    )
    for name in ("loss_text", "loss_viral"):
        assert (losses(one_run, name) - losses(tmp_path / "run", name)).abs().max() < 2e-4
    one = load_file(one_run / "model" / "model.safetensors")
    other = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert max((one[name] - other[name]).abs().max() for name in one) < 5e-3


def test_two_processes_are_one(one_run, small_data, tmp_path):
    words = [word for word in WORDS if "batch_size" not in word] + ["per_device_train_batch_size=4"]
    done = launch("scenes_viral", small_data, tmp_path / "run", *words, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("loss_text", "loss_viral", "accuracy"):
        assert (losses(one_run, name) - losses(tmp_path / "run", name)).abs().max() < 1e-3, name


def test_killed_and_run_again_is_bit_equal(small_data, tmp_path):
    "Two processes, killed in their second epoch, in which batches are grouped by length again."
    words = [
        *(word for word in WORDS if "steps" not in word and "batch_size" not in word),
        "per_device_train_batch_size=4",
        "train_sampling_strategy=group_by_length",
        "first_records=42",
        "max_steps=12",
        "logging_steps=4",
        "save_steps=4",
        "save_total_limit=1",
        "eval_steps=8",
    ]
    command = ("scenes_viral", small_data)
    assert train(*command, tmp_path / "whole", *words, processes=2)[0] == [0, 0]
    killed = tmp_path / "killed"
    pair = started(*command, killed, *words, processes=2)
    while not (killed / "checkpoint-8" / "whole.json").exists():
        assert all(process.is_alive() for process in pair), "ended before it could be killed"
        time.sleep(0.01)
    for process in pair:
        process.kill()
    for process in pair:
        process.join()
    assert {process.exitcode for process in pair} == {-signal.SIGKILL}
    assert not (killed / "done.json").exists()
    for folder in (killed, killed / "another_run"):
        folder.mkdir(exist_ok=True)
        (folder / ".curves.csv.0f3a9c21.part").touch()
    assert train(*command, killed, *words, processes=2)[0] == [0, 0]
    assert load_json(killed / "done.json")["resumed"]
    assert [path.parent.name for path in killed.rglob(".*")] == ["another_run"]
    for name in ("model/model.safetensors", "objectives.safetensors", "curves.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (killed / name).read_bytes(), name


def test_stock_transformers_loads_the_export(one_run, small_data, tmp_path):
    "In a process that cannot import this package: the same logits and the same greedy answer."
    script = """
import json, sys, torch
sys.modules["aligned_mllm"] = None
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, picture, question = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
batch = processor(images=Image.open(picture).convert("RGB"), text=text, return_tensors="pt")
said = model.generate(**batch, do_sample=False, max_new_tokens=4)
print(json.dumps({"logits": model(**batch).logits[0, -1].tolist(), "said": said[0].tolist()}))
"""
    from PIL import Image

    from aligned_mllm.models.load import load_model

    picture = small_data / sorted(path.relative_to(small_data) for path in small_data.rglob("*.png"))[0]
    found = subprocess.run(
        [sys.executable, "-c", script, one_run / "model", picture, "where red"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    theirs = json.loads(found.stdout.splitlines()[-1])
    model, processor = load_model(one_run / "model")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where red"}]}]
    batch = processor(
        images=Image.open(picture).convert("RGB"),
        text=processor.apply_chat_template(messages, add_generation_prompt=True),
        return_tensors="pt",
    )
    with torch.no_grad():
        ours = model.eval()(**batch).logits[0, -1]
    assert (ours - torch.tensor(theirs["logits"])).abs().max() < 1e-5
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 25


def test_a_teacher_that_changes_is_noticed(small_data, tmp_path):
    trainer = trainer_of(
        configured("scenes_viral", small_data, tmp_path / "run", {**FEW, "evaluation_records": ""})
    )
    teacher = trainer.model.objectives["viral"].source.teacher
    assert not any(
        parameter is mine for parameter in trainer.model.parameters() for mine in teacher.model.parameters()
    )
    assert teacher.verify() == teacher.checksum
    with torch.no_grad():
        next(teacher.model.parameters()).add_(1.0)
    with pytest.raises(InputError, match="checksum|changed"):
        teacher.verify()


def test_lora_trains_and_merges(small_data, tmp_path):
    run("scenes_lora_viral", small_data, tmp_path / "run", FEW)
    merged = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not any("lora" in name for name in merged)
    trained = load_json(tmp_path / "run" / "parameters.json")
    assert any(part["trained"] for name, part in trained.items() if "projector" in name)


@pytest.mark.parametrize(
    "words, message",
    [
        (["viral.layer=3"], "viral.layers"),
        (["viral.layers=[9]"], "0 to 6|0..6|layer"),
        (["max_steps=many"], "value of type"),
        (["records=nothing.jsonl"], "nothing.jsonl"),
        (["viral.teacher=./nobody"], "nobody"),
        (["viral.target=another"], "viral.target"),
        (["viral.teacher="], "the objective viral without a teacher"),
        (["virral.layers=[3]"], "perhaps viral"),
        (["viral.layers=3"], "list"),
        (["max_steps=1.5"], "int"),
        (["optim=foo"], "foo"),
        (["model=runs/nothing/model"], "runs/nothing/model"),
        (["data=elsewhere"], "--data"),
    ],
)
def test_bad_settings_stop_before_the_first_step(small_data, tmp_path, words, message, capsys):
    from aligned_mllm.train import main

    status = main(
        [
            "--recipe",
            "scenes_viral",
            "--data",
            str(small_data),
            "--output",
            str(tmp_path / "run"),
            *(part for word in words for part in ("--set", word)),
        ]
    )
    said = capsys.readouterr().err
    assert (
        status == 2 and len(said.strip().splitlines()) == 1 and pd.Series([said]).str.contains(message).all()
    ), said
    assert not (tmp_path / "run" / "config.json").exists()


def test_another_start_is_another_run(one_run, small_data, tmp_path):
    "The same settings from other weights are not done."
    folder = shutil.copytree(one_run, tmp_path / "run")
    with pytest.raises(InputError, match="start"):
        run("scenes_viral", small_data, folder, {**FEW, "model": str(one_run / "model")})


def test_a_position_code_is_put_on_once(small_data, tmp_path):
    run("scenes_position_code", small_data, tmp_path / "one", FEW)
    two = run(
        "scenes_position_code",
        small_data,
        tmp_path / "two",
        {**FEW, "model": str(tmp_path / "one" / "model")},
    )
    trainer = trainer_of(
        configured(
            "scenes_position_code", small_data, tmp_path / "three", {**FEW, "model": str(two / "model")}
        )
    )
    assert len(trainer.model.student.model.multi_modal_projector._forward_pre_hooks) == 1
    with pytest.raises(InputError, match="position_code"):
        trainer_of(
            configured(
                "scenes_position_code",
                small_data,
                tmp_path / "four",
                {**FEW, "model": str(two / "model"), "position_code": 2.0},
            )
        )


def test_a_folder_whose_run_never_began_is_free(small_data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"recipe": "something else"}')
    part = tmp_path / "run" / ".model.0f3a9c21.part"
    part.mkdir()
    with sole_owner(tmp_path / "run"), pytest.raises(InputError, match="in use"):
        run("scenes_plain", small_data, tmp_path / "run", FEW)
    assert part.exists()
    assert (run("scenes_plain", small_data, tmp_path / "run", FEW) / "done.json").is_file()
    assert not part.exists()
    (tmp_path / "run" / "checkpoint-3").mkdir()  # as if killed while it removed the last one
    run("scenes_plain", small_data, tmp_path / "run", FEW)
    assert not (tmp_path / "run" / "checkpoint-3").exists()


def test_an_unknown_recipe_names_the_nearest(capsys):
    from aligned_mllm.train import main

    assert main(["--recipe", "scenes_virral", "--data", "x", "--output", "y"]) == 2
    assert "scenes_viral" in capsys.readouterr().err


def test_a_malformed_record_is_named_or_left_out(small_data, tmp_path):
    lines = (small_data / "train.jsonl").read_text().splitlines()
    (small_data / "broken.jsonl").write_text("\n".join([lines[0], '{"id": "cut', *lines[1:]]))
    settings = {**FEW, "records": "broken.jsonl", "max_steps": 3}
    with pytest.raises(InputError, match="broken.jsonl:2"):
        run("scenes_plain", small_data, tmp_path / "run", settings)
    run("scenes_plain", small_data, tmp_path / "run", {**settings, "broken_records": "leave_out"})
    assert pd.read_csv(tmp_path / "run" / "left_out.csv")["where"].str.endswith(
        "broken.jsonl:2"
    ).tolist() == [True]


def train_on_a_full_disk(log, words) -> None:
    "No file may grow beyond 1 MiB."
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    train_here(log, words)


def test_a_full_disk_is_one_message_and_a_clean_resume(small_data, tmp_path):
    "The first checkpoint cannot be written."
    words = [word for word in WORDS if "save_steps" not in word] + ["save_steps=2"]
    command = train_words("scenes_viral", small_data, tmp_path / "run", *words)
    process = in_fork(train_on_a_full_disk, tmp_path / "log", command)
    assert process.exitcode == 3 and "run the same command again" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run" / "done.json").exists() and not list(
        (tmp_path / "run").glob("checkpoint-*/whole.json")
    )
    assert train("scenes_viral", small_data, tmp_path / "run", *words)[0] == [0]
    assert checksum(load_file(tmp_path / "run" / "model" / "model.safetensors"))


def test_settings_are_parsed_by_type():
    assert parsed_setting("viral.layers=[1,2]") == ("viral.layers", [1, 2])
    assert parsed_setting("with_images=False") == ("with_images", False)
    assert parsed_setting("viral.teacher=3") == ("viral.teacher", "3")


@dataclass
class WithMore(AlignConfig):
    more: int = 0


def test_an_unknown_setting_names_near_ones_in_python(tmp_path):
    "The constructor keeps its signature, and a subclass may have fields of its own."
    with pytest.raises(InputError, match="setting 'save_step'.*save_steps"):
        AlignConfig(str(tmp_path), use_cpu=True, save_step=3)
    assert list(inspect.signature(AlignConfig).parameters) == [
        item.name for item in fields(AlignConfig) if item.init
    ]
    config = AlignConfig(str(tmp_path), use_cpu=True, save_steps=30)
    assert pickle.loads(pickle.dumps(config)).save_steps == copy.copy(config).save_steps == 30
    assert replace(config, seed=3).seed == 3 and WithMore(str(tmp_path), use_cpu=True, more=2).more == 2
