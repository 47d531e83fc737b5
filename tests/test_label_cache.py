"""The label cache: labels are the same bits with and without it, after stops at any moment and with several
writers; what it refuses, as a table; and its size against the formula."""

import gc
import os
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FORKS
from PIL import Image
from tiny_models import tiny

from aligned_mllm.core import InputError
from aligned_mllm.data.collate import Collator, Samples
from aligned_mllm.data.open import KeptRecords
from aligned_mllm.data.record import Record, Turn
from aligned_mllm.data.records import Records, write_records
from aligned_mllm.teachers.cache import ContentStore, FeatureCache
from aligned_mllm.teachers.cached_labels import CachedLabels, label_records
from aligned_mllm.teachers.exact_labels import ExactLabeller
from aligned_mllm.teachers.joint_space import JointSpace, tiny_joint_space
from aligned_mllm.teachers.label_cache import LabelCache, PackedLabels, view_geometry
from aligned_mllm.teachers.labeller import Labeller
from aligned_mllm.teachers.patch_labels import Labels
from aligned_mllm.teachers.pixels import shows_picture
from aligned_mllm.teachers.targets import BatchView, views_in
from aligned_mllm.teachers.vision import load_teacher
from aligned_mllm.teachers.words import TEMPLATES, WordList
from aligned_mllm.worlds.known_objects import KnownObjects
from aligned_mllm.worlds.scene_data import Sizes, write_scenes

WORDS = WordList(("circle", "square", "triangle", "cross", "red", "blue", "green", "yellow", "old", "new"))
WHOLE = (0.0, 0.0, 1.0, 1.0)
NAMES = [f"{number}.png" for number in range(7)]


@pytest.fixture(scope="module")
def space() -> JointSpace:
    return tiny_joint_space(WORDS, seed=3)


@pytest.fixture(scope="module")
def labeller(space) -> Labeller:
    return Labeller(space, WORDS, n=4, threshold=0.02)  # patches have 0 to 4 labels


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    "Pictures of several shapes, and a record for each."
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate(NAMES):
        coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
        size = [(40, 40), (60, 30), (30, 60)][seed % 3]
        Image.fromarray(coarse).resize(size, Image.BICUBIC).save(folder / name)
    turns = (Turn("<image>describe", "two shapes"),)
    write_records([Record(name, (name,), turns) for name in NAMES], folder / "train.jsonl")
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", 0, Sizes(4, 8, 2, 2))


class Counting:
    "A labeller that counts its views, and stops after some calls as Ctrl-C would."

    def __init__(self, labeller, calls: int = 10**6):
        self.labeller = labeller
        self.calls = calls
        self.views = 0

    def __getattr__(self, name):
        return getattr(self.labeller, name)

    def labels(self, views, pixels=None):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        self.views += len(views)
        return self.labeller.labels(views, pixels)


def with_pixels(labeller, folder: Path, views: list[BatchView]) -> list:
    return [labeller.pixels_of_view(Image.open(folder / name), box, grid) for name, box, grid in views]


def same(one: Labels, other: Labels) -> bool:
    return torch.equal(one.words, other.words) and torch.equal(one.scores, other.scores)


def rounded(labels: Labels) -> Labels:
    return Labels(labels.words, labels.scores.half().float())


def put_all(cache: LabelCache, labeller, folder: Path, names=NAMES, grid=(5, 5)) -> None:
    for name in names:
        views = [BatchView(name, WHOLE, grid)]
        labels = labeller.labels(views, with_pixels(labeller, folder, views))
        assert cache.put(folder / name, WHOLE, grid, PackedLabels.of(labels))


def message(function, *arguments, **keywords) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text
    return text


# Packing


