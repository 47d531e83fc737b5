"Samples and batches: what a sample carries for the objectives, and what its cache may hold."

import pytest
import torch
from PIL import Image
from tiny_models import tiny

from aligned_mllm.data.collate import Collator, Samples, model_inputs
from aligned_mllm.data.record import Record, Turn
from aligned_mllm.data.records import Records, write_records


@pytest.fixture(scope="module")
def processor():
    return tiny("llava_next")[1]


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Records:
    folder = tmp_path_factory.mktemp("records")
    for name, size in (("wide.png", (60, 20)), ("square.png", (40, 40))):
        Image.new("RGB", size, "teal").save(folder / name)
    said = Turn("<image>\nwhat is where", "two red towers", "")
    plain = Turn("what is where", "two red towers", "")
    write_records(
        [
            Record("0", ("wide.png",), (said,), ""),
            Record("1", (), (plain,), ""),
            Record("2", ("square.png",), (said,), ""),
        ],
        folder / "train.jsonl",
    )
    return Records(folder / "train.jsonl", folder)


def sizes_seen(seen: list, fill: float):
    def pixels_of_view(image, box, grid):
        seen.append((image.size, box, grid))
        return torch.full((3, grid[0], grid[1]), fill)

    return pixels_of_view


def test_each_objective_gets_its_pixels_of_every_view(processor, records):
    seen = []
    ones = sizes_seen(seen, 1.0)
    twos = sizes_seen([], 2.0)
    samples = Samples(records, processor, view_pixels={"viral": ones, "second": twos})
    wide, text, square = samples
    views = len(wide["view_of"])
    assert views > 1 and len(wide["view_pixels"]["viral"]) == len(wide["view_pixels"]["second"]) == views
    assert seen[:views] == [
        ((60, 20), tuple(box), tuple(grid))
        for box, grid in zip(wide["boxes"].tolist(), wide["grids"].tolist())
    ]
    assert "view_pixels" not in text
    batch = Collator(processor.tokenizer.pad_token_id)([text, wide, square])
    assert list(batch["view_pixels"]) == ["viral", "second"]
    for label, fill in (("viral", 1.0), ("second", 2.0)):
        pixels = batch["view_pixels"][label]
        assert [tuple(view.shape[1:]) for view in pixels] == [tuple(grid) for grid in batch["grids"].tolist()]
        assert {float(view.unique()) for view in pixels} == {fill}
    assert not {"view_pixels", "targets"} & set(model_inputs({**batch, "targets": {}}))


def test_no_pixels_where_nobody_asks(processor, records):
    ones = sizes_seen([], 1.0)
    for samples in (
        Samples(records, processor),
        Samples(records, processor, view_pixels={}),
        Samples(records, processor, with_images=False, view_pixels={"viral": ones}),
    ):
        batch = Collator(processor.tokenizer.pad_token_id)(list(samples))
        assert "view_pixels" not in batch and len(batch["image_names"]) == 2 * samples.with_images


def test_the_memory_limit_counts_the_pixels_of_views(processor, records):
    def large(image, box, grid):
        return torch.zeros(3, 256, 256)  # 0.75 MiB

    plain = Samples(records, processor, cache_mib=1)
    assert len(list(plain)) == len(plain.cache) == 3
    limited = Samples(records, processor, view_pixels={"viral": large}, cache_mib=1)
    assert len(list(limited)) == 3 and list(limited.cache) == [1]
    free = Samples(records, processor, view_pixels={"viral": large}, cache_mib=16)
    assert len(list(free)) == len(free.cache) == 3
    used = sum(
        value.nbytes for sample in free for value in sample.values() if isinstance(value, torch.Tensor)
    )
    views = [view for sample in free for view in sample.get("view_pixels", {}).get("viral", ())]
    assert free.memory_left == 16 * 2**20 - used - sum(view.nbytes for view in views)
