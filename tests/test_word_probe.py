"""Nearest words of visual tokens, modality gap and language retention: against plain computations in NumPy,
on tiny models of several families, with LoRA too; and their refusals."""

import numpy as np
import pandas as pd
import pytest
import torch
from family_checks import SIZES, photo
from tiny_models import tiny

from aligned_mllm.analysis.checkpoints import LoadedModel
from aligned_mllm.analysis.features import ROW, picture_batch
from aligned_mllm.analysis.modality_gap import (
    distance_between,
    gap_table,
    nearest_distances,
    run_checkpoints,
    tacs,
    tacs_curve,
    tacs_table,
)
from aligned_mllm.analysis.probe_figures import probe_figure, written_words
from aligned_mllm.analysis.retention import plain_texts, retention_figure, retention_table, text_losses
from aligned_mllm.analysis.right_words import labelled_patches, right_words
from aligned_mllm.analysis.token_map import map_figure, map_table, two_coordinates
from aligned_mllm.analysis.word_probe import (
    closest_words,
    leading_tokens,
    probe_table,
    token_kinds,
    visual_tokens,
    word_vectors,
)
from aligned_mllm.core import InputError, data_folder
from aligned_mllm.data.collate import model_inputs
from aligned_mllm.data.records import Records
from aligned_mllm.models.trainable import add_lora
from aligned_mllm.teachers.exact_labels import ExactLabeller
from aligned_mllm.teachers.words import WordList
from aligned_mllm.worlds.known_objects import KnownObjects
from aligned_mllm.worlds.scene_data import Sizes, write_scenes
from aligned_mllm.worlds.small_models import embedded_model

ONES = ["llava", "llava_next", "qwen2_5_vl", "internvl", "gemma3"]
WORDS = WordList("red blue tower circle dog house left above".split())
PICTURES = [photo(seed, SIZES[seed % 3]) for seed in range(5)]


def loaded_tiny(family: str, seed: int = 0, wrapped: bool = False) -> LoadedModel:
    model, processor = tiny(family, seed)
    model = add_lora(model, rank=2).eval() if wrapped else model
    if wrapped:  # an adapter that starts at zero would change nothing
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.normal_(std=0.3)
    return LoadedModel(f"{family} {seed}", model, processor)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


# words of a model


@pytest.mark.parametrize("family", ONES)
def test_a_word_is_the_mean_embedding_of_its_tokens_inside_a_text(family):
    loaded = loaded_tiny(family, wrapped=family == "llava")
    tokenizer = loaded.processor.tokenizer
    found = word_vectors(loaded.model, tokenizer, WORDS, batch_size=3)
    for word, vector in zip(WORDS.words, found.numpy()):
        ids = tokenizer(f"a {word}", add_special_tokens=False, return_offsets_mapping=True)
        own = [one for one, (_, end) in zip(ids["input_ids"], ids["offset_mapping"]) if end > 1]
        with torch.no_grad():
            rows = loaded.model.get_input_embeddings()(torch.tensor([own]))[0].numpy()
        assert len(own) >= 1 and np.abs(rows.mean(0) - vector).max() < 1e-6
    assert not found.requires_grad and found.dtype == torch.float32


@pytest.mark.parametrize("family", ONES)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_word_in_context_is_the_state_at_its_last_token(family, layer):
    loaded = loaded_tiny(family, wrapped=family == "qwen2_5_vl")
    tokenizer = loaded.processor.tokenizer
    templates = ("the {} is above", "a small {}.")
    found = word_vectors(loaded.model, tokenizer, WORDS, layer, templates, batch_size=5)
    for word, vector in zip(WORDS.words, found.numpy()):
        states = []
        for template in templates:
            text = template.split("{}")[0] + word
            with torch.no_grad():
                output = loaded.model(
                    input_ids=torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True
                )
            states.append(output.hidden_states[layer][0, -1].numpy())
        assert np.abs(np.mean(states, axis=0) - vector).max() < 1e-4


