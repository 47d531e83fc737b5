"The desk: known parts from made-up packages, convolutional vision towers, and its recipes on tiny models."

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_nlvr import write_small_nlvr
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    EfficientNetConfig,
    EfficientNetModel,
    ResNetConfig,
    ResNetModel,
)

from aligned_mllm.core import InputError, load_json, save_json
from aligned_mllm.evals.task import score_run
from aligned_mllm.experiments.choice import Choice
from aligned_mllm.experiments.jobs import graph_of
from aligned_mllm.experiments.named_plans import PLANS
from aligned_mllm.experiments.plan import Plan, prepare_data, quick_plan
from aligned_mllm.experiments.recipes import WORLDS
from aligned_mllm.experiments.run import experiment, space_needed
from aligned_mllm.models import known_parts
from aligned_mllm.models.grid_vision import GridVisionConfig, GridVisionModel
from aligned_mllm.models.known_parts import (
    KNOWN_PARTS,
    efficientnet_name,
    part_digest,
    part_source,
    resnet_name,
)
from aligned_mllm.models.load import load_model
from aligned_mllm.reporting.experiment_report import print_summary
from aligned_mllm.train import main as train
from aligned_mllm.training.config import configured
from aligned_mllm.training.dry_run import student_shape
from aligned_mllm.training.run import run
from aligned_mllm.training.run_folder import bytes_to_save
from aligned_mllm.training.tiny_parts import tiny_part
from aligned_mllm.worlds.cutouts import draw_cutouts

LITE = EfficientNetConfig(
    width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, hidden_act="relu6", image_size=224
)


@pytest.fixture()
def cache(tmp_path, monkeypatch) -> Path:
    "An empty cache for converted parts, without packages and without a network."
    monkeypatch.setenv("ALIGNED_MLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known_parts, "hub_has", lambda name: False)
    for part in KNOWN_PARTS.values():
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
        sys.modules.pop(part.module, None)
    return tmp_path / "cache"


def package(tmp_path: Path, name: str, content: bytes | dict) -> Path:
    "The package of a known part with one file: bytes, or a state dict."
    part = KNOWN_PARTS[name]
    file = tmp_path / "site" / part.module / part.pattern.replace("*", "weights")
    file.parent.mkdir(parents=True)
    (tmp_path / "site" / part.module / "__init__.py").touch()
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    return file


def state_of(model: nn.Module, names: list[str], renamed) -> dict:
    "The weights of a model under a package's names."
    state = model.state_dict()
    return {name: state[renamed(name)].clone() for name in names}


def lite_names() -> list[str]:
    "The names of EfficientNet-Lite0's weights, without its classifier."
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["_conv_stem.weight", "_conv_head.weight"]
    names += [f"{layer}.{each}" for layer in ("_bn0", "_bn1") for each in norm]
    for block in range(16):
        layers = ["_depthwise_conv", "_project_conv", *["_expand_conv"] * (block > 0)]
        names += [f"_blocks.{block}.{layer}.weight" for layer in layers]
        norms = ["_bn1", "_bn2", *["_bn0"] * (block > 0)]
        names += [f"_blocks.{block}.{layer}.{each}" for layer in norms for each in norm]
    return names


def resnet_names() -> list[str]:
    "The names of the first three stages of torchvision's ResNet-50."
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1.weight", *[f"bn1.{each}" for each in norm]]
    for stage, blocks in ((1, 3), (2, 4), (3, 6)):
        for block in range(blocks):
            place = f"layer{stage}.{block}"
            names += [f"{place}.conv{number}.weight" for number in (1, 2, 3)]
            names += [f"{place}.bn{number}.{each}" for number in (1, 2, 3) for each in norm]
            if block == 0:
                names += [f"{place}.downsample.0.weight", *[f"{place}.downsample.1.{each}" for each in norm]]
    return names


def test_efficientnet_lite_is_converted_whole_and_its_factors_are_one(cache, tmp_path):
    torch.manual_seed(0)
    model = EfficientNetModel(LITE).eval()
    for value in model.buffers():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    names = lite_names()
    package(
        tmp_path,
        "efficientnet_lite0",
        {**state_of(model, names, efficientnet_name), "_fc.bias": torch.ones(2)},
    )
    tower = AutoModel.from_pretrained(part_source("efficientnet_lite0")).eval()
    pixels = torch.randn(1, 3, 64, 64)
    found = tower(pixels).last_hidden_state
    for block in model.encoder.blocks:
        block.squeeze_excite = nn.Identity()
    wanted = model(pixels).last_hidden_state.flatten(2).transpose(1, 2)
    assert torch.equal(found, wanted) and found.shape == (1, 4, 1280)
    assert len(names) == len([name for name in model.state_dict() if "squeeze" not in name])


def test_augnet_is_converted_whole(cache, tmp_path):
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig(hidden_sizes=[256, 512, 1024], depths=[3, 4, 6])).eval()
    names = resnet_names()
    state = {f"module.pre.{name}": value for name, value in state_of(model, names, resnet_name).items()}
    package(
        tmp_path,
        "augnet",
        {**state, "module.pre.layer4.0.conv1.weight": torch.ones(2), "module.pre.fc.bias": torch.ones(2)},
    )
    tower = AutoModel.from_pretrained(part_source("augnet")).eval()
    pixels = torch.randn(1, 3, 64, 64)
    wanted = nn.functional.avg_pool2d(model(pixels).last_hidden_state, 2).flatten(2).transpose(1, 2)
    assert torch.equal(tower(pixels).last_hidden_state, wanted)
    assert len(names) == len(model.state_dict())


