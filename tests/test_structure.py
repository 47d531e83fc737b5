"""The measures of spatial structure against loops written from the paper's definitions, on made-up
features"""

from functools import cache

import numpy as np
import pytest
import torch

from aligned_mllm.analysis.structure import (
    correlogram,
    decay_slope,
    largest_region,
    local_distant_similarity,
    mix_images,
    patch_cosines,
    patch_distances,
    region_similarity,
    shuffle_patches,
    spatial_contrast,
    structure_by_image,
    structure_figure,
    structure_table,
)
from aligned_mllm.core import InputError

GRIDS = [(5, 5), (4, 6), (16, 16)]


def made_up(grid: tuple[int, int], images: int = 3, width: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(grid[0])
    smooth = torch.randn(images, width, 3, 3, generator=generator)
    smooth = torch.nn.functional.interpolate(smooth, grid, mode="bilinear").flatten(2).transpose(1, 2)
    return smooth + 0.3 * torch.randn(smooth.shape, generator=generator) + 0.2


def cosine_of(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / (np.sqrt(first @ first) * np.sqrt(second @ second)))


@cache
def pairs(grid: tuple[int, int], index: int) -> list[tuple[int, int, int, float]]:
    "Every ordered pair of different patches of an image made up: first, second, distance, cosine."
    image = made_up(grid)[index].double().numpy()
    found = []
    for first in range(len(image)):
        for second in range(len(image)):
            if first != second:
                row, column = divmod(first, grid[1])
                other_row, other_column = divmod(second, grid[1])
                distance = abs(row - other_row) + abs(column - other_column)
                found.append((first, second, distance, cosine_of(image[first], image[second])))
    return found


@pytest.mark.parametrize("grid", GRIDS)
def test_distances_and_cosines_equal_loops(grid):
    cosines = patch_cosines(made_up(grid), grid)[0]
    distances = patch_distances(grid)
    for first, second, distance, value in pairs(grid, 0):
        assert distances[first, second] == distance
        assert abs(cosines[first, second] - value) < 1e-6


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("near, far", [(None, None), (2, 6), (3, 4)])
def test_local_distant_similarity_equals_a_loop(grid, near, far):
    features = made_up(grid)
    found = local_distant_similarity(features, grid, near, far)
    near = grid[0] / 2 if near is None else near
    far = grid[0] / 2 if far is None else far
    for index, value in enumerate(found):
        every = pairs(grid, index)
        local = np.mean([cosine for _, _, distance, cosine in every if distance < near])
        distant = np.mean([cosine for _, _, distance, cosine in every if distance >= far])
        assert abs(value - (local - distant)) < 1e-6


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("longest", [3, 8, 100])
def test_decay_slope_equals_a_least_squares_line(grid, longest):
    features = made_up(grid)
    means = correlogram(features, grid, longest)
    found = decay_slope(features, grid, longest)
    steps = [step for step in range(1, longest + 1) if step <= grid[0] + grid[1] - 2]
    assert means.shape == (3, len(steps))
    for index, (row, value) in enumerate(zip(means, found)):
        every = pairs(grid, index)
        heights = [np.mean([cosine for *_, distance, cosine in every if distance == step]) for step in steps]
        assert np.allclose(row, heights, atol=1e-6)
        assert abs(value + np.polyfit(steps, heights, 1)[0]) < 1e-6


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("near, far", [(None, None), (1, 6), (2, 3)])
def test_region_similarity_equals_a_loop(grid, near, far):
    features = made_up(grid)
    regions = torch.rand(features.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.3
    regions[2] = False
    regions[2, 0] = True
    found = region_similarity(features, grid, regions, near, far)
    near = grid[0] / 2 if near is None else near
    far = grid[0] / 2 if far is None else far
    for index, (region, value) in enumerate(zip(regions.numpy(), found)):
        contrasts = []
        for anchor in np.flatnonzero(region):
            others = [pair[1:] for pair in pairs(grid, index) if pair[0] == anchor]
            inside = [cosine for other, distance, cosine in others if region[other] and distance <= near]
            outside = [cosine for other, distance, cosine in others if not region[other] and distance >= far]
            if inside and outside:
                contrasts.append(np.mean(inside) - np.mean(outside))
        assert abs(float(value) - np.mean(contrasts)) < 1e-6 if contrasts else value.isnan()
    assert found[1].isfinite() and found[2].isnan()


def test_spatial_contrast_equals_a_loop_and_knows_its_ends():
    features = made_up((5, 5))
    for image, value in zip(features.double().numpy(), spatial_contrast(features)):
        unit = [patch / np.sqrt(patch @ patch) for patch in image]
        mean = sum(unit) / len(unit)
        assert abs(value - np.sqrt(sum((patch - mean) @ (patch - mean) for patch in unit) / len(unit))) < 1e-6
    assert spatial_contrast(torch.ones(1, 25, 4)).item() < 1e-6
    opposite = torch.tensor([1.0, -1.0]).repeat(12)[None, :, None]
    assert abs(spatial_contrast(opposite).item() - 1) < 1e-12


def test_measures_know_a_case_by_hand():
    "Two halves of a 4 x 4 grid, orthogonal: cosine 1 within a half, 0 across."
    grid = (4, 4)
    features = torch.eye(2).repeat_interleave(8, dim=0)[None]
    neighbours = 12 + 8
    assert abs(local_distant_similarity(features, grid, near=2, far=5) - neighbours / 24).item() < 1e-12
    top = torch.arange(16)[None] < 8
    assert region_similarity(features, grid, top, near=1, far=3).item() == 1
    assert abs(spatial_contrast(features).item() - np.sqrt(0.5)) < 1e-12


def test_baselines_take_away_what_they_should():
    features = made_up((5, 5), images=400)
    shuffled = shuffle_patches(features, seed=3)
    mixed = mix_images(features, seed=3)
    assert torch.equal(shuffled.sort(1).values, features.sort(1).values)
    assert torch.equal(mixed.sort(0).values, features.sort(0).values)
    assert torch.allclose(mixed.mean(0), features.mean(0), atol=1e-5)
    assert torch.allclose(spatial_contrast(shuffled), spatial_contrast(features), atol=1e-12)
    own = local_distant_similarity(features, (5, 5)).mean()
    assert own > 0.1
    for baseline in (shuffled, mixed):  # made-up images share no position: mixing leaves nothing either
        assert abs(local_distant_similarity(baseline, (5, 5)).mean()) < 0.05 * own
        assert abs(decay_slope(baseline, (5, 5)).mean()) < 0.01
    position = 2 * made_up((5, 5), images=1)
    kept = local_distant_similarity(mix_images(0.1 * features + position), (5, 5)).mean()
    assert kept > 0.9 * local_distant_similarity(position, (5, 5)).mean()
    assert torch.equal(mix_images(features, 3), mixed) and not torch.equal(mix_images(features, 4), mixed)


def test_the_largest_region_is_that_of_most_patches():
    labels = np.full((10, 15), -1)
    labels[0:3, 0:7] = 0  # touches 2 rows of 3 patches
    labels[5, 14] = 1
    region = largest_region(labels, (5, 5)).reshape(5, 5)
    assert region[:2, :3].all() and region.sum() == 6
    assert not largest_region(np.full((10, 10), -1), (5, 5)).any()
    with pytest.raises(InputError, match="multiples of the grid"):
        largest_region(labels, (4, 5))


def test_table_and_figure_hold_every_measure():
    features = made_up((5, 5), images=12)
    regions = torch.zeros(12, 25, dtype=torch.bool)
    regions[1:, [0, 1, 5]] = True
    table = structure_table({"one": features, "mean": features.mean(0, keepdim=True)}, (5, 5), regions)
    assert len(table) == 3 * 4 + 3 and set(table.measure) == {"LDS", "CDS", "RMSC", "SRSS"}
    row = table[(table.baseline == "unchanged") & (table.model == "one")].set_index("measure")
    means = structure_by_image(features, (5, 5), regions).mean()
    assert np.allclose(row.value, means[row.index]) and row.images["SRSS"] == 11
    assert row.value.between(row.low, row.high).all()
    single = table[table.model == "mean"]
    assert single.low.isna().all() and set(single.baseline) == {"unchanged"}
    assert len(structure_figure(table).data) == 12
    assert len(structure_table({"one": features}, (5, 5))) == 9


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: patch_cosines(x, (4, 6)), "grid of 4 x 6"),
        (lambda x: patch_cosines(x[0], (5, 5)), "images, 25, width"),
        (lambda x: local_distant_similarity(x, (5, 5), near=1), "choose near above 1"),
        (lambda x: local_distant_similarity(x, (5, 5), far=9), "pairs of both kinds"),
        (lambda x: decay_slope(x, (5, 5), longest=1), "at least two"),
        (lambda x: region_similarity(x, (5, 5), torch.ones(2, 25)), "regions of shape"),
        (lambda x: mix_images(x[:1]), "at least two images"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call(made_up((5, 5)))