def test_packed_labels_are_the_labels_with_rounded_scores():
    random = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 6, (500,), generator=random)
    there = torch.arange(5) < counts[:, None]
    words = torch.randint(0, 2**31 - 1, (500, 5), generator=random).where(there, -1)
    scores = 10 ** (6 * torch.rand(500, 5, generator=random) - 5)
    scores = scores.sort(dim=1, descending=True).values.where(there, 0.0)
    packed = PackedLabels.of(Labels(words, scores))
    assert packed.nbytes == 500 + 6 * int(counts.sum())
    found = packed.labels(5)
    assert torch.equal(found.words, words) and torch.equal(found.scores, scores.half().float())
    assert (found.scores.diff(dim=1) <= 0).all() and torch.equal(found.scores > 0, words >= 0)
    assert same(found, PackedLabels.of(found).labels(5))  # rounding again changes nothing
    tiny_score = PackedLabels.of(Labels(torch.tensor([[3]]), torch.tensor([[1e-30]]))).labels(1)
    assert 0 < tiny_score.scores.item() < 1e-7
    one = torch.tensor([[1]])
    for faulty in (
        Labels(torch.tensor([[-1, 3]]), torch.tensor([[0.0, 1.0]])),
        Labels(torch.zeros(1, 256, dtype=torch.long), torch.ones(1, 256)),
        *(Labels(one, torch.tensor([[value]])) for value in (0.0, -1.0, 70_000.0, torch.inf, torch.nan)),
    ):
        assert "labels" in message(PackedLabels.of, faulty)


# The same labels with and without


VIEWS = [
    BatchView("0.png", WHOLE, (5, 5)),
    BatchView("1.png", (0.0, -0.5, 1.0, 1.5), (6, 6)),  # padded
    BatchView("2.png", (0.0, 0.0, 0.5, 1.0), (3, 6)),
    BatchView("0.png", WHOLE, (5, 5)),  # again
    BatchView("2.png", (0.5, 0.0, 1.0, 1.0), (3, 6)),
]


@pytest.mark.parametrize("scorer", ["surgery", "value_path", "negated_cosine"])
def test_labels_are_bitwise_equal_with_and_without_caches(space, pictures, tmp_path, scorer):
    labeller = Labeller(space, WORDS, scorer, n=4)
    pixels = with_pixels(labeller, pictures, VIEWS)
    wanted = rounded(labeller.labels(VIEWS, pixels))
    assert not wanted.empty.all() and wanted.empty.any()
    counting = Counting(labeller)
    for caches in ({}, {"cache_mib": 0}):
        assert same(CachedLabels(labeller, **caches).labels(VIEWS, pixels), wanted)
    memory = CachedLabels(counting)
    assert same(memory.labels(VIEWS, pixels), wanted) and counting.views == 4  # each different view once
    assert same(memory.labels(VIEWS), wanted) and counting.views == 4
    assert memory.labels([]).words.shape == (0, 4)
    for times, absent in (1, 4), (2, 0):  # a cold cache, then a warm one of another process
        disk = LabelCache(tmp_path / scorer, counting)
        cached = CachedLabels(counting, 0, disk, pictures)
        assert same(cached.labels(VIEWS, pixels if times == 1 else None), wanted)
        assert disk.counts["absent"] == absent and len(disk) == 4
        disk.flush()
    assert counting.views == 8
    assert same(CachedLabels(counting, 0, disk, pictures, complete=True).labels(VIEWS), wanted)


def test_exact_labels_are_cached_like_others(scenes, tmp_path):
    exact = ExactLabeller(KnownObjects(scenes))
    views = [BatchView(f"images/captions-{number:05d}.png", WHOLE, (5, 5)) for number in range(8)]
    cache = LabelCache(tmp_path / "exact", exact, tiny("llava")[1])
    report = label_records(Records(scenes / "captions.jsonl"), cache, most=1)
    assert 0.2 < report["without_label"] < 0.9 and report["views"] == 8
    wanted = rounded(exact.labels(views))
    cached = CachedLabels(exact, 0, cache, scenes, complete=True)
    grids = {view.grid for view in views_in(batch_of(scenes / "captions.jsonl", tiny("llava")[1]))}
    moved = [view._replace(grid=grid) for view in views for grid in grids]
    assert len(grids) == 1 and same(cached.labels(moved), rounded(exact.labels(moved)))
    assert same(CachedLabels(exact).labels(views), wanted)