def test_a_leading_token_is_kept_and_a_training_model_stays_so():
    from tokenizers.processors import TemplateProcessing

    loaded = loaded_tiny("llava")
    tokenizer = loaded.processor.tokenizer
    assert leading_tokens(tokenizer) == []
    plain = word_vectors(loaded.model, tokenizer, WORDS, 2)
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    template = TemplateProcessing(single="<s> $A </s>", special_tokens=list(zip(("<s>", "</s>"), ids)))
    tokenizer.backend_tokenizer.post_processor = template
    assert leading_tokens(tokenizer) == ids[:1]
    loaded.model.train()
    behind = word_vectors(loaded.model, tokenizer, WORDS, 2)
    assert loaded.model.training and (behind - plain).abs().max() > 1e-3
    with torch.no_grad():
        ids = torch.tensor([tokenizer("a photo of a dog")["input_ids"][:-1]])  # without the end token
        output = loaded.model.eval()(input_ids=ids, output_hidden_states=True)
    assert (output.hidden_states[2][0, -1] - behind[4]).abs().max() < 1e-4


def test_words_and_templates_that_cannot_be_read_are_refused():
    loaded = LoadedModel("embedded", *embedded_model(data_folder() / "parts"))
    tokenizer = loaded.processor.tokenizer
    known = WordList(["red", "circle"])
    for words, options, message in (
        (WordList(["dog"]), {}, "cannot encode"),
        (known, {"source": 2}, "does not know"),
        (known, {"source": 2, "templates": ("scene",)}, "template"),
        (known, {"source": 2, "templates": "{}"}, "list of texts"),
        (known, {"source": 7, "templates": ("{}",)}, "layers"),
    ):
        with pytest.raises(InputError, match=message):
            word_vectors(loaded.model, tokenizer, words, **options)


# nearest words


@pytest.mark.parametrize("centred", [False, True])
def test_nearest_words_are_those_of_a_sorted_table_of_cosines(centred):
    random = np.random.default_rng(0)
    states = random.normal(size=(5000, 12)).astype(np.float32) + 1
    vectors = random.normal(size=(30, 12)).astype(np.float32) - 1
    indices, cosines = closest_words(torch.tensor(states), torch.tensor(vectors), 4, centred)
    if centred:
        states = states - states.mean(0)
        vectors = vectors - vectors.mean(0)
    expected = unit(states.astype(np.float64)) @ unit(vectors.astype(np.float64)).T
    assert np.abs(np.sort(expected, 1)[:, :-5:-1] - cosines.numpy()).max() < 1e-5
    assert np.abs(np.take_along_axis(expected, indices.numpy(), 1) - cosines.numpy()).max() < 1e-5


@pytest.mark.parametrize(
    "states, top", [(torch.ones(3, 5), 1), (torch.ones(3, 4), 9), (torch.zeros(3, 4), 1), (torch.ones(4), 1)]
)
def test_states_without_a_nearest_word_are_refused(states, top):
    with pytest.raises(InputError):
        closest_words(states, torch.eye(8, 4), top)


@pytest.mark.parametrize("family", ONES)
def test_the_table_holds_the_words_of_every_token_at_its_place(family):
    loaded = loaded_tiny(family, wrapped=family == "internvl")
    table = probe_table(loaded, PICTURES, WORDS, source=2, layer=1, top=2)
    vectors = word_vectors(loaded.model, loaded.processor.tokenizer, WORDS, 2).numpy()
    for number, picture in enumerate(PICTURES):
        batch = picture_batch(loaded.processor, [picture])
        with torch.no_grad():
            output = loaded.model(**model_inputs(batch), output_hidden_states=True)
        states = output.hidden_states[1][batch["visual_mask"]].numpy()
        cosines = unit(states) @ unit(vectors).T
        part = table[table.picture == number]
        assert len(part) == 2 * len(states) and set(part.model) == {loaded.name}
        first = part[part["rank"] == 1]
        assert np.abs(first.cosine.to_numpy() - cosines.max(1)).max() < 1e-4
        assert np.abs(first.norm - np.linalg.norm(states, axis=1)).max() < 1e-4
        same = first.word.to_numpy() == np.array(WORDS.words)[cosines.argmax(1)]
        assert same.mean() > 0.98  # ties within rounding aside
        sizes = first.groupby("view", sort=True)[["row", "column"]].max() + 1
        assert sizes.to_numpy().tolist() == batch["grids"].tolist()
    assert set(table.words) == {"layer 2"} and set(table.layer) == {1}


# sink and dead tokens


def places(pictures: int, patches: int, shown=None) -> np.ndarray:
    rows = np.zeros((pictures * patches, len(ROW)), dtype=int)
    rows[:, 0] = np.repeat(np.arange(pictures), patches)
    rows[:, 4] = 1 if shown is None else shown
    return rows


