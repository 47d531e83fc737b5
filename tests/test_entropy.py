"Spatial entropy against a plain reference, and values known by hand."

import math

import numpy as np
import pytest
import torch

from aligned_mllm.analysis.entropy import shuffled_patches, spatial_entropy
from aligned_mllm.core import InputError


def reference(image: np.ndarray, connectivity: int = 8, threshold: float = 0.001) -> float:
    "Kang et al.'s definition, written as it reads, with a flood fill."
    above = np.maximum(image - image.mean(), 0)
    if above.sum() <= 0:
        return math.inf
    left = {(row, column) for row, column in np.argwhere(above > threshold).tolist()}
    shares = []
    while left:
        edge = [left.pop()]
        held = 0.0
        while edge:
            row, column = edge.pop()
            held += above[row, column]
            for down, across in [(-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)][
                :connectivity
            ]:
                near = (row + down, column + across)
                if near in left:
                    left.remove(near)
                    edge.append(near)
        shares.append(held / above.sum())
    return -sum(share * math.log(share) for share in shares)


@pytest.mark.parametrize("connectivity", [4, 8])
def test_many_maps_at_once_are_the_reference_one_by_one(connectivity):
    generator = torch.Generator().manual_seed(0)
    maps = (3 * torch.randn(5, 7, 6 * 9, generator=generator)).softmax(-1)
    found = spatial_entropy(maps, (6, 9), connectivity=connectivity)
    assert found.shape == (5, 7)
    wanted = [
        [reference(maps[one, two].double().reshape(6, 9).numpy(), connectivity) for two in range(7)]
        for one in range(5)
    ]
    assert np.allclose(found, wanted, atol=1e-6) and found.std() > 0.1


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_equal_components_give_the_logarithm_of_their_number(count):
    image = torch.zeros(3, 15)
    image[1, ::3][:count] = 1 / count
    assert math.isclose(float(spatial_entropy(image.flatten(), (3, 15))), math.log(count), abs_tol=1e-6)
    assert math.isclose(
        float(spatial_entropy(image.flatten(), (3, 15), base=2)), math.log2(count), abs_tol=1e-6
    )
    assert math.isclose(
        float(spatial_entropy(image.flatten(), (3, 15), normalise="components")),
        float(count > 1),
        abs_tol=1e-6,
    )


def test_choices():
    corners = torch.zeros(4, 4)
    corners[1, 1] = corners[2, 2] = 0.5
    assert spatial_entropy(corners.flatten(), (4, 4)) == 0
    assert math.isclose(spatial_entropy(corners.flatten(), (4, 4), connectivity=4), math.log(2), abs_tol=1e-6)
    flat = torch.full((16,), 1 / 16)
    assert spatial_entropy(flat, (4, 4)) == math.inf
    low = flat.clone()
    low[0] += 5e-4  # above the mean, below the threshold
    assert spatial_entropy(low, (4, 4)) == 0 and spatial_entropy(low, (4, 4), nothing=float("nan")).isnan()
    assert (
        spatial_entropy(low, (4, 4), threshold=0.005, relative=True) == 0
        and spatial_entropy(low, (4, 4), threshold=0.005, relative=True, nothing=9.0) == 0
    )
    small = torch.zeros(16)
    # the second lies above the mean by less than the threshold: in the map's sum, in no place
    small[0] = 0.99
    small[15] = 0.07
    share = float((small[0] - small.mean()) / (small[0] + small[15] - 2 * small.mean()))
    assert 0.99 < share < 1 and math.isclose(
        spatial_entropy(small, (4, 4), threshold=0.01), -share * math.log(share), abs_tol=1e-6
    )
    assert spatial_entropy(small, (4, 4), threshold=0.01, of="components") == 0


def test_views_do_not_touch():
    "Two views side by side in the row: the last patch of one and the first of the next are two components."
    weights = torch.zeros(8)
    weights[3] = weights[4] = 0.5
    assert math.isclose(spatial_entropy(weights, torch.tensor([[2, 2], [2, 2]])), math.log(2), abs_tol=1e-6)
    assert spatial_entropy(weights, (4, 2)) == 0


def test_wrong_choices_are_refused():
    for wrong in (
        {"of": "all"},
        {"normalise": "max"},
        {"base": 1},
        {"connectivity": 6},
        {"threshold": -1.0},
        {"grid": (3, 5)},
    ):
        with pytest.raises(InputError):
            spatial_entropy(torch.rand(16), **{"grid": (4, 4), **wrong})
    with pytest.raises(InputError, match="scores before the softmax"):
        spatial_entropy(-torch.rand(16), (4, 4))


def test_shuffled_patches_stay_in_their_view_and_connected_attention_lies_below_them():
    weights = torch.zeros(2, 3, 36 + 4)
    weights[..., [7, 8, 13, 14]] = 0.2  # one place in the first view, a flat second
    weights[..., 36:] = 0.05
    grids = torch.tensor([[6, 6], [2, 2]])
    mixed = shuffled_patches(weights, grids, torch.Generator().manual_seed(0))
    assert torch.equal(mixed.sort(-1).values, weights.sort(-1).values) and not torch.equal(mixed, weights)
    assert torch.equal(mixed[..., 36:], weights[..., 36:]) and not torch.equal(mixed[0, 0], mixed[0, 1])
    assert (spatial_entropy(mixed, grids) > spatial_entropy(weights, grids)).all()
    with pytest.raises(InputError, match="36 weights"):
        shuffled_patches(weights, grids[:1], torch.Generator())