def batch_of(path: Path, processor, labeller=None) -> dict:
    made = {} if labeller is None else {"sea": labeller.pixels_of_view}
    samples = Samples(Records(path), processor, view_pixels=made)
    return Collator(0)([samples[index] for index in range(len(samples))])


@pytest.mark.parametrize("family", ["llava", "llava_padded", "llava_next", "qwen2_5_vl", "smolvlm"])
def test_the_views_labelled_ahead_are_those_of_training(labeller, pictures, tmp_path, family):
    _, processor = tiny(family)
    cache = LabelCache(tmp_path / "labels", labeller, processor)
    report = label_records(Records(pictures / "train.jsonl"), cache)
    batch = batch_of(pictures / "train.jsonl", processor, labeller)
    views = views_in(batch)
    ready = CachedLabels(labeller, 0, cache, pictures, complete=True)
    assert ready.pixels_of_view is None
    labels = labeller.labels(views, batch["view_pixels"]["sea"])
    assert same(ready.labels(views), rounded(labels))
    shown = torch.cat([shows_picture(view.box, view.grid) for view in views])
    assert report["without_label"] == pytest.approx(labels.empty[shown].float().mean().item(), abs=1e-6)
    assert report["views"] == len(views) and report["patches"] == sum(a * b for _, _, (a, b) in views)


def test_objective_side_attributes_are_the_labellers(labeller):
    cached = CachedLabels(labeller)
    for name in ("n", "name", "words", "rule", "remedy", "pixels_of_view"):
        assert getattr(cached, name) == getattr(labeller, name)
    assert cached.verify() == labeller.verify() and cached.signature() == labeller.signature()


# Stops


def test_an_interrupted_labelling_resumes(labeller, pictures, tmp_path):
    _, processor = tiny("llava")
    records = Records(pictures / "train.jsonl")
    whole = LabelCache(tmp_path / "whole", labeller, processor)
    assert label_records(records, whole, batch=2)["labelled"] == whole.patches > 0
    stopped = Counting(labeller, calls=2)
    with pytest.raises(KeyboardInterrupt):
        label_records(records, LabelCache(tmp_path / "labels", stopped, processor), batch=2)
    assert stopped.views == 4
    rest = Counting(labeller)
    cache = LabelCache(tmp_path / "labels", rest, processor)
    assert len(cache) == 4
    label_records(records, cache, batch=2)
    assert rest.views == 3
    views = views_in(batch_of(pictures / "train.jsonl", processor))
    for view in views:
        one, other = (each.get(pictures / view.image, *view[1:]).labels(4) for each in (whole, cache))
        assert same(one, other)