def test_sink_dead_and_padding_are_marked_by_their_rules():
    norms = np.ones(40)
    norms[[3, 17]] = 3.5
    norms[5] = 2.9
    words = np.arange(40) + 100
    words[::10] = words[1::10] = words[2::10] = words[3::10] = 7  # 4 of 10 tokens of each picture
    kinds = token_kinds(norms, words, places(4, 10))
    expected = np.full(40, "alive", dtype=object)
    for first in (0, 1, 2, 3):
        expected[first::10] = "dead"
    expected[[3, 17]] = "sink"
    assert kinds.tolist() == expected.tolist()
    assert "dead" not in token_kinds(norms[:30], words[:30], places(3, 10))  # too few pictures to know
    one = words.copy()
    one[10:] = np.arange(30) + 200  # the word is common in one picture only
    assert "dead" not in token_kinds(norms, one, places(4, 10))
    shown = np.ones(40, dtype=int)
    shown[[3, 5]] = 0
    hidden = token_kinds(norms, words, places(4, 10, shown))
    assert hidden[3] == hidden[5] == "padding" and hidden[17] == "sink"


@pytest.mark.parametrize("limits", [{"sink": 1.0}, {"common": 0.0}, {"common": 1.5}, {"sink": float("nan")}])
def test_limits_out_of_range_are_refused(limits):
    with pytest.raises(InputError, match="above 1"):
        token_kinds(np.ones(4), np.arange(4), places(4, 1), **limits)


# right words


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    data = write_scenes(tmp_path_factory.mktemp("data"), 3, Sizes(train=2, captions=2, validation=2, test=8))
    records = Records(data / "test.jsonl", data)
    names = list(dict.fromkeys(name for record in records for name in record.images))
    return ExactLabeller(KnownObjects(data), least=0.25), names, [records.image(name) for name in names]


def test_right_words_are_counted_over_pictures_with_their_chance(scenes):
    labeller, names, images = scenes
    loaded = LoadedModel("embedded", *embedded_model(data_folder() / "parts"))
    tokens = visual_tokens(loaded, images)
    labels = labelled_patches(labeller, tokens, images, names)
    own = labeller.labels(tokens.views(names)).texts(labeller.words)
    table = probe_table(loaded, images, labeller.words, top=2)
    best = table[table["rank"] == 1].word.tolist()
    pairs = [(row[0], set(words), word) for row, words, word in zip(tokens.rows.tolist(), own, best) if words]
    shown = {at for at, *_ in pairs}
    shares = [np.mean([word in words for at, words, word in pairs if at == i]) for i in shown]
    chance = np.mean([[word in words for _, _, word in pairs] for _, words, _ in pairs])
    (found,) = right_words(table, labels).itertuples()
    assert found.right == pytest.approx(np.mean(shares)) and found.chance == pytest.approx(chance)
    assert found.patches == len(pairs) and found.pictures == len(shares)
    half = 1.96 * np.std(shares, ddof=1) / len(shares) ** 0.5
    assert found.high - found.right >= min(half, 1 - found.right) - 1e-9
    perfect = table[table["rank"] == 1].reset_index(drop=True)
    perfect["word"] = [sorted(words)[0] if words else word for words, word in zip(own, best)]
    assert right_words(perfect, labels).right.tolist() == [1.0]


def test_labels_of_other_pictures_are_refused(scenes):
    labeller, names, images = scenes
    loaded = LoadedModel("embedded", *embedded_model(data_folder() / "parts"))
    tokens = visual_tokens(loaded, images[:4])
    with pytest.raises(InputError, match="same pictures"):
        labelled_patches(labeller, tokens, images, names)
    labels = labelled_patches(labeller, visual_tokens(loaded, images), images, names)
    table = probe_table(loaded, images[:4], labeller.words)
    with pytest.raises(InputError, match="same pictures and grids"):
        right_words(table, labels)


# figures


