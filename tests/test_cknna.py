"""CKNNA against a float64 reference that follows the formula with loops, its invariances, its null and its errors."""

import math

import numpy as np
import pytest
import torch

from aligned_mllm.analysis.cknna import cka, cknna, cknna_by_layer, kernel, neighbours, permutation_null
from aligned_mllm.core import InputError


def reference_cknna(first, second, k):
    "Align(K, L) / sqrt(Align(K, K) Align(L, L)), written down as the formula stands; K of rows brought to length 1."

    def gram(rows):
        rows = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in rows]
        return [[sum(a * b for a, b in zip(one, other)) for other in rows] for one in rows]

    def nearest(matrix, i):
        others = [j for j in range(len(matrix)) if j != i]
        return set(sorted(others, key=lambda j: -matrix[i][j])[:k])

    def align(K, L):
        n, total = len(K), 0.0
        for i in range(n):
            both = nearest(K, i) & nearest(L, i)
            mean_k, mean_l = sum(K[i]) / n, sum(L[i]) / n
            for j in range(n):
                if i != j and j in both:
                    total += (K[i][j] - mean_k) * (L[i][j] - mean_l)
        return total / (n - 1) ** 2

    K, L = gram(first), gram(second)
    return align(K, L) / math.sqrt(align(K, K) * align(L, L))


def features(seed, n=40, width=6, noise_of=None, noise=0.5):
    random = np.random.default_rng(seed)
    fresh = random.normal(size=(n, width))
    return fresh if noise_of is None else noise_of + noise * fresh


@pytest.mark.parametrize("k", [1, 3, 10, 20, 39])
@pytest.mark.parametrize("related", [True, False])
def test_agrees_with_the_formula(k, related):
    first = features(0)
    second = features(1, noise_of=first) if related else features(1, width=9)
    assert cknna(first, second, k=k) == pytest.approx(reference_cknna(first.tolist(), second.tolist(), k), abs=1e-6)


def test_takes_float32_tensors_and_arrays():
    first, second = features(0), features(1, width=9)
    value = cknna(torch.tensor(first, dtype=torch.float32, requires_grad=True), torch.tensor(second, dtype=torch.float32), k=5)
    assert value == pytest.approx(cknna(first, second, k=5), abs=1e-5)


def test_identical_symmetric_and_bounded():
    first = features(0)
    assert cknna(first, first, k=5) == pytest.approx(1, abs=1e-12)
    second = features(1, noise_of=first)
    assert cknna(first, second, k=5) == pytest.approx(cknna(second, first, k=5), abs=1e-12)
    assert -1 <= cknna(first, second, k=5) < 1


@pytest.mark.parametrize("normalise", [True, False])
def test_rotation_and_scale_change_nothing(normalise):
    first, second = features(0), features(1, noise_of=features(0))
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6))).Q
    assert cknna(first, 9 * second @ rotation, 5, normalise) == pytest.approx(cknna(first, second, 5, normalise), abs=1e-9)


def test_lengths_of_rows_matter_only_without_normalising():
    first = features(0)
    second = first * np.random.default_rng(3).uniform(0.1, 10, size=(40, 1))
    assert cknna(first, second, k=5) == pytest.approx(1, abs=1e-9)
    assert cknna(first, second, k=5, normalise=False) < 0.9


def test_same_order_of_points_is_needed_and_a_common_one_is_free():
    first, second = features(0), features(1, noise_of=features(0))
    order = np.random.default_rng(4).permutation(40)
    assert cknna(first[order], second[order], k=5) == pytest.approx(cknna(first, second, k=5), abs=1e-9)
    assert cknna(first, second[order], k=5) < cknna(first, second, k=5) / 2


def test_all_neighbours_is_cka_without_its_diagonal():
    first, second = features(0), features(1, noise_of=features(0))
    centred = [matrix - matrix.mean(dim=1, keepdim=True) for matrix in (kernel(first), kernel(second))]
    one, two = (matrix.fill_diagonal_(0) for matrix in centred)
    expected = float((one * two).sum() / (one.norm() * two.norm()))
    assert cknna(first, second, k=39) == pytest.approx(expected, abs=1e-12)
    assert cka(first, second) == pytest.approx(expected, abs=0.1)


def test_neighbours_are_k_others_and_the_nearest():
    inner = kernel(features(0))
    mask = neighbours(inner, 4)
    assert (mask.sum(dim=1) == 4).all() and not mask.diagonal().any()
    for row, chosen in zip(inner.fill_diagonal_(-9), mask):
        assert row[chosen].min() >= row[~chosen].max()


def test_null_is_the_value_of_shuffled_rows():
    first, second = features(0), features(1, noise_of=features(0))
    null = permutation_null(first, second, k=5, permutations=50, seed=7)
    generator = torch.Generator().manual_seed(7)
    for value in null[:3]:
        order = torch.randperm(40, generator=generator).numpy()
        assert value == pytest.approx(reference_cknna(first.tolist(), second[order].tolist(), 5), abs=1e-6)
    assert null.shape == (50,) and (null == permutation_null(first, second, k=5, permutations=50, seed=7)).all()
    assert null.max() < cknna(first, second, k=5)


def test_unrelated_features_fall_inside_the_null():
    inside = 0
    for seed in range(40):
        first, second = features(seed, n=60), features(100 + seed, n=60)
        null = permutation_null(first, second, k=5, permutations=100)
        inside += np.quantile(null, 0.025) <= cknna(first, second, k=5) <= np.quantile(null, 0.975)
    assert inside >= 33  # 38 of 40 expected


def test_by_layer_equals_one_by_one():
    reference = features(0, n=60)
    states = torch.stack([torch.tensor(features(seed, n=60, noise_of=reference, noise=seed / 2)) for seed in (1, 2, 3)])
    table = cknna_by_layer(states, reference, k=5, permutations=30, seed=1)
    assert list(table.columns) == ["layer", "value", "null_low", "null_high"] and list(table.layer) == [0, 1, 2]
    for row, state in zip(table.itertuples(), states):
        null = permutation_null(state, reference, k=5, permutations=30, seed=1)
        assert row.value == pytest.approx(cknna(state, reference, k=5), abs=1e-12)
        assert (row.null_low, row.null_high) == pytest.approx(tuple(np.quantile(null, [0.025, 0.975])), abs=1e-12)
    chosen = cknna_by_layer({2: states[2]}, reference, k=5, permutations=30, seed=1)
    assert chosen.iloc[0].to_dict() == table.iloc[2].to_dict()


def test_inputs_are_left_alone():
    first, second = features(0), features(1)
    before = first.copy(), second.copy()
    cknna(first, second, k=5, normalise=False)
    assert (first == before[0]).all() and (second == before[1]).all()


@pytest.mark.parametrize(
    ("second", "k", "words"),
    [
        (features(1)[:39], 5, "40 and 39 rows"),
        (features(1), 40, "k = 40"),
        (features(1), 0, "k = 0"),
        (np.where(np.arange(40)[:, None] == 7, np.nan, features(1)), 5, "row 7"),
        (np.where(np.arange(40)[:, None] == 3, 0, features(1)), 5, "row 3"),
        (np.full((40, 6), 0.3), 5, "alike"),
        (features(1)[:, 0], 5, "shape"),
    ],
)
def test_bad_input_is_named(second, k, words):
    with pytest.raises(InputError, match=words):
        cknna(features(0), second, k=k)
