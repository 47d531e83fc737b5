"""What must hold for a measure's chance line or interval to be one: each fault is refused in a line, or
handled and told."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from family_checks import SIZES, photo
from tiny_models import tiny

from aligned_mllm.analysis.cka import cka, cka_null
from aligned_mllm.analysis.cknna import agreement, cknna
from aligned_mllm.analysis.cknna_intervals import compare, jackknife, null_values, permutation_null, units_of
from aligned_mllm.analysis.cknna_layers import cknna_by_layer
from aligned_mllm.analysis.cknna_tables import remarks_on
from aligned_mllm.analysis.convergence import convergence_figure
from aligned_mllm.analysis.copies import different_points, movable
from aligned_mllm.analysis.entropy import spatial_entropy, spatial_entropy_figure, spatial_entropy_table
from aligned_mllm.analysis.image_attention import image_attention_figure
from aligned_mllm.analysis.lens import check_ranked
from aligned_mllm.analysis.neighbours import kernel, neighbours, points_of, same_rows, space
from aligned_mllm.analysis.pca import component_colours, principal_directions
from aligned_mllm.analysis.permutation import check_pictures, check_several, without_width
from aligned_mllm.analysis.checkpoints import LoadedModel
from aligned_mllm.analysis.modality_gap import gap_table, tacs_curve, tacs_figure
from aligned_mllm.analysis.retention import retention_figure, retention_table
from aligned_mllm.analysis.right_words import right_words_figure
from aligned_mllm.analysis.structure import correlogram, spatial_contrast, structure_figure, structure_table
from aligned_mllm.analysis.word_probe import closest_words
from aligned_mllm.core import InputError
from aligned_mllm.data.record import Record
from aligned_mllm.teachers.words import WordList

FIVE = np.arange(60) // 5


def rows(seed, n=60, width=8):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def twice(seed):
    return rows(seed, 30).repeat(2, 1)


def points(*features):
    return [points_of(each) for each in features]


def _ratio_of_texts(texts):
    model, processor = tiny("llava")
    return retention_table(LoadedModel("one", model, processor), texts)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cknna(twice(0), twice(1), 5), "30 of 60 points equal an earlier point on both sides"),
        (lambda: cknna(twice(0), twice(1) + 1e-7 * rows(2), 5), "30 of 60 points"),
        (lambda: cka(twice(0), twice(1)), "30 of 60 points"),
        (lambda: cka_null(*points(twice(0), twice(1))), "30 of 60 points"),
        (lambda: permutation_null(twice(0), twice(1), 5), "30 of 60 points"),
        (lambda: movable(torch.tensor([0, 0, 1, 1, 2])), "3 units of points"),
        (lambda: permutation_null(rows(0)[FIVE % 4], rows(1), 3), "units=torch.arange"),
        (lambda: permutation_null(rows(0), rows(1), 5, permutations=20.0), "20.0 permutations"),
        (lambda: cka_null(*points(rows(0, 3), rows(1, 3))), "by chance of 3 points"),
        (lambda: cka(torch.eye(20), rows(0, 20), unbiased=True), "inner products are all equal"),
        (lambda: cknna(rows(0), rows(1), 5.0), "k = 5.0 neighbours.*a whole number"),
        (lambda: cknna(rows(0), rows(1), True), "k = True neighbours"),
        (lambda: neighbours(kernel(rows(0)), 5.0), "k = 5.0"),
        (lambda: cknna(rows(0).long() + 9, rows(1), 5), "features of torch.int64"),
        (lambda: cka(rows(0) > 0, rows(1)), "features of torch.bool"),
        (lambda: cka(rows(0).numpy().astype(np.uint8), rows(1)), "features of torch.uint8"),
        (lambda: jackknife(0.5, [0.4]), "at least two finite"),
        (lambda: jackknife(0.5, [0.4, math.nan]), "at least two finite"),
        (lambda: spatial_entropy_table([], [], shuffles=-1), "-1 shuffles"),
        (lambda: check_several([4, 1]), r"images of \[1, 4\] visual tokens"),
        (lambda: check_pictures([Record("a", ("1.png",), ()), Record("b", (), ())]), "first 'b'"),
        (lambda: check_ranked(torch.tensor([[0.5, 0.5]])), "all equal or not finite"),
        (lambda: check_ranked(torch.tensor([[0.5, math.nan]])), "all equal or not finite"),
        (lambda: closest_words(torch.zeros(2, 3), torch.eye(3), 1), "all equal or not finite"),
        (lambda: _ratio_of_texts(["a"]), "0 predicted tokens"),
        (lambda: correlogram(torch.ones(2, 1, 3), (1, 1)), "grid of 1 x 1"),
        (lambda: spatial_contrast(torch.ones(2, 1, 3)), "1 patches in each image"),
        (lambda: spatial_contrast(torch.zeros(1, 4, 3)), "4 patches that are all zeros"),
        (lambda: principal_directions(torch.randn(3, 5)), "3 tokens of width 5"),
    ],
)
def test_a_fault_is_refused_in_a_line(call, words):
    with pytest.raises(InputError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_whole_numbers_of_numpy_are_whole_numbers():
    assert cknna(rows(0), rows(1), np.int64(5)) == cknna(rows(0), rows(1), 5)


def test_rows_that_are_equal_up_to_rounding_are_alike_and_near_ones_are_not():
    apart = rows(0, 300, 20) * 1e-4 + 3  # all cosines are nearly 1
    for features, different in ((apart, 300), (apart[FIVE], 12), (rows(0)[FIVE] + 1e-7 * rows(1), 12)):
        assert len(same_rows(points_of(features)).unique()) == different
    kept = different_points(rows(0)[FIVE], rows(1))
    assert len(kept) == 60  # equal on one side only
    assert different_points(twice(0), twice(1), normalise=False).tolist() == list(range(30))


def test_a_table_keeps_one_of_each_point_and_says_so():
    measures = ("CKNNA", "mutual k-NN", "CKA")
    groups = np.arange(30) // 3
    once = cknna_by_layer(rows(0, 30)[None], rows(1, 30), 5, 30, pictures=groups, measures=measures)
    copied = cknna_by_layer(twice(0)[None], twice(1), 5, 30, pictures=np.tile(groups, 2), measures=measures)
    assert "copies" not in once and copied.copies.tolist() == [30] * 3
    assert np.allclose(copied[once.columns[2:]], once[once.columns[2:]], rtol=1e-9)
    assert "up to 30 points that occur twice left out" in remarks_on(copied) and remarks_on(once) == ""


def test_equal_points_are_chosen_at_random_and_the_share_is_told():
    values = rows(0, 6)[torch.randint(6, (90,), generator=torch.Generator().manual_seed(0))]
    crowded = space(values, 3)
    assert crowded.tied > 0.9 and space(rows(0), 3).tied == 0
    assert torch.allclose(crowded.inner, kernel(values).fill_diagonal_(-9).topk(3).values)
    assert 35 < crowded.near.double().mean() < 54  # the lower numbers are not preferred
    assert torch.equal(space(values, 3).near, crowded.near)
    found = compare(crowded, space(rows(1, 90), 3), 3, permutations=20, units=torch.arange(90))
    assert found[0]["tied"] == crowded.tied and "equal neighbours" in remarks_on(pd.DataFrame(found))


def unrelated(kind, seed):
    "Two unrelated sets of features, and the units to shuffle; None: to be found."
    one, two = rows(2 * seed, 40), rows(2 * seed + 1, 40)
    if kind == "captions":
        place = torch.arange(40) // 4
        return one[place], two[place] + 0.2 * rows(10**6 + seed, 40), None
    draw = torch.Generator().manual_seed(seed)
    one, two = (each[torch.randint(8, (40,), generator=draw)] for each in (one, two))
    return one, two, torch.arange(40)


@pytest.mark.parametrize("kind", ["captions", "few values"])
def test_five_in_a_hundred_unrelated_pairs_are_above_chance(kind):
    "More than 7 of 60 at 5 % have a probability of 1 %; rows shuffled one by one give 60."
    above = {"CKNNA": 0, "mutual k-NN": 0}
    for seed in range(60):
        first, second, units = unrelated(kind, seed)
        pair = space(first, 3), space(second, 3)
        units = units_of(*pair) if units is None else units
        shuffled = null_values(*pair, 3, 19, seed, units=units)
        value = agreement(*pair, 3)
        for name in above:
            above[name] += bool((shuffled[name] < value[name]).all())
    assert max(above.values()) <= 7 and above["CKNNA"] > 0


def test_cka_of_units_is_rarely_above_chance():
    above = []
    for seed in range(20):
        first, second, _ = unrelated("captions", seed)
        pair = space(first, 3), space(second, 3)
        row = compare(*pair, 3, measures=["CKA"], permutations=19, seed=seed)[0]
        above.append(row["value"] > row["null_high"])
        assert row["units"] == 10
    assert sum(above) <= 5


def test_points_all_equally_far_apart_have_one_value_of_cka():
    mean, deviation = cka_null(*points(torch.eye(20), rows(0, 20)))
    assert deviation == 0 and mean == pytest.approx(cka(torch.eye(20), rows(0, 20)))


def test_a_flat_map_has_no_entropy_and_a_figure_says_how_many():
    assert spatial_entropy(torch.zeros(2, 4), (2, 2)).isinf().all()
    assert spatial_entropy(torch.ones(2, 1), (1, 1)).isinf().all()
    table = pd.DataFrame({"model": "m", "layer": [1, 2], "value": 1.0, "pictures": 1, "undefined": [0, 0.25]})
    title = spatial_entropy_figure(table).layout.title.text
    assert "25% of rows flat" in title and "no bands: an interval needs two pictures" in title
    assert "no bands" in image_attention_figure(table).layout.title.text


def test_directions_without_variance_are_zero_and_grey():
    line = torch.arange(9.0)[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0])
    mean, directions, shares = principal_directions(line)
    assert shares[0] == pytest.approx(1) and (directions[1:] == 0).all()
    assert (component_colours((line.double() - mean) @ directions.T)[:, 1:] == 128).all()


def test_an_image_that_occurs_twice_counts_once():
    features = rows(0, 4 * 9).unflatten(0, (4, 9))
    once = structure_table({"teacher": features}, (3, 3))
    again = structure_table({"teacher": features.repeat(3, 1, 1)}, (3, 3))
    assert again.equals(once) and set(again.images) == {4}
    single = structure_table({"teacher": features[:1].repeat(3, 1, 1)}, (3, 3))
    assert single.low.isna().all() and "no bars" in structure_figure(single).layout.title.text


def test_an_interval_without_width_and_one_seed_are_told():
    table = pd.DataFrame({"loss": [0, 0.5], "low": [0, 0.1], "high": [0, 0.9]})
    assert without_width(table).startswith("; 1 without width") and without_width(table[1:]) == ""
    curve = {"model": "m", "seed": 0, "step": [1, 2], "seconds": 1.0, "name": "accuracy", "value": 0.5}
    assert "no bands" in convergence_figure(pd.DataFrame(curve)).layout.title.text


def test_one_picture_or_text_has_no_interval_and_figures_say_so(tmp_path):
    model, processor = tiny("llava")
    loaded = LoadedModel("one", model, processor)
    gaps = gap_table(loaded, [photo(0, SIZES[0])], ["a red dog"], WordList(["red", "dog"]))
    gaps = gaps.set_index("measure")
    assert gaps.low.isna().all() and np.isnan(gaps.value["TACS, caption of another picture"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    curve = tacs_curve({4: tmp_path}, [photo(0, SIZES[0])], ["a red dog"])
    assert curve.captions.tolist() == ["own"] and "no bands" in tacs_figure(curve).layout.title.text
    texts = retention_table(loaded, ["a red dog"])
    assert np.isnan(texts.low[0]) and "no bars" in retention_figure(texts).layout.title.text
    share = {"model": "one", "words": "input", "layer": 0, "pictures": 1, "right": [0.5], "chance": 0.2}
    shares = pd.DataFrame({**share, "low": np.nan, "high": np.nan})
    assert "no bars" in right_words_figure(shares).layout.title.text