def test_the_figure_has_a_panel_for_each_checkpoint_and_each_word_once():
    models = [loaded_tiny("llava_next", seed) for seed in (0, 1)]
    table = pd.concat([probe_table(models, PICTURES, WORDS, source) for source in ("input", 2)])
    part = table[(table.picture == 0) & (table["view"] == 1)]
    figure = probe_figure(table, PICTURES, 0, 1)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    grids = {}
    for trace in maps:
        texts = np.array(trace.text, dtype=object)
        filled = texts != ""
        grids.setdefault(trace.xaxis, np.full(texts.shape, "", dtype=object))[filled] = texts[filled]
        assert (np.isnan(np.array(trace.z, dtype=float)) == ~filled).all()
    assert len(grids) == 4  # two models, two sources
    choices = [(model.name, source) for source in ("input", "layer 2") for model in models]
    for (model, source), grid in zip(choices, grids.values()):
        mine = part[(part.model == model) & (part.words == source) & (part["rank"] == 1)]
        mine = mine.sort_values(["row", "column"])
        assert grid.ravel().tolist() == mine.word.tolist()
    for options in ({"picture": 9}, {"view": 30}):
        with pytest.raises(InputError):
            probe_figure(table, PICTURES, **options)


def test_on_a_fine_grid_a_word_is_written_once_for_each_region():
    words = np.full((20, 20), "sky", dtype=object)
    words[8:12, 8:12] = "dog"
    words[0, 0] = words[19, 19] = "cat"
    shown = written_words(words)
    assert sorted(shown[shown != ""]) == ["dog", "sky"] and shown[8:12, 8:12].tolist() != [[""] * 4] * 4
    assert (written_words(words[:10, :10]) == words[:10, :10]).all()


def test_names_from_data_are_escaped_in_the_figure():
    table = probe_table(loaded_tiny("llava"), PICTURES[:1], WORDS)
    hostile = table.assign(word="<img src=x onerror=alert(1)>", model="<b>model</b>")
    text = probe_figure(hostile, PICTURES).to_json()
    assert "<img src" not in text and "<b>model" not in text


# modality gap, TACS


def test_distances_are_those_of_all_pairs():
    random = np.random.default_rng(1)
    visual = random.normal(size=(1500, 7)).astype(np.float32)
    words = random.normal(size=(40, 7)).astype(np.float32)
    pairs = np.linalg.norm(visual[:, None].astype(np.float64) - words, axis=-1)
    found = nearest_distances(torch.tensor(visual), torch.tensor(words), chunk=9)
    assert np.abs(found.numpy() - pairs.min(1)).max() < 1e-4
    between = np.linalg.norm(words[:, None].astype(np.float64) - words, axis=-1)[np.triu_indices(40, 1)]
    assert distance_between(torch.tensor(words)) == pytest.approx(between.mean(), rel=1e-5)
    assert distance_between(torch.tensor(words), most=10) == pytest.approx(between.mean(), rel=0.3)


def plain_tacs(visual: np.ndarray, tokens: np.ndarray, k: int) -> float:
    best = (unit(visual.astype(np.float64)) @ unit(tokens.astype(np.float64)).T).max(1)
    return float(np.sort(best)[::-1][:k].mean())


@pytest.mark.parametrize("family", ONES)
def test_the_gap_and_tacs_of_a_model_are_those_of_its_own_features(family):
    loaded = loaded_tiny(family, wrapped=family == "llava")
    captions = ["two red towers", "a blue dog", "two red towers", "the house", "left of a circle"]
    table = tacs_table(loaded, PICTURES, captions, WORDS, k=3)
    tokenizer = loaded.processor.tokenizer
    embed = loaded.model.get_input_embeddings()
    words = word_vectors(loaded.model, tokenizer, WORDS).numpy()

    def vectors(caption: str) -> np.ndarray:
        with torch.no_grad():
            return embed(torch.tensor([tokenizer(caption)["input_ids"]]))[0].numpy()

    for number, (row, caption) in enumerate(zip(table.itertuples(), captions)):
        batch = picture_batch(loaded.processor, [PICTURES[number]])
        with torch.no_grad():
            output = loaded.model(**model_inputs(batch), output_hidden_states=True)
        visual = output.hidden_states[0][batch["visual_mask"]].numpy()
        shown = visual_tokens(loaded, [PICTURES[number]]).shown.numpy()
        visual = visual[shown]
        other = captions[(number + 1) % 5] if captions[(number + 1) % 5] != caption else None
        assert row.TACS == pytest.approx(plain_tacs(visual, vectors(caption), 3), abs=1e-5)
        assert row.other == pytest.approx(plain_tacs(visual, vectors(other), 3), abs=1e-5)
        pairs = np.linalg.norm(visual[:, None].astype(np.float64) - words, axis=-1)
        assert row.gap == pytest.approx(pairs.min(1).mean(), rel=1e-4)
        assert row.norm == pytest.approx(np.linalg.norm(visual, axis=1).mean(), rel=1e-5)
    gaps = gap_table(loaded, PICTURES, captions, WORDS, k=3).set_index("measure")
    assert gaps.value["modality gap"] == pytest.approx(table.gap.mean())
    more = table.TACS - table.other
    half = 2.7764 * more.std() / 5**0.5
    row = gaps.loc["TACS, own caption minus another"]
    assert (row.value, row.high) == pytest.approx((more.mean(), more.mean() + half), rel=1e-3)


