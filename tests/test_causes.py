"Arms that take a gain apart: their teachers, their students, and the plan that compares them."

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from skimage.feature import hog

from aligned_mllm.cli import main
from aligned_mllm.core import InputError, data_folder, load_json
from aligned_mllm.data.collate import Collator, Samples, model_inputs
from aligned_mllm.data.records import Records
from aligned_mllm.experiments import asking
from aligned_mllm.experiments.arms import ARMS
from aligned_mllm.experiments.cause_arms import CAUSE_ARMS
from aligned_mllm.experiments.cause_tables import structure_of_arms
from aligned_mllm.experiments.gradient_runs import GradientListener
from aligned_mllm.experiments.named_plans import PLANS
from aligned_mllm.experiments.plan import Plan
from aligned_mllm.experiments.recipes import WORLDS
from aligned_mllm.models.load import load_model
from aligned_mllm.models.rotary import add_rotary_2d
from aligned_mllm.objectives.base import combine
from aligned_mllm.teachers.vision import load_teacher
from aligned_mllm.train import run
from aligned_mllm.training.config import configured
from aligned_mllm.training.model import with_targets
from aligned_mllm.training.run import trainer_of
from aligned_mllm.training.trainer import TermTrainer
from aligned_mllm.worlds.scene_data import Sizes
from aligned_mllm.worlds.small_models import embedded_model

FEW = {
    "max_steps": 8,
    "logging_steps": 1,
    "eval_steps": 8,
    "save_steps": 4,
    "disable_tqdm": True,
    "per_device_train_batch_size": 8,
}


COMMAND = "experiment --plan causes --quick --seeds 2 --set max_steps=10 --set eval_steps=10".split()


def test_a_patch_of_the_hog_teacher_is_a_block_of_its_own_pixels(small_data):
    "As scikit-image computes it; blocks begin at every cell, and a patch is every second one."
    teacher = load_teacher("hog")
    picture = np.array(Image.open(sorted(small_data.rglob("*.png"))[0]).convert("RGB"))
    view = teacher.pixels_of_view(Image.fromarray(picture), (0, 0, 1, 1), (5, 5))
    (features,) = teacher.features(view[None])
    theirs = torch.from_numpy(hog(picture / 255, 9, (4, 4), (2, 2), feature_vector=False, channel_axis=-1))
    for row, column in ((0, 0), (1, 3), (4, 2)):
        block = theirs[2 * row, 2 * column].flatten().float()
        assert torch.allclose(features[5 * row + column], block, atol=1e-4)
    assert teacher.verify() == load_teacher("hog").checksum and not list(teacher.model.parameters())
    with pytest.raises(InputError, match="no layers"):
        teacher.layer = 0
        teacher.features(torch.zeros(1, 3, 40, 40))


def test_hog_of_another_image_is_a_target(small_data, tmp_path):
    config = configured("scenes_hog_other_image", small_data, tmp_path, FEW)
    trainer = trainer_of(config)
    batch = next(iter(trainer.get_train_dataloader()))
    targets = trainer.model.objectives["viral"].targets([batch])[0]["features"].unflatten(0, (-1, 25))
    names = batch["image_names"]
    teacher = load_teacher("hog")
    own = teacher.features(teacher.pixels([Image.open(small_data / name) for name in names]))
    partner = next(index for index, name in enumerate(names[1:], 1) if name != names[0])
    assert torch.allclose(targets[0], own[partner], atol=1e-5)
    assert not torch.allclose(targets[0], own[0], atol=0.1)


def test_a_stopped_loss_no_longer_pulls(small_data, tmp_path):
    trainer = trainer_of(configured("scenes_stop50", small_data, tmp_path / "run", FEW))
    model = trainer.model
    objective = model.objectives["viral"]
    (batch,) = with_targets([next(iter(trainer.get_train_dataloader()))], model.objectives.values())
    pulls = {}
    for objective.progress in (0.0, 0.49, 0.5, 0.99):
        model.zero_grad()
        combine(model(batch)["terms"]).backward()
        pulls[objective.progress] = max(weight.grad.abs().max().item() for weight in objective.parameters())
        assert model.student.lm_head.weight.grad.abs().max() > 0
    assert pulls[0.0] == pulls[0.49] > 0 == pulls[0.5] == pulls[0.99]


