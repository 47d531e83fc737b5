"""Logit lens, nearest words and PCA pictures: against computations of another make, for every family of
models."""

import numpy as np
import pytest
import torch
from family_checks import SIZES, photo
from sklearn.decomposition import PCA
from tiny_models import FAMILIES, tiny

from aligned_mllm.analysis.lens import (
    lens_figure,
    lens_table,
    logit_lens,
    nearest_words,
    unreadable_share,
    view_picture,
)
from aligned_mllm.analysis.pca import pca_figure, pca_pictures, pca_table, principal_directions
from aligned_mllm.analysis.checkpoints import LoadedModel
from aligned_mllm.core import InputError
from aligned_mllm.data.collate import model_inputs
from aligned_mllm.models.trainable import add_lora


def tiny_loaded(family: str, wrapped: bool = False) -> LoadedModel:
    model, processor = tiny(family)
    return LoadedModel(family, add_lora(model, rank=2).eval() if wrapped else model, processor)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_last_layer_the_lens_is_the_models_own_prediction(family):
    loaded = tiny_loaded(family, wrapped=family in ("llava", "qwen3_vl"))
    batch = loaded.batch([photo(0, SIZES[0]), photo(1, SIZES[1])], "what is above")
    with torch.no_grad():
        own = loaded.model(**model_inputs(batch)).logits.float().softmax(-1)[batch["visual_mask"]]
    lens = logit_lens(loaded, batch, top=3, special=True)
    assert set(lens.layer) == {0, 1, 2, 3} and set(lens.patch) == set(range(len(own)))
    last = lens[lens.layer == 3].sort_values(["patch", "rank"])
    of_words = own[
        :, : len(loaded.processor.tokenizer)
    ]  # rows of the table beyond the tokenizer are not words
    assert np.abs(last.probability.to_numpy().reshape(-1, 3) - of_words.topk(3).values.numpy()).max() < 1e-5
    at = own[torch.tensor(last.patch.to_numpy()), torch.tensor(last.token_id.to_numpy())]
    assert np.abs(at.numpy() - last.probability.to_numpy()).max() < 1e-5
    assert (lens[lens.layer == 1].probability.to_numpy() - last.probability.to_numpy()).std() > 1e-6