def test_equal_captions_have_no_other():
    loaded = loaded_tiny("llava")
    table = tacs_table(loaded, PICTURES[:2], ["a dog", "a dog"])
    assert table.other.isna().all() and "gap" not in table.columns
    gaps = gap_table(loaded, PICTURES[:2], ["a dog", "a dog"], WORDS).set_index("measure")
    assert np.isnan(gaps.value["TACS, caption of another picture"])


def test_the_curve_reads_the_checkpoints_of_a_run(tmp_path):
    names = []
    for step, seed in ((20, 0), (100, 1)):
        loaded = LoadedModel("x", *embedded_model(data_folder() / "parts", seed=seed))
        for part in (loaded.model, loaded.processor):
            part.save_pretrained(tmp_path / f"checkpoint-{step}")
        names.append(loaded)
    (tmp_path / "checkpoint-300").mkdir()  # written in this moment: nothing in it yet
    pictures, captions = PICTURES[:3], ["red circle", "blue square", "green cross"]
    found = run_checkpoints(tmp_path)
    assert list(found) == [20, 100]
    curve = tacs_curve(found, pictures, captions)
    for step, loaded in zip(found, names):
        part = curve[(curve.step == step) & (curve.captions == "own")]
        expected = tacs_table(loaded, pictures, captions)["TACS"].mean()
        assert part.value.tolist() == [pytest.approx(expected, abs=1e-5)]
    with pytest.raises(InputError, match="no checkpoints"):
        run_checkpoints(tmp_path / "checkpoint-20")


@pytest.mark.parametrize(
    "call",
    [
        lambda: nearest_distances(torch.ones(2, 3), torch.ones(2, 4)),
        lambda: nearest_distances(torch.full((2, 3), torch.nan), torch.ones(2, 3)),
        lambda: distance_between(torch.ones(1, 3)),
        lambda: tacs(torch.ones(2, 3), torch.ones(2, 3), 0),
        lambda: tacs(torch.ones(2, 3), torch.ones(0, 3)),
        lambda: tacs_table(loaded_tiny("llava"), PICTURES[:2], ["a dog"]),
        lambda: tacs_table(loaded_tiny("llava"), PICTURES[:1], [""]),
        lambda: two_coordinates(torch.randn(9, 4), "umap"),
        lambda: two_coordinates(torch.randn(3, 4)),
        lambda: two_coordinates(torch.ones(9, 4)),
    ],
)
def test_vectors_that_cannot_be_measured_are_refused(call):
    with pytest.raises(InputError):
        call()


# maps


def test_the_first_directions_of_the_map_are_those_of_a_plain_pca():
    from sklearn.decomposition import PCA

    vectors = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7)
    found = two_coordinates(vectors)
    expected = PCA(2).fit_transform(vectors.double().numpy())
    assert np.abs(np.abs(found) - np.abs(expected)).max() < 1e-6


def test_a_map_has_every_token_and_word_at_a_place():
    loaded = loaded_tiny("llava_next")
    table = map_table([loaded, loaded_tiny("llava")], PICTURES[:2], WORDS, most=20)
    counts = table.groupby(["model", "group"]).size().to_dict()
    assert set(counts.values()) == {20, len(WORDS)}
    assert set(table.text[table.group == "word"]) == set(WORDS.words) >= set(table.text)
    figure = map_figure(table)
    assert [trace.mode for trace in figure.data] == ["markers", "text"] * 2
    by_dots = map_figure(table, written=3)
    assert [trace.mode for trace in by_dots.data] == ["markers"] * 4
    tsne = map_table(loaded, PICTURES[:1], WORDS, "tsne", most=20)
    assert np.isfinite(tsne[["x", "y"]].to_numpy()).all() and set(tsne.by) == {"tsne"}


# language retention

TEXTS = ["two red towers", "what is above the circle", "left", "a red house is left of the blue circle " * 3]


