"""The numbers of training, kept: a small stored curve of four arms, recorded before the objectives became a
contract and equal to the last digit after it. On another processor the last digits may differ."""

from pathlib import Path

import pandas as pd

from aligned_mllm.train import run
from aligned_mllm.worlds.scene_data import Sizes, write_scenes

STORED = pd.read_csv(Path(__file__).parent / "curves" / "scenes.csv")
FEW = {
    "max_steps": 12,
    "logging_steps": 1,
    "eval_steps": 12,
    "save_steps": 12,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "seed": 0,
    "disable_tqdm": True,
    "use_cpu": True,
}


def test_curves_are_those_that_were_stored(tmp_path):
    data = write_scenes(tmp_path / "data", seed=0, sizes=Sizes(train=64, captions=8, validation=8, test=4))
    frames = []
    for arm in STORED.arm.unique():
        folder = run(f"scenes_{arm}", data, tmp_path / arm, FEW)
        frames.append(pd.read_csv(folder / "curves.csv").assign(arm=arm))
    keys = ["arm", "step", "name"]
    both = STORED.merge(pd.concat(frames), on=keys, suffixes=("_stored", ""), how="left")
    assert len(both) == len(STORED) and both.value.notna().all()
    difference = (both.value - both.value_stored).abs()
    assert (difference <= 2e-4 * both.value_stored.abs().clip(lower=1)).all(), both[difference > 0]