@pytest.mark.parametrize(
    "family",
    ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl", "idefics3", "paligemma", "gemma3"],
)
def test_nearest_words_of_what_the_projector_made(family):
    loaded = tiny_loaded(family, wrapped=family == "llava")
    batch = loaded.batch([photo(0, SIZES[0])])
    pictures = {
        name: value
        for name, value in model_inputs(batch).items()
        if not name.startswith(("input_ids", "attention", "token_type", "mm_token"))
    }
    with torch.no_grad():
        made = loaded.model.get_image_features(**pictures).pooler_output
    made = (
        torch.cat([part.flatten(0, -2) for part in made])
        if isinstance(made, (list, tuple))
        else made.flatten(0, -2)
    )
    made = made[batch["visual_mask"][batch["input_ids"] == loaded.model.config.image_token_id]].numpy()
    table = loaded.model.get_input_embeddings().weight.detach().numpy()
    words = nearest_words(loaded, batch, top=1)
    tokenizer = loaded.processor.tokenizer
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = [index for index in range(len(tokenizer)) if index not in special]
    for patch in (0, len(made) // 2, len(made) - 1):
        cosines = (
            table[known] @ made[patch] / np.linalg.norm(table[known], axis=1) / np.linalg.norm(made[patch])
        )
        row = words[words.patch == patch].iloc[0]
        assert row.token_id == known[int(cosines.argmax())] and abs(row.cosine - cosines.max()) < 1e-5
    assert len(words) == len(made)


def test_special_tokens_are_shown_only_when_asked_for():
    loaded = tiny_loaded("llava")
    batch = loaded.batch([photo(0, SIZES[0])])
    size = len(loaded.processor.tokenizer)
    everything = logit_lens(loaded, batch, [1], top=size, special=True)
    assert set(loaded.processor.tokenizer.all_special_ids) <= set(everything.token_id)
    assert not set(loaded.processor.tokenizer.all_special_ids) & set(
        logit_lens(loaded, batch, [1], top=size - 4).token_id
    )
    with pytest.raises(InputError, match="best of"):
        logit_lens(loaded, batch, [1], top=size)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_words_and_the_unreadable_share_make_up_all_probability(family):
    loaded = tiny_loaded(family)
    batch = loaded.batch([photo(0, SIZES[0])], "what is above")
    share = unreadable_share(loaded, batch)
    with torch.no_grad():
        own = loaded.model(**model_inputs(batch)).logits.float().softmax(-1)[batch["visual_mask"]]
    tokenizer = loaded.processor.tokenizer
    special = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    hidden = sorted({*special, *tokenizer.all_special_ids, *range(len(tokenizer), own.shape[1])})
    assert share.shape == (4, len(own)) and torch.allclose(share[3], own[:, hidden].sum(-1), atol=1e-5)
    words = logit_lens(loaded, batch, top=len(tokenizer) - sum(number < len(tokenizer) for number in hidden))
    readable = words.groupby(["layer", "patch"]).probability.sum().to_numpy().reshape(share.shape)
    assert np.allclose(share.numpy() + readable, 1, atol=1e-4)


def test_two_models_stand_in_one_table_and_one_figure():
    models = [tiny_loaded("llava"), tiny_loaded("qwen2_5_vl")]
    picture = photo(0, (80, 80))
    table = lens_table(models, [picture], layers=[0, 2], top=2)
    assert list(table.model.unique()) == ["llava", "qwen2_5_vl"]
    one = table[table.model == "llava"]
    figure = lens_figure(one, picture, models[0].batch([picture])["grids"])
    assert [trace.type for trace in figure.data].count("heatmap") == 2
    with pytest.raises(InputError, match="view 3"):
        lens_figure(one, picture, models[0].batch([picture])["grids"], view=3)
    assert view_picture(picture, (0, 0, 0.5, 1)).size == (40, 80)


def test_directions_are_those_of_a_singular_value_decomposition():
    random = np.random.default_rng(0)
    for shape in ((60, 12), (12, 60)):
        tokens = random.standard_normal(shape) @ np.diag(np.linspace(3, 0.5, shape[1]))
        mean, directions, shares = principal_directions(torch.tensor(tokens))
        _, values, right = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
        assert np.abs(np.abs(directions.numpy() @ right[:3].T) - np.eye(3)).max() < 1e-8
        assert np.allclose(shares, values[:3] ** 2 / (values**2).sum()) and all(
            row[row.abs().argmax()] > 0 for row in directions
        )
        own = PCA(3, svd_solver="full").fit(tokens)  # of scikit-learn: signs as here
        assert np.allclose(directions, own.components_, atol=1e-10) and np.allclose(mean, own.mean_)


def test_colours_in_a_shared_basis_compare_and_in_their_own_do_not():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 12, 8, generator=generator) * torch.arange(8, 0, -1)
    grids = torch.tensor([[3, 4], [3, 4]])
    rolled = first.flip(0)
    shared, parts = pca_pictures({"a": first, "b": rolled}, grids, shared=True)
    assert np.array_equal(shared["a"][0], shared["b"][1]) and np.array_equal(shared["a"][1], shared["b"][0])
    assert set(parts.picture) == {-1} and np.allclose(
        parts[parts.entry == "a"].share, parts[parts.entry == "b"].share
    )
    turned = first @ torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    own, _ = pca_pictures({"a": first, "b": turned}, grids)
    same, _ = pca_pictures({"a": first, "b": turned}, grids, shared=True)
    alike = [np.abs(np.float64(one["a"][0]) - np.float64(one["b"][0])) for one in (own, same)]
    flipped = np.minimum(alike[0], np.abs(255 - np.float64(own["a"][0]) - np.float64(own["b"][0])))
    assert flipped.mean() < 2 < 20 < alike[1].mean()  # alone, a rotation only flips signs; together it shows
    with pytest.raises(InputError, match="widths"):
        pca_pictures({"a": first, "b": first[..., :5]}, grids, shared=True)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl", "idefics3", "gemma3"])
def test_pca_pictures_have_the_shape_of_their_views(family):
    loaded = tiny_loaded(family)
    pictures = [photo(0, SIZES[0]), photo(1, SIZES[1])]
    table = pca_table(loaded, pictures, layers=[0, 2])
    grids = [loaded.batch([picture])["grids"] for picture in pictures]
    for image, views in enumerate(grids):
        for view, (rows, columns) in enumerate(views.tolist()):
            part = table[(table.image == image) & (table["view"] == view) & (table.layer == 2)]
            assert len(part) == rows * columns == len(part.drop_duplicates(["row", "column"]))
    assert len(pca_figure(table[table.image == 0], pictures).data) == 3
    assert table.equals(pca_table(loaded, pictures, layers=[0, 2]))