def plain_losses(loaded: LoadedModel, text: str) -> tuple[float, int]:
    "The negative log-likelihood of a text in nats and its predicted tokens, one text by itself."
    ids = loaded.processor.tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([ids])).logits[0].double()
    chosen = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    return -float(chosen.sum()), len(ids) - 1


@pytest.mark.parametrize("family", ONES)
def test_perplexity_counts_every_token_once(family):
    loaded = loaded_tiny(family, wrapped=family == "llava")
    expected = [plain_losses(loaded, text) for text in TEXTS]
    for batch_size in (1, 3, 8):
        losses = text_losses(loaded, TEXTS, batch_size)
        assert losses.tokens.tolist() == [count for _, count in expected]
        assert np.abs(losses.nats - [nats for nats, _ in expected]).max() < 1e-3
    total = np.exp(sum(nats for nats, _ in expected) / sum(count for _, count in expected))
    table = retention_table(loaded, TEXTS)
    assert table.perplexity[0] == pytest.approx(total, rel=1e-4) and table.low[0] < total < table.high[0]


def test_a_long_text_in_pieces_loses_no_token():
    loaded = loaded_tiny("llava")
    whole = text_losses(loaded, TEXTS)
    pieces = text_losses(loaded, TEXTS, length=5)
    assert pieces.tokens.tolist() == whole.tokens.tolist()
    ids = loaded.processor.tokenizer(TEXTS[3])["input_ids"]
    nats = 0.0
    for start in range(0, len(ids) - 1, 4):
        part = torch.tensor([ids[start : start + 5]])
        with torch.no_grad():
            loss = loaded.model(input_ids=part, labels=part).loss
        nats += float(loss) * (part.shape[1] - 1)
    assert pieces.nats[3] == pytest.approx(nats, rel=1e-4)


def test_a_bos_token_is_given_and_an_end_token_left_out():
    from tokenizers.processors import TemplateProcessing

    loaded = loaded_tiny("llava")
    tokenizer = loaded.processor.tokenizer
    bare = tokenizer(TEXTS[0])["input_ids"]
    pair = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    post = TemplateProcessing(single="<s> $A </s>", special_tokens=pair)
    tokenizer.backend_tokenizer.post_processor = post
    losses = text_losses(loaded, [TEXTS[0], ""])
    with torch.no_grad():
        ids = [tokenizer.bos_token_id, *bare]
        logits = loaded.model(input_ids=torch.tensor([ids])).logits[0].double()
    nats = -float(logits.log_softmax(-1)[torch.arange(len(bare)), bare].sum())
    assert losses.tokens.tolist() == [len(bare), 0] and losses.nats[0] == pytest.approx(nats, rel=1e-4)


def test_the_ratio_is_paired_over_texts():
    first, second = loaded_tiny("llava", 0), loaded_tiny("llava", 1)
    table = retention_table([first, second], TEXTS)
    pairs = [(plain_losses(first, text), plain_losses(second, text)) for text in TEXTS]
    counts = np.array([one[1] for one, _ in pairs])
    difference = np.array([two[0] - one[0] for one, two in pairs])
    mean = difference.sum() / counts.sum()
    residuals = difference - mean * counts
    error = np.sqrt(4 / 3 * (residuals**2).sum()) / counts.sum()
    assert table.times[1] == pytest.approx(np.exp(mean), rel=1e-3) and np.isnan(table.times[0])
    assert table.times_high[1] == pytest.approx(np.exp(mean + 3.1824 * error), rel=1e-3)
    assert len(retention_figure(table).data) == 2
    other = LoadedModel("other tokens", *embedded_model(data_folder() / "parts"))
    mixed = retention_table([first, other], ["red circle left", "blue square above"])
    assert np.isnan(mixed.times[1]) and mixed.perplexity.notna().all()


def test_texts_come_from_lists_and_files(tmp_path):
    (tmp_path / "texts.txt").write_text("one text\n\nanother one\none text\n", encoding="utf-8")
    assert plain_texts(tmp_path / "texts.txt") == ["one text", "another one"]
    assert plain_texts(["b", " a ", "b"], most=1) == ["b"]
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    for source in (tmp_path / "bad.txt", tmp_path / "none.txt", []):
        with pytest.raises(InputError):
            plain_texts(source)


def test_texts_without_a_prediction_are_refused():
    loaded = loaded_tiny("llava")
    with pytest.raises(InputError, match="0 predicted tokens"):
        text_losses(loaded, ["a"])
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(InputError, match="finite"):
        text_losses(loaded, TEXTS)