@pytest.mark.parametrize("name", ["rope2d", "visual_norm"])
def test_stage_two_starts_from_the_changed_model_of_stage_one(small_data, tmp_path, name):
    first = run(f"scenes_stage1_{name}", small_data, tmp_path / "first", {**FEW, "eval_strategy": "no"})
    settings = {**FEW, "model": str(first / "model")}
    second = run(f"scenes_{name}_other_image", small_data, tmp_path / "second", settings)
    before = load_model(first / "model")[0].config
    model, _ = load_model(second / "model")
    entry = {"rope2d": "aligned_rotary_2d", "visual_norm": "aligned_visual_norm"}[name]
    assert getattr(model.config, entry) == getattr(before, entry)
    hooks = {
        "rope2d": model.get_decoder().rotary_emb._forward_pre_hooks,
        "visual_norm": model.model.multi_modal_projector._forward_hooks,
    }
    assert len(hooks[name]) == 1  # put on once, not by each stage


def test_2d_positions_hold_in_a_batch_with_padding_and_a_cache(small_data):
    "Greedy answers in a batch padded on the left are those of each question alone."
    model, processor = embedded_model(data_folder() / "parts")
    add_rotary_2d(model)
    samples = Samples(Records(small_data / "test.jsonl", small_data), processor, with_last_answer=False)
    chosen = sorted((samples[index] for index in range(30)), key=lambda sample: len(sample["input_ids"]))
    some = [chosen[0], chosen[-1]]
    assert len(some[0]["input_ids"]) < len(some[1]["input_ids"])
    greedy = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    collate = Collator(0, side="left")
    together = model.generate(**model_inputs(collate(some)), **greedy)[:, -5:]
    for row, sample in zip(together, some):
        alone = model_inputs(collate([sample]))
        for use_cache in (True, False):
            assert torch.equal(model.generate(**alone, **greedy, use_cache=use_cache)[0, -5:], row)


def test_2d_positions_refuse_what_they_cannot_number(small_data):
    model, processor = embedded_model(data_folder() / "parts")
    add_rotary_2d(model)
    samples = Samples(Records(small_data / "test.jsonl", small_data), processor)
    batch = model_inputs(Collator(0)([samples[0]]))
    cache = model(**batch, use_cache=True).past_key_values
    with pytest.raises(InputError, match="in the cache"):
        model(**batch, past_key_values=cache)
    model.model.language_model.rotary_emb = torch.nn.Identity()
    with pytest.raises(InputError, match="rotary_2d"):
        add_rotary_2d(model)


def test_the_structure_of_targets_is_that_of_the_plans_world(tmp_path, monkeypatch):
    "In a world whose teacher is 'hog', VIRAL's targets are those of the arm 'hog' on drawn scenes."
    scenes = WORLDS["scenes"]
    teacher = {"viral": {**scenes.objectives["viral"], "viral.teacher": "hog"}}
    monkeypatch.setitem(WORLDS, "other", replace(scenes, objectives=teacher))
    sizes = Sizes(train=8, captions=2, validation=2, test=8)
    for part in embedded_model(data_folder() / "parts"):
        part.save_pretrained(tmp_path / "seed0" / "plain" / "model")
    values = {}
    for world, arm in (("scenes", "viral"), ("scenes", "hog"), ("other", "viral")):
        plan = Plan(world, ("plain", arm), seeds=1, sizes=sizes)
        values[world, arm] = structure_of_arms(plan, tmp_path, pictures=8).value.tolist()
    assert values["other", "viral"] == values["scenes", "hog"] != values["scenes", "viral"]


def test_every_cause_has_its_baseline_and_a_control_differs_in_one_setting():
    for name in CAUSE_ARMS:
        arm = ARMS[name]
        assert arm.baseline in ARMS and ARMS[arm.baseline].stage1 == (
            arm.stage1 if arm.baseline != "plain" else {}
        )
        if arm.control_of:
            method = ARMS[arm.control_of]
            keys = {*arm.stage2, *method.stage2}
            different = [key for key in keys if arm.stage2.get(key) != method.stage2.get(key)]
            assert len(different) == 1 and arm.baseline == method.baseline, name


@pytest.fixture(scope="module")
def quick_causes(tmp_path_factory):
    "The plan 'causes' at its quick size: two seeds, three arms, a choice between two rates."
    folder = tmp_path_factory.mktemp("causes") / "causes"
    assert main([*COMMAND, "--output", str(folder)]) == 0
    return folder


