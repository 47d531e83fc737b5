"""CKNNA against a float64 reference that follows the formula with loops, its invariances, its null and
its errors."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import in_fork

from aligned_mllm.analysis.checkpoints import LoadedModel
from aligned_mllm.analysis.cka import cka, cka_null, cross
from aligned_mllm.analysis.cknna import agreement, cknna
from aligned_mllm.analysis.cknna_intervals import MEASURES, groups_of, permutation_null
from aligned_mllm.analysis.cknna_layers import cknna_by_layer
from aligned_mllm.analysis.cknna_tables import cknna_of_features, cknna_table, cknna_table_figure
from aligned_mllm.analysis.neighbours import kernel, neighbours, points_of, space
from aligned_mllm.analysis.feature_files import Features, GrowingRows
from aligned_mllm.core import InputError, load_json, peak_memory, save_json
from aligned_mllm.worlds.scenes import draw, scenes_of
from aligned_mllm.worlds.small_models import embedded_model
from aligned_mllm.teachers.vision import load_teacher


def reference_cknna(first, second, k):
    """Align(K, L) / sqrt(Align(K, K) Align(L, L)), written down as the formula stands; K of rows brought
    to length 1."""

    def gram(rows):
        rows = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in rows]
        return [[sum(a * b for a, b in zip(one, other)) for other in rows] for one in rows]

    def nearest(matrix, i):
        others = [j for j in range(len(matrix)) if j != i]
        return set(sorted(others, key=lambda j: -matrix[i][j])[:k])

    def align(K, L):
        n = len(K)
        total = 0.0
        for i in range(n):
            both = nearest(K, i) & nearest(L, i)
            mean_k = sum(K[i]) / n
            mean_l = sum(L[i]) / n
            for j in range(n):
                if i != j and j in both:
                    total += (K[i][j] - mean_k) * (L[i][j] - mean_l)
        return total / (n - 1) ** 2

    K = gram(first)
    L = gram(second)
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
    assert cknna(first, second, k=k) == pytest.approx(
        reference_cknna(first.tolist(), second.tolist(), k), abs=1e-6
    )


def test_takes_float32_tensors_and_arrays():
    first = features(0)
    second = features(1, width=9)
    value = cknna(
        torch.tensor(first, dtype=torch.float32, requires_grad=True),
        torch.tensor(second, dtype=torch.float32),
        k=5,
    )
    assert value == pytest.approx(cknna(first, second, k=5), abs=1e-5)


def test_identical_symmetric_and_bounded():
    first = features(0)
    assert cknna(first, first, k=5) == pytest.approx(1, abs=1e-12)
    second = features(1, noise_of=first)
    assert cknna(first, second, k=5) == pytest.approx(cknna(second, first, k=5), abs=1e-12)
    assert -1 <= cknna(first, second, k=5) < 1


@pytest.mark.parametrize("normalise", [True, False])
def test_rotation_and_scale_change_nothing(normalise):
    first = features(0)
    second = features(1, noise_of=features(0))
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6))).Q
    assert cknna(first, 9 * second @ rotation, 5, normalise) == pytest.approx(
        cknna(first, second, 5, normalise), abs=1e-9
    )


def test_lengths_of_rows_matter_only_without_normalising():
    first = features(0)
    second = first * np.random.default_rng(3).uniform(0.1, 10, size=(40, 1))
    assert cknna(first, second, k=5) == pytest.approx(1, abs=1e-9)
    assert cknna(first, second, k=5, normalise=False) < 0.9


def test_same_order_of_points_is_needed_and_a_common_one_is_free():
    first = features(0)
    second = features(1, noise_of=features(0))
    order = np.random.default_rng(4).permutation(40)
    assert cknna(first[order], second[order], k=5) == pytest.approx(cknna(first, second, k=5), abs=1e-9)
    assert cknna(first, second[order], k=5) < cknna(first, second, k=5) / 2


def test_all_neighbours_is_cka_without_its_diagonal():
    first = features(0)
    second = features(1, noise_of=features(0))
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
    first = features(0)
    second = features(1, noise_of=features(0))
    null = permutation_null(first, second, k=5, permutations=50, seed=7)
    generator = torch.Generator().manual_seed(7)
    for value in null[:3]:
        order = torch.randperm(40, generator=generator).numpy()
        assert value == pytest.approx(reference_cknna(first.tolist(), second[order].tolist(), 5), abs=1e-6)
    assert (
        null.shape == (50,) and (null == permutation_null(first, second, k=5, permutations=50, seed=7)).all()
    )
    assert null.max() < cknna(first, second, k=5)


def test_unrelated_features_fall_inside_the_null():
    inside = 0
    for seed in range(40):
        first = features(seed, n=60)
        second = features(100 + seed, n=60)
        null = permutation_null(first, second, k=5, permutations=100)
        inside += np.quantile(null, 0.025) <= cknna(first, second, k=5) <= np.quantile(null, 0.975)
    assert inside >= 33  # 38 of 40 expected


def test_by_layer_equals_one_by_one():
    reference = features(0, n=60)
    states = torch.stack(
        [torch.tensor(features(seed, n=60, noise_of=reference, noise=seed / 2)) for seed in (1, 2, 3)]
    )
    table = cknna_by_layer(states, reference, k=5, permutations=30, seed=1)
    assert list(table.columns) == ["layer", "value", "null_low", "null_high"] and list(table.layer) == [
        0,
        1,
        2,
    ]
    for row, state in zip(table.itertuples(), states):
        null = permutation_null(state, reference, k=5, permutations=30, seed=1)
        assert row.value == pytest.approx(cknna(state, reference, k=5), abs=1e-12)
        assert (row.null_low, row.null_high) == pytest.approx(
            tuple(np.quantile(null, [0.025, 0.975])), abs=1e-12
        )
    chosen = cknna_by_layer({2: states[2]}, reference, k=5, permutations=30, seed=1)
    assert chosen.iloc[0].to_dict() == table.iloc[2].to_dict()


def test_inputs_are_left_alone():
    first = features(0)
    second = features(1)
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


def released(first, second, k, unbiased, masked=True):
    "CKNNA as released with the paper, in NumPy: whole kernels, masks, HSIC; without masks it is CKA."
    n = len(first)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (first, second)]
    kernels = [rows @ rows.T for rows in unit]
    masks = []
    for inner in kernels:
        ranked = np.argsort(-(inner - np.diag(np.full(n, np.inf if unbiased else 0))), axis=1)[:, :k]
        masks.append(np.zeros((n, n)))
        np.put_along_axis(masks[-1], ranked, 1, axis=1)

    def hsic(one, two):
        if not unbiased:
            centring = np.eye(n) - 1 / n
            return np.trace(one @ centring @ two @ centring)
        one = one - np.diag(np.diag(one))
        two = two - np.diag(np.diag(two))
        return (
            (one * two.T).sum() + one.sum() * two.sum() / (n - 1) / (n - 2) - 2 * (one @ two).sum() / (n - 2)
        )

    def similarity(a, b):
        mask = masks[a] * masks[b] if masked else 1
        return hsic(mask * kernels[a], mask * kernels[b])

    return similarity(0, 1) / np.sqrt(similarity(0, 0) * similarity(1, 1))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("k", [2, 10, 39])
def test_masked_first_agrees_with_the_released_code(k, unbiased):
    first = features(0, n=60)
    second = features(1, n=60, noise_of=features(0, n=60))
    value = cknna(first, second, k, form="masked_first", unbiased=unbiased)
    assert value == pytest.approx(released(first, second, k, unbiased), abs=1e-9)


@pytest.mark.parametrize("unbiased", [True, False])
def test_cka_agrees_with_whole_kernels(unbiased):
    first = features(0)
    second = features(1, width=9)
    assert cka(first, second, unbiased=unbiased) == pytest.approx(
        released(first, second, 1, unbiased, masked=False), abs=1e-9
    )


def test_unbiased_centred_first_reaches_unbiased_cka():
    first = features(0)
    second = features(1, noise_of=features(0))
    assert cknna(first, second, 39, unbiased=True) == pytest.approx(
        cka(first, second, unbiased=True), abs=1e-9
    )


@pytest.mark.parametrize("spread", [1, 1e-2, 1e-4])
def test_tiles_and_single_precision_change_nothing(spread):
    "Float32 features in several tiles, also where all cosines are nearly 1, against whole float64 kernels."
    first, second = (
        torch.tensor(3 + spread * features(seed, n=300, width=20), dtype=torch.float32) for seed in (0, 1)
    )
    for rows in (first, second):
        whole = kernel(rows)
        tiled = space(rows, 10, tile=64)
        assert torch.equal(torch.zeros(300, 300).scatter_(1, tiled.near, 1).bool(), neighbours(whole, 10))
        assert torch.allclose(tiled.inner, whole.gather(1, tiled.near), atol=1e-14, rtol=0)
    expected = reference_cknna(first[:80].double().tolist(), second[:80].double().tolist(), 10)
    assert cknna(first[:80], second[:80]) == pytest.approx(expected, abs=1e-5)


def test_duplicates_beyond_the_candidates_are_found():
    "Forty copies of one point: more equals than candidates."
    rows = np.concatenate([np.tile(features(0, n=1), (40, 1)), features(1, n=60)])
    tiled = space(rows, 10)
    assert torch.allclose(tiled.inner, kernel(rows).fill_diagonal_(-9).topk(10).values)


@pytest.mark.parametrize(
    ("form", "unbiased"),
    [("centred_first", False), ("centred_first", True), ("masked_first", True), ("masked_first", False)],
)
def test_leaving_pictures_out_is_measuring_the_others(form, unbiased):
    first = features(0, n=100)
    second = features(1, n=100, noise_of=features(0, n=100))
    groups = groups_of(np.arange(100) // 5, 10)
    own = form == "masked_first" and not unbiased
    one, two = (space(rows, 5, groups=groups, with_self=own) for rows in (first, second))
    for left in (0, 7):
        rest = (groups != left).numpy()
        found = agreement(one, two, 5, form, unbiased, without=left)
        assert found["CKNNA"] == pytest.approx(
            cknna(first[rest], second[rest], 5, form=form, unbiased=unbiased), abs=1e-9
        )
        masks = [neighbours(kernel(rows[rest]), 5) for rows in (first, second)]
        if not own:
            assert found["mutual k-NN"] == pytest.approx(
                float((masks[0] & masks[1]).sum()) / 5 / rest.sum(), abs=1e-12
            )


@pytest.mark.parametrize("unbiased", [True, False])
def test_null_of_cka_is_that_of_shuffles(unbiased):
    first = features(0, n=25)
    second = features(1, n=25, width=9)
    random = np.random.default_rng(0)
    values = [cka(first, second[random.permutation(25)], unbiased=unbiased) for _ in range(400)]
    mean, deviation = cka_null(points_of(first), points_of(second), unbiased)
    assert abs(np.mean(values) - mean) < 4 * deviation / 400**0.5 and np.std(values) == pytest.approx(
        deviation, rel=0.15
    )


def test_masked_null_is_the_value_of_shuffled_rows():
    first = features(0)
    second = features(1, noise_of=features(0))
    null = permutation_null(first, second, k=8, permutations=3, seed=7, form="masked_first", unbiased=True)
    generator = torch.Generator().manual_seed(7)
    for value in null:
        order = torch.randperm(40, generator=generator).numpy()
        assert value == pytest.approx(released(first, second[order], 8, True), abs=1e-9)


def test_all_measures_by_layer_are_those_one_by_one():
    reference = features(0, n=60)
    states = {layer: features(layer, n=60, noise_of=reference) for layer in (1, 2)}
    table = cknna_by_layer(
        iter(states.items()), reference, 5, 30, pictures=np.arange(60) // 4, measures=MEASURES
    ).set_index(["layer", "measure"])
    for layer, rows in states.items():
        assert table.value[layer, "CKNNA"] == pytest.approx(cknna(rows, reference, 5), abs=1e-12)
        assert table.value[layer, "CKA"] == pytest.approx(cka(rows, reference), abs=1e-12)
    assert (
        (table.low < table.value).all()
        and (table.value < table.high).all()
        and (table.null_high < table.value).all()
    )


def measure_memory(folder, found) -> None:
    "The peak memory of CKNNA in MiB, over the memory before it, for 10 layers of 5000 tokens on disk."
    torch.set_num_threads(1)
    points = 5000
    layers = range(10)
    for name in [*(f"layer_{layer:03d}" for layer in layers), "teacher_encoder"]:
        growing = GrowingRows(folder / f"{name}.npy", 256)
        growing.append(torch.randn(points, 256))
        growing.commit()
    index = pd.DataFrame({"picture": np.arange(points) // 25, "shown": 1})
    before = peak_memory()
    features = Features("made up", folder, tuple(layers), ("encoder",), index)
    cknna_of_features(features, permutations=1, groups=0)
    save_json(peak_memory() - before, found)


def test_memory_is_that_of_one_layer(tmp_path):
    "Less than one kernel, which is 191 MiB in float64."
    assert in_fork(measure_memory, tmp_path, tmp_path / "found.json").exitcode == 0
    assert load_json(tmp_path / "found.json") < 160


def test_table_of_two_models_and_its_figure(parts, tmp_path):
    pictures = [draw(scene) for scene in scenes_of("test", 10, seed=1)]
    teachers = {"dense": load_teacher("dense")}
    models = [LoadedModel(f"seed {seed}", *embedded_model(parts, seed=seed)) for seed in (0, 1)]
    table = cknna_table(
        models,
        pictures,
        tmp_path / "kept",
        teachers,
        layers=[0, 4],
        k=5,
        permutations=10,
        measures=("CKNNA", "CKA"),
    )
    assert (
        len(table) == 2 * 2 * 2 * 2
        and set(table.reference) == {"encoder", "dense"}
        and table.n.eq(250).all()
        and table.pictures.eq(10).all()
    )
    again = cknna_table(None, folder=tmp_path / "kept", k=5, permutations=10, measures=("CKNNA", "CKA"))
    assert again.equals(table)
    pooled = cknna_table(models[0], pictures, layers=[4], k=3, permutations=10, level="pooled")
    assert pooled.n.eq(10).all() and list(pooled.reference) == ["encoder"]
    figure = cknna_table_figure(table, "CKA", aligned_layer=3)
    assert {trace.name for trace in figure.data} >= {"seed 0", "seed 1", "chance"}
    for wrong in ({"level": "patch"}, {"measures": ("cka",)}, {"form": "masked"}):
        with pytest.raises(InputError, match="level of"):
            cknna_table(models, pictures, **wrong)


def test_where_the_two_forms_part():
    "Unrelated and related noise, with and without a common mean: the four cases of the page."
    random = np.random.default_rng(0)
    one = random.normal(size=(400, 16))
    noise = random.normal(size=(400, 16))
    masked = {"form": "masked_first"}
    for second, most in ((noise, 0.05), (one + noise, 0.2)):
        centred, biased, unbiased = (
            cknna(one, second, k=10, **how) for how in ({}, masked, {**masked, "unbiased": True})
        )
        assert abs(centred - unbiased) < 0.03 < 0.2 < biased - centred and centred < most
    assert cknna(one, noise, k=200) > 0.25
    for unbiased in (False, True):
        assert (
            cknna(one + 3, noise + 3, k=350, **masked, unbiased=unbiased)
            > 1.2
            > 0.2
            > cknna(one, noise, k=350, **masked, unbiased=unbiased)
        )


def test_too_few_points_or_neighbours_are_refused():
    "Unbiased CKA has no value below four points; a point whose only neighbour is itself says nothing."
    few = [torch.randn(3, 4), torch.randn(3, 4)]
    with pytest.raises(InputError, match="unbiased CKA of 3 points. Expected: at least 4"):
        cka(*few, unbiased=True)
    groups = torch.tensor([0, 0, 1, 1, 1])
    with pytest.raises(InputError, match="unbiased CKA of 2 points"):  # without the larger group
        points = points_of(torch.randn(5, 4), groups=groups)
        cross(points, points, unbiased=True)
    many = [torch.randn(20, 4), torch.randn(20, 4)]
    with pytest.raises(InputError, match="k = 1 neighbours among 20 points. Expected: 2 to 20"):
        cknna(*many, k=1, form="masked_first")
    assert cknna(*many, k=1, form="masked_first", unbiased=True) < 1
