"Arms that take a gain apart: their teachers, their students, and the plan that compares them."

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.feature import hog

from aligned_mllm.core import InputError, data_folder
from aligned_mllm.data.collate import Collator, Samples, model_inputs
from aligned_mllm.data.records import Records
from aligned_mllm.experiments.arms import ARMS
from aligned_mllm.experiments.cause_arms import CAUSE_ARMS
from aligned_mllm.models.load import load_model
from aligned_mllm.models.rotary import add_rotary_2d
from aligned_mllm.objectives.base import combine
from aligned_mllm.teachers.vision import load_teacher
from aligned_mllm.train import run
from aligned_mllm.training.config import configured
from aligned_mllm.training.model import with_targets
from aligned_mllm.training.run import trainer_of
from aligned_mllm.worlds.small_models import embedded_model

FEW = {
    "max_steps": 8,
    "logging_steps": 1,
    "eval_steps": 8,
    "save_steps": 4,
    "disable_tqdm": True,
    "per_device_train_batch_size": 8,
}


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