def test_every_trial_is_kept_and_the_best_one_is_used(quick_causes):
    table = pd.read_csv(quick_causes / "choices.csv")
    assert set(table.seed) == {100} and set(table.learning_rate) == {2e-3, 4e-3}
    choices = load_json(quick_causes / "choices.json")
    assert set(choices) == {"plain", "viral", "other_image", "blind"} and choices["blind"]["like"] == "plain"
    for arm in ("plain", "viral", "other_image"):
        tried = table[(table.arm == arm) & (table.category == "mean")].set_index("learning_rate").accuracy
        assert choices[arm]["learning_rate"] == tried.idxmax()  # the first of equals
        for seed in range(2):
            config = load_json(quick_causes / f"seed{seed}" / arm / "config.json")
            assert config["learning_rate"] == choices[arm]["learning_rate"]
            assert config["objectives"].get("viral", {"weight": 0.5})["weight"] == 0.5
    assert load_json(quick_causes / "seed0" / "blind" / "config.json")["learning_rate"] == (
        choices["plain"]["learning_rate"]
    )


def test_trials_do_not_touch_the_reported_seeds(quick_causes):
    trained = {path.parent for path in quick_causes.glob("choices/seed*/*/config.json")}
    assert {path.parent.name for path in trained} == {"seed100"}
    asked = {load_json(path)["digest"] for path in quick_causes.glob("choices/seed100/*/scores.json")}
    reported = {load_json(path)["digest"] for path in quick_causes.glob("seed*/*/scores.json")}
    assert len(asked) == 1 and len(reported) == 2 and not asked & reported


def test_the_tables_of_causes(quick_causes):
    causes = pd.read_csv(quick_causes / "causes.csv")
    assert set(causes.comparison) == {"gain", "lead"} and set(causes.seeds) == {2}
    scores = pd.read_csv(quick_causes / "scores.csv")
    means = scores.groupby(["seed", "arm"]).accuracy.mean().unstack()
    row = causes[(causes.comparison == "lead") & (causes.category == "mean")].iloc[0]
    assert (row.arm, row.reference) == ("viral", "other_image")
    assert row["mean"] == pytest.approx(100 * (means.viral - means.other_image).mean())
    assert (causes.detectable >= causes.deviation).all()  # two seeds find only far larger differences
    structure = pd.read_csv(quick_causes / "structure.csv")
    structure = structure.pivot(index="measure", columns="arm", values="value")
    assert (structure.viral == structure.other_image).all()
    gradients = pd.read_csv(quick_causes / "gradients.csv")
    assert set(gradients.arm) == {"viral", "other_image"} and gradients.cosine.abs().max() < 1
    assert (gradients.norm_alignment > 0).all() and gradients.step.max() == 9


def test_a_finished_experiment_is_not_made_again(quick_causes, capsys):
    before = {path: path.stat().st_mtime_ns for path in quick_causes.rglob("done.json")}
    assert len(before) == 7 + 2 * 5  # with a stage 1 for each seed
    main([*COMMAND, "--output", str(quick_causes)])
    assert {path: path.stat().st_mtime_ns for path in quick_causes.rglob("done.json")} == before
    with pytest.raises(SystemExit):
        main(["experiment", "--plan"])
    assert main(["experiment", "--plan", "reasons"]) == 2
    assert f"one of {list(PLANS)}" in capsys.readouterr().err


def test_a_run_made_again_with_the_listener_has_the_same_losses(small_data, tmp_path):
    settings = {**FEW, "seed": 0, "save_strategy": "no", "eval_strategy": "no"}
    losses = []
    for steps in ((), (0, 3, 7)):
        trainer = trainer_of(configured("scenes_viral", small_data, tmp_path / str(len(steps)), settings))
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
        listener = GradientListener(steps, [batch])
        trainer.add_callback(listener)
        TermTrainer.train(trainer)
        losses.append([row["loss_viral"] for row in trainer.state.log_history if "loss_viral" in row])
        assert [row["step"] for row in listener.rows] == list(steps)
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_many_runs_are_asked_at_the_same_time(quick_causes, tmp_path, monkeypatch):
    "By other processes, with the scores that one process gives."
    monkeypatch.setattr(asking, "FEW", 2)
    runs = []
    for arm in ("plain", "viral"):
        copy = shutil.copytree(quick_causes / "seed0" / arm, tmp_path / arm)
        for name in ("scores.json", "scores.csv", "answers.jsonl"):
            (copy / name).unlink()
        runs.append((copy, quick_causes / "data" / "seed0", "test.jsonl"))
    assert asking.ask_runs(runs, workers=2) == 2 and asking.ask_runs(runs, workers=2) == 0
    for copy, *_ in runs:
        assert (copy / "scores.csv").read_text() == (
            quick_causes / "seed0" / copy.name / "scores.csv"
        ).read_text()
