"""Features on disk: the same as in memory, for every family, in bounded memory, after a kill, and refused
if they are not the requested ones."""

import time

import numpy as np
import pytest
import torch
from conftest import FORKS, in_fork
from family_checks import SIZES, photo
from tiny_models import FAMILIES, tiny

from aligned_mllm.analysis.feature_files import read_features, write_features
from aligned_mllm.analysis.features import features_beside, own_encoder, picture_batch
from aligned_mllm.analysis.checkpoints import LoadedModel
from aligned_mllm.core import InputError, data_folder, load_json, peak_memory, save_json
from aligned_mllm.data.collate import model_inputs
from aligned_mllm.data.records import Records
from aligned_mllm.worlds.scenes import draw, scenes_of
from aligned_mllm.worlds.small_models import embedded_model
from aligned_mllm.models.taps import Taps
from aligned_mllm.teachers.vision import load_teacher, random_teacher

PICTURES = [photo(seed, size) for seed, size in enumerate([*SIZES, (200, 90)])]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_picture_by_picture(family, tmp_path):
    """Rows of each picture, written in batches, are what the model gives for that picture alone, and lie
    where its views say."""
    loaded = LoadedModel(family, *tiny(family))
    teacher = random_teacher(load_teacher("dense"), 0)
    write_features(loaded, PICTURES, tmp_path, {"random": teacher}, encoder=False, batch_size=3)
    kept = read_features(tmp_path)[family]
    for index, image in enumerate(PICTURES):
        batch = picture_batch(loaded.processor, [image])
        rows = (kept.index.picture == index).to_numpy()
        with torch.inference_mode(), Taps(loaded.model, [0, 3]) as taps:
            loaded.model(**model_inputs(batch), use_cache=False)
        for layer in (0, 3):
            assert np.allclose(kept.states(layer)[rows], taps.states(layer, batch["visual_mask"]), atol=2e-4)
        assert np.allclose(
            kept.reference("random")[rows], features_beside(teacher, [image], batch), atol=2e-4
        )
        for view, grid in enumerate(batch["grids"].tolist()):
            places = kept.index[rows & (kept.index["view"] == view).to_numpy()]
            assert places[["row", "column"]].values.tolist() == [
                [row, column] for row in range(grid[0]) for column in range(grid[1])
            ]
    assert (kept.index.shown == 0).any() == (family == "llava_padded")


def test_encoders_that_can_be_run_apart_and_those_that_cannot(tmp_path):
    for family in ("llava", "llava_next", "llava_onevision", "paligemma", "gemma3"):
        loaded = LoadedModel(family, *tiny(family))
        batch = picture_batch(loaded.processor, PICTURES[:2])
        assert features_beside(own_encoder(loaded), PICTURES[:2], batch).shape == (
            int(batch["visual_mask"].sum()),
            own_encoder(loaded).width,
        )
    for family in ("qwen2_5_vl", "internvl", "idefics3"):
        with pytest.raises(InputError, match="encoder=False"):
            write_features(LoadedModel(family, *tiny(family)), PICTURES, tmp_path)


class Drawn:
    "Images that are drawn when they are taken, and the peak memory at each."

    def __init__(self, count: int, pause: float):
        self.scenes = scenes_of("test", 8, seed=5)
        self.count = count
        self.pause = pause
        self.peaks = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        time.sleep(self.pause)
        self.peaks.append(peak_memory())
        return draw(self.scenes[index % 8])


def write(folder, count, pause=0.0, found=None) -> None:
    "Features of the untrained model; where asked, the peak memory after a sixth and at the end."
    drawn = Drawn(count, pause)
    loaded = LoadedModel("model", *embedded_model(data_folder() / "parts"))
    write_features(loaded, drawn, folder, batch_size=8)
    if found:
        save_json([drawn.peaks[len(drawn.peaks) // 6], drawn.peaks[-1]], found)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def test_memory_does_not_grow_with_the_pictures(tmp_path):
    "Five sixths of 900 pictures add less memory than a third of what they leave on disk."
    assert in_fork(write, tmp_path, 900, 0.0, tmp_path / "peaks.json").exitcode == 0
    before, after = load_json(tmp_path / "peaks.json")
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.npy")) / 2**20 * 5 / 6
    assert written > 30 and after - before < written / 3, (before, after, written)


def test_killed_and_started_again_gives_the_same_bytes(tmp_path):
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    write(whole, 60)
    process = FORKS.Process(target=write, args=(broken, 60, 0.02))
    process.start()
    note = broken / "model" / "progress.json"
    while not note.exists() and process.is_alive():
        time.sleep(0.02)
    process.terminate()
    process.join()
    with pytest.raises(InputError, match="of 60 pictures"):
        read_features(broken)
    with open(broken / "model" / "layer_002.npy", "ab") as file:
        file.write(b"half a batch that was not committed")
    write(broken, 60)
    assert contents(whole) == contents(broken) and len(read_features(broken)["model"].states(2)) == 1500


def test_other_weights_settings_and_pictures_are_refused(tmp_path, parts):
    loaded = LoadedModel("model", *embedded_model(parts))
    teachers = {"dense": load_teacher("dense")}
    write_features(loaded, PICTURES, tmp_path, teachers, layers=[1])
    before = contents(tmp_path)
    write_features(loaded, PICTURES, tmp_path, teachers, layers=[1])
    for changed, words in (
        ({"models": LoadedModel("model", *embedded_model(parts, seed=1))}, "checksum"),
        ({"layers": [1, 2]}, "layers"),
        ({"images": PICTURES[:2]}, "pictures"),
        ({"images": PICTURES[::-1]}, "other pictures"),
        ({"teachers": {"dense": random_teacher(load_teacher("dense"), 3)}}, "teachers"),
        ({"dtype": "float16"}, "file type"),
        ({"dtype": "int8"}, "int8"),
        ({"layers": [9]}, "9"),
    ):
        with pytest.raises(InputError, match=words):
            write_features(
                **{
                    "models": loaded,
                    "images": PICTURES,
                    "folder": tmp_path,
                    "teachers": teachers,
                    "layers": [1],
                    **changed,
                }
            )
    assert contents(tmp_path) == before


def test_records_give_each_picture_once(small_data, tmp_path, parts):
    records = Records(small_data / "test.jsonl", small_data)
    write_features(LoadedModel("a/b", *embedded_model(parts)), records, tmp_path, layers=[0], dtype="float16")
    kept = read_features(tmp_path)["a/b"]
    assert kept.index.picture.nunique() == len(
        {name for index in range(len(records)) for name in records[index].images}
    )
    assert kept.states(0).dtype == np.float16 and kept.references == ("encoder",)
