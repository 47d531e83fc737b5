"""Labels of patches: every scorer against an independent computation in float64, the search against the full
one, grids, padding, checksums, exact labels against brute force, and refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from teacher_checks import tiny
from torch.nn.functional import normalize
from transformers import Siglip2Config, Siglip2Model

from aligned_mllm.core import InputError, data_folder
from aligned_mllm.data.open import open_records
from aligned_mllm.teachers.exact_labels import ExactLabeller, patch_shares
from aligned_mllm.teachers.joint_space import JointSpace, load_joint_space, text_features, tiny_joint_space
from aligned_mllm.teachers.labeller import Labeller, grid_of_shape, require_labelled
from aligned_mllm.teachers.labels_by_name import LabelRequest, labeller_by_name
from aligned_mllm.teachers.patch_labels import Labels, patches_at_centres, top_words
from aligned_mllm.teachers.patch_scorers import SCORERS, surgery_terms, surgery_vectors
from aligned_mllm.teachers.targets import BatchView
from aligned_mllm.teachers.words import TEMPLATES, WordList
from aligned_mllm.worlds.cutouts import draw_cutouts, read_cutouts
from aligned_mllm.worlds.known_objects import KnownObjects
from aligned_mllm.worlds.photographs import PhotographSizes, write_photographs
from aligned_mllm.worlds.scene_data import Sizes, write_scenes
from aligned_mllm.worlds.scenes import DIGITS, World

WORDS = WordList(("circle", "square", "triangle", "cross", "red", "blue", "green", "yellow", "old", "new"))
WHOLE = (0.0, 0.0, 1.0, 1.0)


def picture(seed: int, size=(40, 40)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.BICUBIC)


@pytest.fixture(scope="module")
def spaces() -> dict[str, JointSpace]:
    return {kind: tiny_joint_space(WORDS, kind, seed=3, blocks=8) for kind in ("clip", "siglip")}


# An independent reference: a vision transformer in numpy, float64, from the weights alone.


def weights_of(space) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in space.model.state_dict().items()}


def linear(x, w, name):
    bias = w.get(f"{name}.bias", 0)
    return x @ w[f"{name}.weight"].T + bias


def norm(x, w, name):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON[0])
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


EPSILON = [1e-5]


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attention(queries, keys, values, heads=4):
    "(tokens, width) each."
    parts = []
    for q, k, v in zip(*(np.split(x, heads, -1) for x in (queries, keys, values))):
        parts.append(softmax(q @ k.T / np.sqrt(q.shape[-1])) @ v)
    return np.concatenate(parts, -1)


def activation(x, kind):
    if kind == "clip":
        return x / (1 + np.exp(-1.702 * x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def hidden_states(w, pixels, kind, blocks=8, patch=8):
    "States before each block and after the last, of one image (3, height, width), in float64."
    _, height, width = pixels.shape
    cut = pixels.reshape(3, height // patch, patch, width // patch, patch).transpose(1, 3, 0, 2, 4)
    cut = cut.reshape(-1, 3 * patch * patch)
    name = "vision_model.embeddings"
    kernel = w[f"{name}.patch_embedding.weight"]
    x = cut @ kernel.reshape(len(kernel), -1).T + w.get(f"{name}.patch_embedding.bias", 0)
    if kind == "clip":
        x = np.concatenate([w[f"{name}.class_embedding"][None], x])
    x = x + w[f"{name}.position_embedding.weight"]
    if kind == "clip":
        x = norm(x, w, "vision_model.pre_layrnorm")
    states = [x]
    for block in range(blocks):
        name = f"vision_model.encoder.layers.{block}"
        y = norm(x, w, f"{name}.layer_norm1")
        q, k, v = (linear(y, w, f"{name}.self_attn.{each}_proj") for each in "qkv")
        x = x + linear(attention(q, k, v), w, f"{name}.self_attn.out_proj")
        y = linear(norm(x, w, f"{name}.layer_norm2"), w, f"{name}.mlp.fc1")
        x = x + linear(activation(y, kind), w, f"{name}.mlp.fc2")
        states.append(x)
    return states


def pooled(w, tokens):
    "SigLIP's head over tokens (N, D), with its attention written out: (D,)."
    name = "vision_model.head"
    maps = (
        np.split(w[f"{name}.attention.in_proj_weight"], 3),
        np.split(w[f"{name}.attention.in_proj_bias"], 3),
    )
    inputs = (w[f"{name}.probe"][0], tokens, tokens)
    q, k, v = (x @ matrix.T + bias for x, matrix, bias in zip(inputs, *maps))
    z = linear(attention(q, k, v), w, f"{name}.attention.out_proj")
    y = linear(norm(z, w, f"{name}.layernorm"), w, f"{name}.mlp.fc1")
    return (z + linear(activation(y, "siglip"), w, f"{name}.mlp.fc2"))[0]


def value_path_of_head(w, tokens):
    "SigLIP's head for each token alone, by its value path: (N, D)."
    name = "vision_model.head"
    matrix, bias = (np.split(w[f"{name}.attention.in_proj_{each}"], 3)[2] for each in ("weight", "bias"))
    z = linear(tokens @ matrix.T + bias, w, f"{name}.attention.out_proj")
    y = linear(norm(z, w, f"{name}.layernorm"), w, f"{name}.mlp.fc1")
    return z + linear(activation(y, "siglip"), w, f"{name}.mlp.fc2")


def in_space(w, kind, last, patches):
    "The image's vector and the patches', (1 + N, D) of unit length."
    last, patches = (norm(x, w, "vision_model.post_layernorm") for x in (last, patches))
    if kind == "clip":
        every = np.concatenate([last[:1], patches]) @ w["visual_projection.weight"].T
    else:
        every = np.concatenate([pooled(w, last)[None], value_path_of_head(w, patches)])
    return every / np.linalg.norm(every, axis=-1, keepdims=True)


def reference_vectors(space, pixels, kind, scorer):
    EPSILON[0] = space.model.config.vision_config.layer_norm_eps
    w = weights_of(space)
    states = hidden_states(w, pixels.double().numpy(), kind)
    first = 1 if kind == "clip" else 0
    patches = states[-1]
    if scorer == "value_path" and kind == "clip":
        name = "vision_model.encoder.layers.7"
        y = norm(states[-2], w, f"{name}.layer_norm1")
        patches = linear(linear(y, w, f"{name}.self_attn.v_proj"), w, f"{name}.self_attn.out_proj")
    if scorer == "surgery":
        patches = states[-7].copy()
        for block in range(2, 8):
            name = f"vision_model.encoder.layers.{block}"
            y = norm(states[block], w, f"{name}.layer_norm1")
            v = linear(y, w, f"{name}.self_attn.v_proj")
            patches = patches + linear(attention(v, v, v), w, f"{name}.self_attn.out_proj")
    return in_space(w, kind, states[-1], patches[first:])


def reference_scores(vectors, features, scorer):
    "(N, words), as CLIP Surgery's code writes feature surgery: products, weights, mean over words removed."
    image, patches = vectors[0], vectors[1:]
    if scorer == "negated_cosine":
        return -patches @ features.T
    if scorer == "value_path":
        return patches @ features.T
    share = softmax(2 * image @ features.T)
    products = patches[:, None] * features[None] * (share / share.mean())[None, :, None]
    return (products - products.mean(1, keepdims=True)).sum(-1)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("scorer", SCORERS)
def test_scorers_agree_with_float64(spaces, kind, scorer):
    space = spaces[kind]
    pixels = space.encoder.pixels([picture(0), picture(1)])
    vectors = SCORERS[scorer].vectors(space, pixels).double().numpy()
    wanted = np.stack([reference_vectors(space, each, kind, scorer) for each in pixels])
    assert vectors.shape == wanted.shape == (2, 26, 24 if kind == "clip" else 32)
    assert np.abs(vectors - wanted).max() < 2e-5
    views = [BatchView(f"{n}", WHOLE, (5, 5)) for n in range(2)]
    for sign in (1, -1):
        labeller = Labeller(space, WORDS, scorer, n=4, sign=sign)
        labels = labeller.labels(views, list(pixels))
        features = labeller.features.double().numpy()
        scores = np.concatenate([reference_scores(each, features, scorer) for each in wanted])
        scores = sign * SCORERS[scorer].sign * scores
        best = -np.sort(-scores, 1)[:, :4]
        assert np.abs(labels.scores.numpy() - best.clip(0)).max() < 1e-4
        chosen = np.take_along_axis(scores, labels.words.numpy().clip(0), 1)
        assert np.abs(np.where(labels.words < 0, 0, chosen) - labels.scores.numpy()).max() < 1e-4
        assert (labels.words[labels.scores == 0] == -1).all() and (labels.words[best > 1e-4] >= 0).all()
    assert Labeller(space, WORDS, scorer).sign == SCORERS[scorer].sign


def test_fewer_blocks_than_six_are_all_used():
    space = tiny_joint_space(WORDS, blocks=2)
    pixels = space.encoder.pixels([picture(0)])
    assert torch.equal(surgery_vectors(space, pixels), surgery_vectors(space, pixels, 2))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_text_features_are_means_of_unit_vectors(spaces, kind):
    space = spaces[kind]
    templates = TEMPLATES["photo"] + TEMPLATES["word"]
    each = []
    for template in templates:
        texts = [template.replace("{}", word) for word in WORDS.words]
        padding = {"clip": True, "siglip": "max_length"}[kind]
        options = {"padding": padding, "truncation": True, "max_length": 16}
        ids = space.tokenizer(texts, return_tensors="pt", **options)["input_ids"]
        with torch.no_grad():
            found = space.model.get_text_features(input_ids=ids).pooler_output.double()
        each.append(found / found.norm(dim=1, keepdim=True))
    mean = sum(each) / 2
    wanted = (mean / mean.norm(dim=1, keepdim=True)).float()
    assert torch.allclose(text_features(space, WORDS, templates, chunk=3), wanted, atol=1e-6)


def test_a_folder_of_features_is_whole_and_belongs_to_its_model(spaces, tmp_path):
    space = spaces["clip"]
    in_memory = text_features(space, WORDS, dtype=torch.float16)
    made = text_features(space, WORDS, folder=tmp_path / "text", dtype=torch.float16, chunk=4)
    assert made.dtype == torch.float16 and torch.allclose(made.float(), in_memory.float(), atol=1e-3)
    stamp = (tmp_path / "text" / "features.npy").stat().st_mtime_ns
    again = text_features(space, WORDS, folder=tmp_path / "text", dtype=torch.float16)
    assert torch.equal(made, again) and (tmp_path / "text" / "features.npy").stat().st_mtime_ns == stamp
    others = {
        "words": lambda: text_features(
            space, WORDS.without(["old"]), folder=tmp_path / "text", dtype=torch.float16
        ),
        "type": lambda: text_features(space, WORDS, folder=tmp_path / "text"),
        "templates": lambda: text_features(space, WORDS, TEMPLATES["word"], tmp_path / "text", torch.float16),
        "checksum": lambda: text_features(
            tiny_joint_space(WORDS, seed=9), WORDS, folder=tmp_path / "text", dtype=torch.float16
        ),
    }
    for name, other in others.items():
        with pytest.raises(InputError, match=name):
            other()
    (tmp_path / "text" / "features.npy").write_bytes(b"damaged")
    with pytest.raises(InputError, match="delete the folder"):
        text_features(space, WORDS, folder=tmp_path / "text", dtype=torch.float16)


def full_search(vectors, features, n, sign=1, threshold=0.0):
    scores = (sign * vectors.double() @ features.double().T).float()
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :n]
    values = scores.gather(1, order)
    dropped = (values <= 0) | (values < threshold)
    return Labels(order.masked_fill(dropped, -1), values.masked_fill(dropped, 0))


@pytest.mark.parametrize("chunk", [1, 13, 100, 5000])
@pytest.mark.parametrize("sign, threshold, n", [(1, 0.0, 10), (-1, 0.0, 10), (1, 0.2, 3), (-1, 0.3, 1)])
def test_the_search_is_the_full_one(chunk, sign, threshold, n):
    draws = torch.Generator().manual_seed(n)
    features = normalize(torch.randn(700, 24, generator=draws), dim=1)
    features[200:400] = features[:200]  # ties
    features[600:] = features[600]  # a hundred equal words
    vectors = normalize(torch.randn(60, 24, generator=draws), dim=1)
    vectors[7] = sign * features[600]
    wanted = full_search(vectors, features, n, sign, threshold)
    found = top_words(vectors, features, n, sign, threshold, chunk=chunk)
    assert torch.equal(found.words, wanted.words) and torch.equal(found.scores, wanted.scores)
    assert found.words[7].tolist() == list(range(600, 600 + n))


def test_a_list_shorter_than_n_is_filled_with_none():
    vectors = torch.eye(3)[:2]
    labels = top_words(vectors, torch.eye(3), n=5)
    assert labels.words.tolist() == [[0, -1, -1, -1, -1], [1, -1, -1, -1, -1]]
    assert labels.scores.sum() == 2 and top_words(torch.zeros(0, 3), torch.eye(3)).words.shape == (0, 10)


def test_surgery_does_not_depend_on_chunks_or_large_exponents():
    draws = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(500, 16, generator=draws), dim=1)
    images = 400 * normalize(torch.randn(3, 16, generator=draws), dim=1)  # exp would overflow
    logits = 2 * images.double() @ features.double().T
    for chunk in (1, 70, 500):
        log_mean, common = surgery_terms(images, features, chunk)
        assert torch.allclose(common, logits.softmax(1) @ features.double())
        assert torch.allclose((logits - log_mean).exp(), 500 * logits.softmax(1))


@pytest.mark.parametrize(
    "own, grid", [((24, 24), (27, 27)), ((5, 5), (2, 3)), ((3, 7), (7, 3)), ((2, 2), (1, 1))]
)
def test_labels_are_those_of_the_patch_at_the_centre(own, grid):
    found = patches_at_centres(own, grid).view(grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            y, x = (row + 0.5) / grid[0] * own[0], (column + 0.5) / grid[1] * own[1]
            wanted = int(np.floor(y + 1e-9)) * own[1] + int(np.floor(x + 1e-9))
            assert found[row, column] == wanted


def test_the_labeller_keeps_its_own_resolution():
    for grid in ((1, 1), (5, 5), (16, 16), (27, 27), (40, 40)):
        assert grid_of_shape(grid, (24, 24)) == (24, 24)
    rows, columns = grid_of_shape((10, 30), (24, 24))
    assert abs(rows * columns / 576 - 1) < 0.05 and abs(columns / rows - 3) < 0.1
    assert grid_of_shape((1, 500), (4, 4))[0] == 1


def test_a_batch_of_any_views_is_one_view_after_the_other(spaces):
    labeller = Labeller(spaces["clip"], WORDS, n=4)
    shapes = [(5, 5), (3, 4), (7, 2), (9, 9)]
    boxes = [WHOLE, (0.25, 0.0, 1.0, 0.5), (0.0, -0.5, 1.0, 1.5), WHOLE]
    views = [BatchView(f"{n}", box, grid) for n, (box, grid) in enumerate(zip(boxes, shapes))]
    pixels = [labeller.pixels_of_view(picture(n), *view[1:]) for n, view in enumerate(views)]
    labels = labeller.labels(views, pixels)
    assert labels.words.dtype == torch.long and labels.scores.dtype == torch.float32
    assert len(labels.words) == len(labels.scores) == 25 + 12 + 14 + 81
    start = 0
    for view, own in zip(views, pixels):
        count = view.grid[0] * view.grid[1]
        alone = labeller.labels([view], [own])
        assert torch.allclose(alone.scores, labels.scores[start : start + count], atol=1e-5)
        start += count
    padded = labels.empty[37:51].view(7, 2)
    assert padded[0].all() and padded[6].all() and not padded[2:5].any()
    assert labeller.labels([], []).words.shape == (0, 4)


def test_siglip2_naflex_and_half_precision():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shape, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**shape, "patch_size": 16, "num_patches": 16}
    model = Siglip2Model(Siglip2Config(vision_config=vision, text_config=text))
    _, processor = tiny("siglip2")
    tokenizer = tiny_joint_space(WordList(("dog", "wall"))).tokenizer
    space = JointSpace("naflex", model, tokenizer, processor)
    for dtype in (torch.float32, torch.bfloat16):
        space.model.to(dtype)
        labeller = Labeller(space, WordList(("dog", "wall")), "value_path", n=2)
        views = [BatchView("a", WHOLE, grid) for grid in ((4, 4), (2, 6))]
        pixels = [labeller.pixels_of_view(picture(0, (64, 64)), *view[1:]) for view in views]
        labels = labeller.labels(views, pixels)
        assert labels.words.shape == (28, 2) and labels.scores.dtype == torch.float32
        vectors = SCORERS["value_path"].vectors(space, pixels[0][None])[0]
        assert vectors.shape == (17, 32)
        assert torch.allclose(vectors.norm(dim=1), torch.ones(17), atol=1e-4)


def test_a_changed_model_is_noticed_and_every_choice_signed(spaces, tmp_path):
    space = tiny_joint_space(WORDS)
    labeller = Labeller(space, WORDS)
    assert labeller.verify() == space.checksum
    assert not any(weight.requires_grad for weight in space.model.parameters())
    variants = [
        labeller,
        replace(labeller, scorer="value_path"),
        replace(labeller, sign=-1),
        replace(labeller, threshold=0.1),
        replace(labeller, n=3),
        replace(labeller, templates=TEMPLATES["word"]),
        replace(labeller, words=WORDS.without(["old"])),
        Labeller(tiny_joint_space(WORDS, seed=1), WORDS),
    ]
    assert len({str(sorted(each.signature().items())) for each in variants}) == len(variants)
    with torch.no_grad():
        space.model.text_projection.weight[0, 0] += 1e-3  # not the vision part
    for check in (labeller.verify, labeller.signature):
        with pytest.raises(InputError, match="now has checksum"):
            check()


def test_a_saved_model_is_loaded_with_its_checksum(spaces, tmp_path):
    for kind, space in spaces.items():
        for part in (space.model, space.tokenizer, space.processor):
            part.save_pretrained(tmp_path / kind)
        loaded = load_joint_space(tmp_path / kind)
        assert loaded.checksum == space.checksum
        assert torch.allclose(loaded.text(["red circle"]), space.text(["red circle"]), atol=1e-6)
        weights = load_file(tmp_path / kind / "model.safetensors")
        weights["text_model.embeddings.position_ids"] = torch.arange(16)[None]  # as in OpenAI's files
        save_file(weights, tmp_path / kind / "model.safetensors", {"format": "pt"})
        assert load_joint_space(tmp_path / kind).checksum == space.checksum
        del weights["text_model.final_layer_norm.weight"]
        save_file(weights, tmp_path / kind / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match="1 weights are missing"):
            load_joint_space(tmp_path / kind)


def test_rules_that_lose_most_labels_are_refused():
    space = tiny_joint_space(WORDS, seed=2)
    views = [BatchView("a", WHOLE, (5, 5)), BatchView("b", (0.0, -1.0, 1.0, 2.0), (5, 5))]
    shares = {}
    for sign in (1, -1):
        labeller = Labeller(space, WORDS, "value_path", sign=sign)
        pixels = [labeller.pixels_of_view(picture(0), *view[1:]) for view in views]
        shares[sign] = require_labelled(labeller, views, pixels, most=1.0)
        labels = labeller.labels(views, pixels)
        middle = torch.tensor([False, True, True, True, False])[:, None].expand(5, 5)
        shown = torch.cat([torch.ones(25, dtype=torch.bool), middle.flatten()])
        assert shares[sign] == pytest.approx(float(labels.empty[shown].float().mean()))
    bad = max(shares, key=shares.get)
    assert shares[bad] > 0.5 > shares[-bad]
    labeller = Labeller(space, WORDS, "value_path", sign=bad)
    with pytest.raises(InputError, match="'value_path' with sign .*choose the scorer 'negated_cosine' or"):
        require_labelled(labeller, views, pixels)


# Exact labels


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    world = World(kinds=("circle", "square", DIGITS[3]), noise=0)
    return write_scenes(tmp_path_factory.mktemp("world") / "scenes", 1, Sizes(6, 2, 2, 2), world)


def brute_force(mask, box, grid, points=60):
    "Means of a mask at many points of each patch."
    left, top, right, bottom = box
    x, y = ((np.arange(count * points) + 0.5) / (count * points) for count in grid[::-1])
    x = (left + x * (right - left)) * mask.shape[1]
    y = (top + y * (bottom - top)) * mask.shape[0]
    inside = ((y >= 0) & (y < mask.shape[0]))[:, None] & ((x >= 0) & (x < mask.shape[1]))[None]
    rows, columns = (np.clip(np.floor(v).astype(int), 0, s - 1) for v, s in zip((y, x), mask.shape))
    values = mask[rows][:, columns] * inside
    return values.reshape(grid[0], points, grid[1], points).mean((1, 3)).ravel()


@pytest.mark.parametrize("box", [WHOLE, (0.1, 0.3, 0.77, 0.9), (-0.25, -0.5, 1.25, 1.5)])
@pytest.mark.parametrize("grid", [(5, 5), (3, 7)])
def test_shares_of_patches_are_areas(box, grid):
    mask = np.random.default_rng(0).random((11, 17))
    assert np.abs(patch_shares(mask, box, grid) - brute_force(mask, box, grid)).max() < 0.02
    if box == WHOLE:
        assert patch_shares(mask, box, grid).mean() == pytest.approx(mask.mean())


def test_known_scenes_explain_their_pictures(scenes):
    known = KnownObjects(scenes)
    records = open_records(scenes)
    for index in range(3):
        name = records[index].images[0]
        shares = [share for _, share in known[name]]
        visible = np.asarray(records.image(name)).astype(float).std(2)  # the background is grey
        assert visible[sum(shares) < 0.01].max() < 2
        assert 0 <= sum(shares).min() and sum(shares).max() <= 1.001
    assert known.digest == KnownObjects(scenes).digest != KnownObjects(scenes, ("kind",)).digest
    assert set(KnownObjects(scenes, ("kind",)).words) <= {"circle", "square", DIGITS[3]}


def test_exact_labels_are_the_words_of_the_largest_shares(scenes):
    known = KnownObjects(scenes)
    labeller = ExactLabeller(known, least=0.3, n=3)
    views = [
        BatchView(name, box, (4, 6)) for name in list(known)[:4] for box in (WHOLE, (0.2, 0.1, 1.2, 0.8))
    ]
    labels = labeller.labels(views)
    assert labels.words.shape == (len(views) * 24, 3) and labels.words.dtype == torch.long
    shares = np.zeros((len(labels.words), len(labeller.words)))
    for number, view in enumerate(views):
        for words, mask in known[view.image]:
            for word in words:
                part = slice(24 * number, 24 * number + 24)
                shares[part, labeller.words.index[word]] += brute_force(mask, view.box, view.grid)
    best = -np.sort(-np.where(shares < 0.3, 0, shares), 1)[:, :3]
    sure = (np.abs(shares - 0.3) > 0.02).all(1)  # brute force is not exact
    assert sure.mean() > 0.9
    assert np.abs(labels.scores.numpy() - best)[sure].max() < 0.03
    assert (labels.scores[:, :-1] >= labels.scores[:, 1:]).all()


def test_the_background_is_none_or_a_word(scenes):
    known = KnownObjects(scenes)
    views = [BatchView(name, WHOLE, (5, 5)) for name in known]
    without = ExactLabeller(known).labels(views)
    labeller = ExactLabeller(known, background="background")
    labels = labeller.labels(views)
    assert without.empty.any() and not labels.empty.any()
    word = labeller.words.index["background"]
    assert (labels.words[without.empty, 0] == word).all() and (labels.words[without.empty, 1:] == -1).all()
    assert (labels.scores[without.empty, 0] > 0).all()
    assert torch.equal(labels.scores[~without.empty], without.scores[~without.empty])
    padded = labeller.labels([BatchView(next(iter(known)), (0.0, -1.0, 1.0, 2.0), (3, 1))])
    assert padded.empty.tolist() == [True, False, True]


def test_collages_have_their_names(tmp_path):
    source = read_cutouts(draw_cutouts(tmp_path / "drawn"))
    folder = write_photographs(tmp_path / "collages", source, 0, PhotographSizes(3, 1, 1, 1, 0))
    known = KnownObjects(folder)
    labeller = ExactLabeller(known, least=0.5)
    name = "images/train-00000.jpg"
    labels = labeller.labels([BatchView(name, WHOLE, (16, 16))])
    names = {words[0] for words, _ in known[name]}
    assert names == {text for texts in labels.texts(labeller.words) for text in texts}
    area = sum(mask.mean() for _, mask in known[name])
    assert abs(float((~labels.empty).float().mean()) - area) < 0.1


def test_both_labellers_have_one_interface(scenes, spaces):
    exact = ExactLabeller(KnownObjects(scenes))
    by_clip = Labeller(spaces["clip"], WORDS)
    for name in ("name", "words", "n", "rule", "remedy", "pixels_of_view", "labels", "verify", "signature"):
        assert hasattr(exact, name) and hasattr(by_clip, name)
    assert exact.pixels_of_view is None and exact.verify() == exact.objects.digest
    assert exact.signature() != replace(exact, least=0.5).signature() != replace(exact, n=2).signature()


BAD = {
    "unknown scorer": lambda s, f: Labeller(s, WORDS, "cosine"),
    "sign 2": lambda s, f: Labeller(s, WORDS, sign=2),
    "negative threshold": lambda s, f: Labeller(s, WORDS, threshold=-0.1),
    "no labels": lambda s, f: Labeller(s, WORDS, n=0),
    "no template": lambda s, f: Labeller(s, WORDS, templates=()),
    "template without a place": lambda s, f: Labeller(s, WORDS, templates=("a photo",)),
    "unknown word": lambda s, f: Labeller(s, WordList(("okapi",))),
    "features in bfloat16": lambda s, f: Labeller(s, WORDS, dtype=torch.bfloat16),
    "pixels missing": lambda s, f: Labeller(s, WORDS).labels([BatchView("a", WHOLE, (5, 5))], []),
    "empty grid": lambda s, f: Labeller(s, WORDS).pixels_of_view(picture(0), WHOLE, (0, 5)),
    "empty box": lambda s, f: Labeller(s, WORDS).pixels_of_view(picture(0), (0.5, 0, 0.5, 1), (5, 5)),
    "no views": lambda s, f: require_labelled(Labeller(s, WORDS), [], []),
    "another width": lambda s, f: top_words(torch.ones(1, 3), torch.ones(2, 4)),
    "not finite": lambda s, f: top_words(torch.full((1, 3), torch.nan), torch.ones(2, 3)),
    "vision alone": lambda s, f: JointSpace("v", s.model.vision_model, s.tokenizer, s.processor),
    "no head": lambda s, f: JointSpace("h", headless(), s.tokenizer, s.processor),
    "unknown kind": lambda s, f: tiny_joint_space(WORDS, "dino"),
    "no folder": lambda s, f: load_joint_space(f / "nowhere"),
    "a teacher without text": lambda s, f: load_joint_space(without_text(f / "vision")),
    "no geometry": lambda s, f: KnownObjects(f),
    "unknown field": lambda s, f: KnownObjects(f / "scenes", ("name",)),
    "unknown image": lambda s, f: exact(f).labels([BatchView("a.jpg", WHOLE, (5, 5))]),
    "words left out": lambda s, f: exact(f, words=WordList(("circle",))),
    "background left out": lambda s, f: exact(f, words=WordList(exact(f).words.words), background="sky"),
    "share 0": lambda s, f: exact(f, least=0.0),
    "share 2": lambda s, f: exact(f, least=2.0),
    "n 0": lambda s, f: exact(f, n=0),
    "damaged geometry": lambda s, f: KnownObjects(damaged(f / "damaged")),
}


def exact(folder, **options):
    return ExactLabeller(KnownObjects(folder / "scenes"), **options)


def headless():
    import transformers as t

    space = tiny_joint_space(WORDS, "siglip")
    space.model.config.vision_config.vision_use_head = False
    return t.SiglipModel(space.model.config)


def without_text(folder):
    for part in tiny("dinov2"):
        part.save_pretrained(folder)
    return folder


def damaged(folder):
    folder.mkdir(exist_ok=True)
    (folder / "train.geometry.jsonl").write_text('{"objects": [\n', encoding="utf-8")
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case, spaces, scenes, tmp_path):
    (tmp_path / "scenes").symlink_to(scenes)
    with pytest.raises(InputError):
        BAD[case](spaces["clip"], tmp_path)


def test_the_carried_clip_finds_what_patches_show(tmp_path):
    "Its vision tower is the embedded encoder; by surgery most best words are true, by the literal rule few."
    folder = data_folder() / "parts"
    space = load_joint_space(folder / "clip")
    tower = load_file(folder / "encoder" / "model.safetensors")
    whole = load_file(folder / "clip" / "model.safetensors")
    assert tower and all(torch.equal(value, whole[f"vision_model.{name}"]) for name, value in tower.items())
    with pytest.raises(InputError, match="template"):
        text_features(space, WordList(("red",)), TEMPLATES["photo"])
    known = KnownObjects(write_scenes(tmp_path / "scenes", 3, Sizes(2, 2, 2, 30)))
    records = open_records(tmp_path / "scenes")
    names = [name for name in known if "test" in name]
    views = [BatchView(name, WHOLE, (5, 5)) for name in names]
    exact = ExactLabeller(known, least=0.3)
    true = exact.labels(views)
    share = {}
    for scorer in ("surgery", "negated_cosine"):
        request = LabelRequest(exact.words, scorer=scorer, template="word")
        labeller = labeller_by_name("scenes_clip", request)
        pixels = [labeller.pixels_of_view(records.image(name), WHOLE, (5, 5)) for name in names]
        best = labeller.labels(views, pixels).words[:, :1]
        used = ~true.empty & (best[:, 0] >= 0)
        share[scorer] = float((true.words == best).any(1)[used].float().mean())
    assert share["surgery"] > 0.7 and share["negated_cosine"] < 0.3