def refused(name: str) -> str:
    with pytest.raises(InputError) as caught:
        part_source(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", KNOWN_PARTS)
def test_a_part_without_its_package_names_the_command(cache, name):
    assert f"pip install --no-deps {KNOWN_PARTS[name].packages}" in refused(name)


def test_a_damaged_package_leaves_nothing_behind(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(
        known_parts, "find_spec", lambda name, find=known_parts.find_spec: name == "gguf" or find(name)
    )
    package(tmp_path, "smollm2", b"GGUF" + bytes(50))
    assert "weights.gguf cannot be converted" in refused("smollm2")
    package(tmp_path, "augnet", {"module.pre.conv1.weight": torch.ones(2)})
    assert "model.pth cannot be converted" in refused("augnet")
    assert not any(cache.iterdir())


def test_gguf_needs_its_reader(cache, tmp_path, monkeypatch):
    package(tmp_path, "smollm2", b"GGUF")
    monkeypatch.setattr(
        known_parts,
        "find_spec",
        lambda name, find=known_parts.find_spec: None if name == "gguf" else find(name),
    )
    assert "pip install --no-deps gguf" in refused("smollm2")


def test_a_full_disk_and_changed_weights_are_refused(cache, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig(hidden_sizes=[256, 512, 1024], depths=[3, 4, 6]))
    state = state_of(model, resnet_names(), resnet_name)
    package(tmp_path, "augnet", {f"module.pre.{name}": value for name, value in state.items()})
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
        assert "1 MiB free" in refused("augnet")
    with monkeypatch.context() as full:  # later than the check of the space

        def write_nothing(*_, **__):
            raise OSError(28, "No space left on device")

        full.setattr(GridVisionModel, "save_pretrained", write_nothing)
        assert "No space left on device" in refused("augnet") and not any(cache.iterdir())
    folder = Path(part_source("augnet"))
    assert part_source("augnet") == str(folder)  # the same folder, not made again
    read = []
    digest = known_parts.weights_digest
    monkeypatch.setattr(known_parts, "weights_digest", lambda folder: read.append(folder) or digest(folder))
    assert part_digest("augnet") == digest(folder) and read == [folder]
    assert part_digest(str(folder)) == digest(folder) and read == [folder, str(folder)]
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "as converted" in refused("augnet") and "delete that folder" in refused("augnet")
    with pytest.raises(InputError, match="as converted"):
        part_digest("augnet")


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> dict[str, Path]:
    "A small world of drawn cut-outs, and tiny parts of the hub's classes."
    root = tmp_path_factory.mktemp("desk")
    draw_cutouts(root / "cutouts")
    plan = quick_plan("desk", source=str(root / "cutouts"))
    data = prepare_data(plan, root, 0)
    lines = (data / "captions.jsonl").read_text().splitlines()
    sentences = [turn["value"] for line in lines for turn in json.loads(line)["conversations"]]
    names = ("HuggingFaceTB/SmolLM2-135M-Instruct", "openai/clip-vit-base-patch16", "facebook/dinov2-small")
    parts = [tiny_part(name, root / "parts", sentences) for name in names]
    grid = root / "parts" / "grid"
    network = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, layer_type="basic")
    GridVisionModel(GridVisionConfig(network, image_size=64, hidden_size=16)).save_pretrained(grid)
    settings = load_json(parts[1] / "preprocessor_config.json")
    size = {"height": 64, "width": 64}
    (grid / "preprocessor_config.json").write_text(json.dumps({**settings, "size": size, "crop_size": size}))
    return {
        "root": root,
        "data": data,
        "language": parts[0],
        "clip": parts[1],
        "dinov2": parts[2],
        "grid": grid,
    }


@pytest.mark.parametrize("world", ["desk", "desk_hub"])
def test_a_world_asks_for_the_space_of_its_runs(world):
    "Counted from the real shapes: weights of the model, two checkpoints, and what a run keeps free beside."
    config = configured("desk_hub_stage1", "nowhere", "unused")
    student = student_shape(config)
    if world == "desk":
        with torch.device("meta"):
            student.model.vision_tower = GridVisionModel(GridVisionConfig(LITE, hidden_size=1280))
        student.model.vision_tower.requires_grad_(False)
    finished, training = WORLDS[world].run_mib, WORLDS[world].training_mib
    weights = sum(value.numel() for value in student.parameters()) * 4 / 2**20
    assert weights < finished < weights + 50
    needed = bytes_to_save(config, student, 0) / 2**20
    assert needed < finished + training < needed + 100


def test_an_experiment_needs_space_for_what_is_left(cache, tmp_path, monkeypatch):
    "Runs that are not done, and checkpoints of as many as train at a time; refused before data are made."
    plan = Plan("desk", seeds=2, source=str(tmp_path / "nothing"))  # stage 1, three arms and the blind one
    needed = [space_needed(plan, tmp_path, workers) / 2**20 for workers in (1, 3, 99)]
    assert needed == [256 + 10 * 560 + count * 3200 for count in (1, 3, 10)]
    for arm in ("stage1", "plain"):
        save_json({}, tmp_path / "seed0" / arm / "done.json")
    assert space_needed(plan, tmp_path, 3) / 2**20 == 256 + 8 * 560 + 3 * 3200
    choice = replace(plan, choice=Choice(rates=(1e-4, 2e-4), weights=(0.5,), seeds=(100,)))
    # a stage 1, and two rates for 'plain' and for each kind of target
    assert space_needed(choice, tmp_path, 3) / 2**20 == 256 + (8 + 1 + 2 * 3) * 560 + 3 * 3200
    usage = shutil.disk_usage(tmp_path)
    for free, said in ((-1, "MiB free at"), (0, "is not on this machine")):
        free += space_needed(plan, tmp_path, 3)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
        with pytest.raises(InputError, match=said):
            experiment(tmp_path, plan, workers=3)


SHORT = {"max_steps": 2, "logging_steps": 1, "save_steps": 2, "use_cpu": True, "disable_tqdm": True}


def test_the_hub_recipes_run_on_tiny_parts(desk, tmp_path, capsys):
    parts = {"vision_tower": str(desk["clip"]), "language_model": str(desk["language"])}
    run("desk_hub_stage1", desk["data"], tmp_path / "s1", {**SHORT, **parts})
    more = {
        "model": str(tmp_path / "s1" / "model"),
        "viral.layers": [4],
        "viral.teacher": str(desk["dinov2"]),
    }
    settings = {**SHORT, **more, "eval_steps": 2}
    run("desk_hub_viral", desk["data"], tmp_path / "s2", settings)
    table = score_run(tmp_path / "s2", desk["data"])
    unseen = score_run(tmp_path / "s2", desk["data"], "unseen.jsonl")
    assert (tmp_path / "s2" / "scores_unseen.csv").is_file() and len(table) == len(unseen) == 6
    tokenizer = AutoTokenizer.from_pretrained(desk["language"])
    assert "<|im_start|>" in load_model(tmp_path / "s2" / "model")[1].apply_chat_template(
        [{"role": "user", "content": "x"}]
    )
    assert tokenizer.eos_token == "<|im_end|>"


def test_statements_of_people_are_learnt_and_asked_with_the_desks_parts(desk, tmp_path):
    write_small_nlvr(tmp_path / "clone", "dev", 12)
    write_small_nlvr(tmp_path / "clone", "test", 4)
    plan = quick_plan("desk_nlvr", source=str(tmp_path / "clone"))
    data = prepare_data(plan, tmp_path, 0)
    parts = {"vision_tower": str(desk["grid"]), "language_model": str(desk["language"]), "bf16": False}
    run("desk_nlvr_stage1", data, tmp_path / "s1", {**SHORT, **parts})
    settings = {**SHORT, "model": str(tmp_path / "s1" / "model"), "eval_steps": 2, "bf16": False}
    run("desk_nlvr", data, tmp_path / "s2", settings)
    table = score_run(tmp_path / "s2", data)
    assert table.accuracy.between(0, 1).all() and len(table) >= 1


def test_the_hub_recipe_has_a_dry_run(capsys):
    assert train(["--recipe", "desk_hub_stage1", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "450" in said and "language_model" in said


def test_a_model_with_a_convolutional_tower_is_trained_kept_and_marked(desk, tmp_path):
    "Kept features change no loss; the export is refused by transformers alone, and loads here."
    losses = {}
    statistics = {}
    for mib in (0, 8):
        settings = {"vision_tower": str(desk["grid"]), "language_model": str(desk["language"])}
        settings |= {"keep_features_mib": mib, "bf16": False, "max_steps": 4}
        output = tmp_path / f"kept{mib}"
        run("desk_stage1", desk["data"], output, {**SHORT, **settings})
        rows = [line.split(",") for line in (output / "curves.csv").read_text().splitlines()]
        losses[mib] = [row[2] for row in rows if row[1] == "loss_text"]
        model, _ = load_model(output / "model")
        statistics[mib] = model.model.vision_tower.state_dict()
    assert losses[0] == losses[8] and len(losses[0]) == 4
    start = AutoModel.from_pretrained(desk["grid"]).state_dict()
    assert all(torch.equal(start[name], statistics[0][name]) for name in start)  # batch statistics included
    config = load_json(output / "model" / "config.json")
    assert (
        config["model_type"] == "aligned_llava"
        and "load_model" in (output / "model" / "README.md").read_text()
    )


def test_features_are_kept_only_for_a_frozen_convolutional_tower(desk, tmp_path):
    parts = {
        "vision_tower": str(desk["clip"]),
        "language_model": str(desk["language"]),
        "keep_features_mib": 8,
    }
    for more in ({}, {"vision_tower": str(desk["grid"]), "stage": 3}):
        settings = {**SHORT, **parts, "bf16": False, **more}
        with pytest.raises(InputError, match="keep_features_mib 8 for a (CLIPVision|GridVision)"):
            run("desk_stage1", desk["data"], tmp_path / "run", settings)


def test_the_desk_asks_for_cut_outs(tmp_path):
    with pytest.raises(InputError, match="apt install tuxpaint-stamps-default"):
        prepare_data(Plan("desk", source=str(tmp_path / "nowhere")), tmp_path, 0)


def test_the_short_job_about_words_runs_from_nothing_to_its_report(desk, tmp_path, capsys):
    "Plain and blind start from the parts, SEA from a projector that learnt words without a text loss."
    parts = {"vision_tower": str(desk["grid"]), "language_model": str(desk["language"])}
    plan = quick_plan(
        "desk_words",
        arms=("plain", "sea"),
        source=str(desk["root"] / "cutouts"),
        settings={"bf16": False},
        stage1={**WORLDS["desk_words"].quick["stage1"], **parts, "bf16": False},
    )
    page = experiment(tmp_path, plan, "the command", workers=2)
    runs = {path.parent.name: path.parent for path in (tmp_path / "seed0").glob("*/done.json")}
    assert {*runs} == {"plain", "blind", "stage1_sea", "sea"}
    audit = {name: load_json(run / "parameters.json") for name, run in runs.items()}
    trained = {name: {part for part, row in each.items() if row["trained"]} for name, each in audit.items()}
    assert trained["stage1_sea"] == {"projector", "sea"} and trained["plain"] == {
        "projector",
        "language_model",
    }
    curves = pd.read_csv(runs["stage1_sea"] / "curves.csv").groupby("name").value.max()
    assert curves.loss_sea > 0 == curves.loss_text
    start = {name: load_json(runs[name] / "config.json")["model"] for name in ("plain", "blind", "sea")}
    assert start == {"plain": "composed", "blind": "composed", "sea": str(runs["stage1_sea"] / "model")}
    tokens = pd.read_csv(tmp_path / "caption_tokens.csv")
    assert {*tokens.records} == {"test_captions", "unseen_captions"} and {*tokens.arm} == {*plan.runs}
    assert {*tokens.way[tokens.arm == "blind"]} == {"no picture"}
    assert {*tokens.way[tokens.arm == "sea"]} == {"picture", "other picture", "no picture"}
    assert tokens.record[tokens.records == "test_captions"].nunique() == 6
    cost = pd.read_csv(tmp_path / "cost.csv").set_index(["arm", "stage"])
    assert {*cost.index} >= {("plain", 2), ("stage1_sea", 1), ("sea", 2)} and ("plain", 1) not in cost.index
    text = page.read_text(encoding="utf-8")
    for heading in WORLDS["desk_words"].caption_tests.values():
        assert text.count(f"<h2>{heading}</h2>") == 1
    assert "Far too short" in text and "the command" in text and "pictures of one seed" in text
    print_summary(tmp_path)
    assert "other picture" in capsys.readouterr().out
    times = {run: (run / "done.json").stat().st_mtime_ns for run in runs.values()}
    experiment(tmp_path, plan, workers=1)
    assert times == {run: (run / "done.json").stat().st_mtime_ns for run in runs.values()}


def test_sea_and_its_controls_have_equal_steps_and_differ_in_their_words():
    plan = Plan("desk_words", **PLANS["sea_controls"])
    jobs = {job.output.name: job for job in graph_of(plan, Path("nowhere")).jobs}
    assert {job.steps for name, job in jobs.items() if name.startswith("stage1")} == {500}
    assert {job.steps for name, job in jobs.items() if not name.startswith("stage1")} == {60}
    first = jobs["stage1_sea"].settings
    for name, target in (("sea_other_image", "other_image"), ("sea_shuffled", "shuffled")):
        assert jobs[f"stage1_{name}"].settings == {**first, "sea.target": target}
        assert jobs[name].after == jobs[f"stage1_{name}"].output
    assert jobs["plain"].after is None is jobs["blind"].after and "stage1" not in jobs
    with pytest.raises(InputError, match="a choice by answers"):
        Plan("desk_words", **PLANS["causes"])
