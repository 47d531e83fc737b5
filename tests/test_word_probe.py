"""Nearest words of visual tokens, modality gap and language retention: against plain computations in NumPy, on
tiny models of several families, with LoRA too; and their refusals."""

import numpy as np
import pandas as pd
import pytest
import torch
from family_checks import SIZES, photo
from tiny_models import tiny

from aligned_mllm.analysis.checkpoints import LoadedModel
from aligned_mllm.analysis.features import ROW, picture_batch
from aligned_mllm.analysis.probe_figures import probe_figure, written_words
from aligned_mllm.analysis.right_words import labelled_patches, right_words
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
        (WordList(["dog"]), {"templates": ("{}",)}, "cannot encode"),
        (known, {}, "does not know"),
        (known, {"templates": ("scene",)}, "template"),
        (known, {"templates": "{}"}, "list of texts"),
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
    table = probe_table(loaded, images, labeller.words, templates=("{}",), top=2)
    best = table[table["rank"] == 1].word.tolist()
    pairs = [(row[0], set(words), word) for row, words, word in zip(tokens.rows.tolist(), own, best) if words]
    shares = [np.mean([word in words for at, words, word in pairs if at == i]) for i in {at for at, *_ in pairs}]
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
    table = probe_table(loaded, images[:4], labeller.words, templates=("{}",))
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