def test_half_written_files_are_never_read(labeller, pictures, tmp_path):
    cache = LabelCache(tmp_path / "labels", labeller)
    put_all(cache, labeller, pictures, NAMES[:3])
    cache.flush()
    (shard,) = (tmp_path / "labels" / "shards").glob("*.safetensors")
    content = shard.read_bytes()
    for number, length in enumerate((0, 8, 100, len(content) // 2, len(content))):
        (shard.parent / f".{number}{shard.name}.part").write_bytes(content[:length])
    again = LabelCache(tmp_path / "labels", labeller)
    assert len(again) == 3 and again.size == len(content)


def write_views(folder, pictures) -> None:
    "Labels of ever more grids, a shard for each, until it is stopped."
    labeller = Labeller(tiny_joint_space(WORDS, seed=3), WORDS, n=4, threshold=0.02)
    cache = LabelCache(folder, labeller)
    for side in range(40, 400):
        words = torch.full((side * side, 4), side)
        packed = PackedLabels.of(Labels(words, torch.ones(side * side, 4)))
        cache.put(pictures / NAMES[0], WHOLE, (side, side), packed)
        cache.flush()


def test_a_killed_writer_leaves_whole_shards(labeller, pictures, tmp_path):
    shards = tmp_path / "labels" / "shards"
    process = FORKS.Process(target=write_views, args=(tmp_path / "labels", pictures))
    process.start()
    while len(list(shards.glob("*.safetensors"))) < 3:
        assert process.is_alive()
    until = time.time() + 20
    while time.time() < until and not list(shards.glob(".*.part")):
        pass
    process.kill()
    process.join()
    assert process.exitcode < 0
    cache = LabelCache(tmp_path / "labels", labeller)
    assert len(cache) == len(list(shards.glob("*.safetensors"))) >= 3
    for side in range(40, 40 + len(cache)):
        found = cache.get(pictures / NAMES[0], WHOLE, (side, side))
        assert len(found.counts) == side * side and (found.words == side).all()


def test_the_rest_is_written_at_the_end_and_by_its_own_process(labeller, pictures, tmp_path):
    cache = LabelCache(tmp_path / "labels", labeller)
    put_all(cache, labeller, pictures)
    child = os.fork()
    if child == 0:  # a worker that ends must not write what its parent has in memory
        del cache
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert not list(tmp_path.glob("labels/shards/*"))
    del cache
    gc.collect()
    assert len(LabelCache(tmp_path / "labels", labeller)) == 7


def test_labels_wait_no_longer_than_a_shard_or_a_minute(labeller, pictures, tmp_path):
    cache = LabelCache(tmp_path / "labels", labeller)
    none = PackedLabels.of(Labels(torch.full((1, 4), -1), torch.zeros(1, 4)))
    for number in range(1025):
        cache.put(pictures / NAMES[0], (0.0, 0.0, 1.0 + number, 1.0), (1, 1), none)
    assert len(list(tmp_path.glob("labels/shards/*"))) == 1 and len(cache) == 1025
    cache._since -= 61
    cache.put(pictures / NAMES[1], WHOLE, (1, 1), none)
    assert len(list(tmp_path.glob("labels/shards/*"))) == 2
    assert len(LabelCache(tmp_path / "labels", labeller)) == 1026


# Several writers


def test_writers_share_a_folder_and_the_first_one_counts(labeller, pictures, tmp_path):
    one, two = (LabelCache(tmp_path / "labels", labeller) for _ in range(2))
    put_all(one, labeller, pictures, NAMES[:4])
    one.flush()
    early = one.get(pictures / NAMES[3], WHOLE, (5, 5)).labels(4)
    other = PackedLabels.of(Labels(torch.zeros(25, 4, dtype=torch.long), torch.ones(25, 4)))
    two.put(pictures / NAMES[3], WHOLE, (5, 5), other)  # it has not seen the other's
    put_all(two, labeller, pictures, NAMES[4:])
    two.flush()
    assert one.get(pictures / NAMES[6], WHOLE, (5, 5)) is not None  # found without opening again
    third = LabelCache(tmp_path / "labels", labeller)
    assert len(third) == len(one) == 7
    for cache in (one, third):
        assert same(cache.get(pictures / NAMES[3], WHOLE, (5, 5)).labels(4), early)
    assert third.size == sum(path.stat().st_size for path in tmp_path.glob("labels/shards/*"))


def label_part(folder, pictures, rank) -> None:
    labeller = Labeller(tiny_joint_space(WORDS, seed=3), WORDS, n=4, threshold=0.02)
    records = Records(pictures / "train.jsonl")
    part = KeptRecords(records, range(rank, len(records), 2))
    label_records(part, LabelCache(folder, labeller, tiny("llava")[1]), batch=2)


def test_two_processes_label_a_folder_together(labeller, pictures, tmp_path):
    arguments = [(tmp_path / "labels", pictures, rank) for rank in range(2)]
    processes = [FORKS.Process(target=label_part, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    _, processor = tiny("llava")
    counting = Counting(labeller)
    cache = LabelCache(tmp_path / "labels", counting, processor)
    report = label_records(Records(pictures / "train.jsonl"), cache)
    assert counting.views == 0 and report["labelled"] == 0 and report["views"] == 7


def test_workers_prepare_the_same_pictures(labeller, pictures, tmp_path):
    _, processor = tiny("llava_next")
    records = Records(pictures / "train.jsonl")
    reports = []
    for workers in (0, 1):
        cache = LabelCache(tmp_path / str(workers), labeller, processor)
        reports.append({**label_records(records, cache, batch=2, workers=workers), "patches_per_second": 0})
    assert reports[0] == reports[1] and reports[0]["labelled"] > 0


def test_linked_pictures_of_a_part_of_the_records(labeller, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data")
    shutil.move(tmp_path / "data" / NAMES[0], tmp_path / "elsewhere.png")
    (tmp_path / "data" / NAMES[0]).symlink_to(tmp_path / "elsewhere.png")
    records = Records(tmp_path / "data" / "train.jsonl", follow_links=True)
    cache = LabelCache(tmp_path / "labels", labeller, tiny("llava")[1])
    assert label_records(KeptRecords(records, [0, 3]), cache)["views"] == 2


def test_broken_pictures_are_left_out(labeller, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data" / NAMES[2]).write_bytes(b"no picture")
    cache = LabelCache(tmp_path / "labels", labeller, tiny("llava")[1])
    report = label_records(Records(tmp_path / "data" / "train.jsonl"), cache)
    assert report["left_out"] == 1 and report["views"] == 6


# Refusals


def test_caches_of_another_origin_are_refused(space, labeller, scenes, tmp_path):
    _, processor = tiny("llava")
    folder = tmp_path / "labels"
    LabelCache(folder, labeller, processor)
    form = {"n": 4, "threshold": 0.02}
    LabelCache(folder, Labeller(tiny_joint_space(WORDS, seed=3), WORDS, **form), tiny("llava")[1])
    brighter = replace(space.encoder.normalization, mean=(0.4, 0.5, 0.5))
    shifted = tiny_joint_space(WORDS, seed=3)
    shifted.encoder = replace(shifted.encoder)
    shifted.encoder.normalization = brighter
    different = {
        "checksum": Labeller(tiny_joint_space(WORDS, seed=4), WORDS, **form),
        "scorer": Labeller(space, WORDS, "value_path", **form),
        "sign": Labeller(space, WORDS, sign=-1, **form),
        "threshold": Labeller(space, WORDS, n=4),
        "n": Labeller(space, WORDS, n=5, threshold=0.02),
        "words": Labeller(space, WORDS.without(["old"]), **form),
        "templates": Labeller(space, WORDS, templates=TEMPLATES["word"], **form),
        "text_type": Labeller(space, WORDS, dtype=torch.float16, **form),
        "mean": Labeller(shifted, WORDS, **form),
        "background": ExactLabeller(KnownObjects(scenes)),
    }
    for name, other in different.items():
        assert f"{name} " in message(LabelCache, folder, other, processor)
    text = message(LabelCache, folder, different["background"], processor)
    assert "was made by tiny random clip, surgery, now exact; it has background None; checksum" in text
    assert text.count(";") == 6 and "; other values of " in text
    geometries = {
        "do_pad": tiny("llava_padded")[1],
        "crop_size": tiny("qwen2_5_vl")[1],
        "do_center_crop": None,
    }
    for name, other in geometries.items():
        assert name in message(LabelCache, folder, labeller, other)
    larger = tiny("llava")[1]
    larger.patch_size = 4
    assert "processor.patch_size" in message(LabelCache, folder, labeller, larger)
    changed = tiny_joint_space(WORDS, seed=3)
    late = Labeller(changed, WORDS, **form)
    with torch.no_grad():
        changed.model.visual_projection.weight[0] += 1
    assert "as loaded" in message(LabelCache, tmp_path / "new", late, processor)


def test_every_family_has_a_geometry_of_its_own():
    families = ("llava", "llava_padded", "llava_next", "qwen2_5_vl", "internvl", "smolvlm", "gemma3")
    found = [view_geometry(tiny(family)[1]) for family in families]
    assert all(one != other for place, one in enumerate(found) for other in found[:place])
    assert found == [view_geometry(tiny(family)[1]) for family in families]


def test_folders_that_are_not_label_caches_are_refused(labeller, pictures, tmp_path):
    FeatureCache(tmp_path / "features", load_teacher("dense"))
    (tmp_path / "file").write_bytes(b"")
    places = {"features": "features", "file": "is a file", ".": "other files"}
    for name, reason in places.items():
        assert reason in message(LabelCache, tmp_path / name, labeller)
    assert "other files" in message(LabelCache, pictures, labeller)
    assert not (pictures / "cache.json").exists()
    LabelCache(tmp_path / "labels", labeller)
    assert "labels" in message(FeatureCache, tmp_path / "labels", load_teacher("dense"))
    for content in (b"[]", b"null", b"{}", b"\xff", b""):
        (tmp_path / "labels" / "cache.json").write_bytes(content)
        assert "labels" in message(LabelCache, tmp_path / "labels", labeller)


def test_labels_are_written_where_shapes_alone_are_made(labeller, pictures, tmp_path):
    "As when a cache is collected while a model is made without memory."
    cache = LabelCache(tmp_path / "labels", labeller)
    put_all(cache, labeller, pictures)
    with torch.device("meta"):
        cache.flush()
    assert len(LabelCache(tmp_path / "labels", labeller)) == len(NAMES)


def test_a_shard_of_another_cache_is_refused(space, labeller, pictures, tmp_path):
    for name, each in (("one", labeller), ("two", Labeller(space, WORDS, n=4))):
        cache = LabelCache(tmp_path / name, each)
        put_all(cache, each, pictures, NAMES[:1])
        cache.flush()
    (shard,) = (tmp_path / "two" / "shards").glob("*")
    shutil.copy(shard, tmp_path / "one" / "shards")
    assert "not written by this cache" in message(LabelCache, tmp_path / "one", labeller)


def test_damage_anywhere_is_refused_or_harmless(labeller, pictures, tmp_path):
    cache = LabelCache(tmp_path / "labels", labeller)
    put_all(cache, labeller, pictures)
    cache.flush()
    wanted = {name: cache.get(pictures / name, WHOLE, (5, 5)).labels(4) for name in NAMES}
    (shard,) = (tmp_path / "labels" / "shards").glob("*")
    content = shard.read_bytes()
    refused = []
    for place in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        shard.write_bytes(damaged)
        try:
            opened = LabelCache(tmp_path / "labels", labeller)
            for name in NAMES:
                assert same(opened.get(pictures / name, WHOLE, (5, 5)).labels(4), wanted[name])
        except InputError as error:
            assert str(shard) in str(error)
            refused.append(place)
    assert len(refused) > 0.95 * len(content) / 37
    for length in range(0, len(content), 97):
        shard.write_bytes(content[:length])
        assert str(shard) in message(LabelCache, tmp_path / "labels", labeller)
    shard.unlink()
    put_all(LabelCache(tmp_path / "labels", labeller), labeller, pictures)  # labelled again


def test_wrong_calls_are_refused(space, labeller, pictures, tmp_path):
    cache = LabelCache(tmp_path / "labels", labeller, tiny("llava")[1])
    none = PackedLabels.of(Labels(torch.full((4, 4), -1), torch.zeros(4, 4)))
    assert "4 patches" in message(cache.put, pictures / NAMES[0], WHOLE, (2, 3), none)
    assert "cannot be read" in message(cache.get, pictures / "none.png", WHOLE, (2, 3))
    assert "image folder" in message(CachedLabels, labeller, disk=cache)
    assert "opened with" in message(CachedLabels, Labeller(space, WORDS), 1, cache, pictures)
    assert "without a disk cache" in message(CachedLabels, labeller, complete=True)
    ready = CachedLabels(labeller, disk=cache, image_folder=pictures, complete=True)
    pixels = with_pixels(labeller, pictures, VIEWS)
    for given in (None, pixels):  # with complete, nothing is labelled
        assert "label_records" in message(ready.labels, VIEWS, given)
    assert "no pixels" in message(CachedLabels(labeller).labels, VIEWS)
    assert "3 views for 5 views" in message(CachedLabels(labeller).labels, VIEWS, pixels[:3])
    outside = CachedLabels(labeller, disk=cache, image_folder=pictures)
    assert "leads out" in message(outside.labels, [VIEWS[0]._replace(image="../0.png")], pixels[:1])
    records = Records(pictures / "train.jsonl")
    assert "without a processor" in message(label_records, records, LabelCache(tmp_path / "any", labeller))
    strict = Labeller(space, WORDS, n=4, threshold=0.99)
    stopped = LabelCache(tmp_path / "strict", strict, tiny("llava")[1])
    assert "have no label" in message(label_records, records, stopped)


# Space


def test_a_full_cache_is_read_and_not_written(labeller, pictures, tmp_path):
    cache = LabelCache(tmp_path / "labels", labeller, tiny("llava")[1])
    put_all(cache, labeller, pictures, NAMES[:1], (4, 4))
    cache.flush()
    full = LabelCache(tmp_path / "labels", labeller, tiny("llava")[1], limit_mib=0)
    cached = CachedLabels(labeller, 0, full, pictures)
    pixels = with_pixels(labeller, pictures, VIEWS)
    assert same(cached.labels(VIEWS, pixels), rounded(labeller.labels(VIEWS, pixels)))
    assert full.counts["full"] == 4 and full.get(pictures / NAMES[0], WHOLE, (4, 4)) is not None
    assert "limit_mib" in message(label_records, Records(pictures / "train.jsonl"), full)
    words = torch.arange(4).expand(250_000, 4)
    large = PackedLabels.of(Labels(words, torch.ones(250_000, 4)))  # 6.0 MiB each
    limited = LabelCache(tmp_path / "limited", labeller, limit_mib=13)
    kept = [limited.put(pictures / name, WHOLE, (500, 500), large) for name in NAMES[:3]]
    limited.flush()
    assert kept == [True, True, False] and limited.size <= 13 * 2**20


def test_a_full_disk_is_one_line_and_what_was_finished_stays(labeller, pictures, tmp_path):
    cache = LabelCache(tmp_path / "labels", labeller)
    put_all(cache, labeller, pictures, NAMES[:3])
    cache.flush()
    put_all(cache, labeller, pictures, NAMES[3:])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # the same error as a full disk
    try:
        text = message(cache.flush)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "free some space" in text and "shards" in text
    put_all(cache, labeller, pictures)  # and it can be used further
    cache.flush()
    assert len(LabelCache(tmp_path / "labels", labeller)) == 7
    assert not list(tmp_path.glob("labels/shards/.*"))


@pytest.mark.parametrize("count", [0, 1, 10])
def test_sizes_follow_the_formula(pictures, tmp_path, count):
    labeller = Labeller(tiny_joint_space(WORDS, seed=3), WORDS)
    cache = LabelCache(tmp_path / "labels", labeller)
    words = torch.arange(10).where(torch.arange(10) < count, -1).expand(576, 10)
    packed = PackedLabels.of(Labels(words, (words >= 0).float()))
    for number in range(64):
        cache.put(pictures / NAMES[0], (0.0, 0.0, 1.0 + number, 1.0), (24, 24), packed)
    cache.flush()
    assert 0 <= cache.size - 64 * (40 + 576 * (1 + 6 * count)) < 1024
    assert cache.patches == 64 * 576 and cache._waiting_bytes >= cache.size


def test_the_feature_cache_still_names_its_files_as_before(pictures, tmp_path):
    store = ContentStore(tmp_path / "store", {"format": 1}, 1)
    key = {"image": "0" * 64, "box": "[0.0, 0.0, 1.0, 1.0]", "grid": "[5, 5]"}
    assert store.name(key).startswith("23cb96da6df185e6a9c614bdcdeb13f48dcac713")
    found = store.key(pictures / NAMES[0], (0, 0, 0.3333333333, 1), (5, 6))
    assert found["box"] == "[0.0, 0.0, 0.333333, 1.0]" and found["grid"] == "[5, 6]"
