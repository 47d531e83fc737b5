"""SEA: the choice of pairs and the loss against independent references, alone and in two processes."""

import os
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from browser import free_port

from aligned_mllm import AlignConfig, AlignTrainer, Sea
from aligned_mllm.core import InputError, data_folder, load_json, save_json
from aligned_mllm.objectives.contrastive import (
    chosen_pairs,
    drawn_words,
    one_of_each,
    symmetric_loss,
    windows_of,
)

from aligned_mllm.teachers.words import WordList, word_file
from aligned_mllm.train import main as train
from aligned_mllm.training.claim import claim_folder
from aligned_mllm.training.config import configured
from aligned_mllm.training.dry_run import dry_run
from aligned_mllm.training.prepare import prepare
from aligned_mllm.training.run import run, trainer_of
from aligned_mllm.worlds.known_objects import KnownObjects
from aligned_mllm.worlds.small_models import embedded_model

FEW = {"max_steps": 2, "logging_steps": 1, "save_steps": 2, "use_cpu": True, "disable_tqdm": True}


def reference(tokens: np.ndarray, embeddings: np.ndarray, temperature: float) -> float:
    "Eq. 11 times N, pair by pair, in float64."
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (tokens, embeddings)]
    total = 0.0
    for i in range(len(tokens)):
        by_token = [np.exp(unit[0][i] @ unit[1][j] / temperature) for j in range(len(tokens))]
        by_word = [np.exp(unit[1][i] @ unit[0][j] / temperature) for j in range(len(tokens))]
        total -= (np.log(by_token[i] / sum(by_token)) + np.log(by_word[i] / sum(by_word))) / 2
    return total


def pairs(count: int, width: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator), torch.randn(count, width, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_loss_and_gradients_agree_with_the_definition(temperature):
    tokens, embeddings = pairs(7)
    tokens.requires_grad_()
    log_scale = torch.tensor(-np.log(temperature), dtype=torch.float32, requires_grad=True)
    total = symmetric_loss(tokens, embeddings, torch.arange(7), log_scale)
    total.backward()
    exact = tokens.detach().double().numpy()
    words = embeddings.double().numpy()
    assert total.item() == pytest.approx(reference(exact, words, temperature), rel=1e-5)
    step = 1e-5
    for row, column in ((0, 0), (3, 4), (6, 5)):
        moved = [exact.copy() for _ in range(2)]
        moved[0][row, column] += step
        moved[1][row, column] -= step
        slope = (reference(moved[0], words, temperature) - reference(moved[1], words, temperature)) / (
            2 * step
        )
        assert tokens.grad[row, column].item() == pytest.approx(slope, abs=1e-4)
    higher = reference(exact, words, temperature * np.exp(-step))
    lower = reference(exact, words, temperature * np.exp(step))
    assert log_scale.grad.item() == pytest.approx((higher - lower) / (2 * step), abs=1e-3)


def test_no_pairs_are_an_exact_zero_with_finite_gradients():
    tokens = torch.zeros(0, 4, requires_grad=True)
    log_scale = torch.zeros((), requires_grad=True)
    total = symmetric_loss(tokens, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), log_scale)
    total.backward()
    assert total.item() == 0 and log_scale.grad == 0


SHARES = ([0, 1, 2, 3], [4, 5, 6])  # which pairs a process has


def share(rank: int, port: int, counts: list, found: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    PartialState(cpu=True)
    tokens, embeddings = pairs(7)
    own = counts[rank]
    tokens = tokens[own].requires_grad_()
    log_scale = torch.tensor(1.0, requires_grad=True)
    total = symmetric_loss(tokens, embeddings[own], torch.tensor(own, dtype=torch.long), log_scale, True)
    total.backward()
    slope = log_scale.grad.clone()
    both = total.detach().clone()
    dist.all_reduce(slope)
    dist.all_reduce(both)
    facts = {"total": both.item(), "slope": slope.item(), "gradient": tokens.grad.tolist()}
    save_json(facts, f"{found}{rank}.json")
    dist.destroy_process_group()


@pytest.mark.parametrize("counts", [SHARES, ([0, 1, 2, 3, 4, 5, 6], [])])
def test_two_processes_have_the_loss_and_gradients_of_one(counts, tmp_path):
    tokens, embeddings = pairs(7)
    tokens.requires_grad_()
    log_scale = torch.tensor(1.0, requires_grad=True)
    total = symmetric_loss(tokens, embeddings, torch.arange(7), log_scale)
    total.backward()
    settings = (free_port(), list(counts), str(tmp_path / "found"))
    torch.multiprocessing.start_processes(share, settings, nprocs=2, start_method="forkserver")
    found = [load_json(tmp_path / f"found{rank}.json") for rank in (0, 1)]
    assert found[0]["total"] == pytest.approx(total.item(), rel=1e-5)
    assert found[0]["slope"] == pytest.approx(log_scale.grad.item(), rel=1e-4)
    gradient = torch.tensor([row for each in found for row in each["gradient"]])
    assert torch.allclose(gradient, tokens.grad, atol=1e-6)


def test_a_word_of_two_processes_is_nobodys_negative():
    "Rows 0 and 2 have one word: row 1 is the only negative of both."
    tokens, embeddings = pairs(3)
    words = torch.tensor([4, 5, 4])
    total = symmetric_loss(tokens, embeddings, words, torch.zeros(()))
    unit = [vectors / vectors.norm(dim=1, keepdim=True) for vectors in (tokens, embeddings)]
    cosines = unit[0] @ unit[1].T
    expected = 0.0
    for i, others in ((0, [1]), (1, [0, 2]), (2, [1])):
        for scores in (cosines, cosines.T):
            kept = scores[i, [i, *others]]
            expected += (kept.logsumexp(0) - scores[i, i]) / 2
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_words_are_drawn_in_proportion_to_their_scores():
    words = torch.tensor([[0, 1, 2]]).repeat(30000, 1)
    scores = torch.tensor([[0.6, 0.3, 0.1]]).repeat(30000, 1)
    drawn = drawn_words(words, scores, torch.Generator().manual_seed(1))
    shares = torch.bincount(drawn) / len(drawn)
    assert torch.allclose(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.01)


@pytest.mark.parametrize(
    "grids, size", [([[4, 4]], 2), ([[27, 27]], 2), ([[3, 5], [1, 1], [2, 2]], 3), ([[3, 3]], 1)]
)
def test_each_window_gives_one_patch_by_chance(grids, size):
    grids = torch.tensor(grids)
    windows = windows_of(grids, size)
    assert len(windows) == grids.prod(1).sum()
    assert windows.max() + 1 == sum(
        -(-rows // size) * -(-columns // size) for rows, columns in grids.tolist()
    )
    eligible = torch.ones(len(windows), dtype=torch.bool)
    counts = torch.zeros(len(windows))
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        chosen = one_of_each(windows, eligible, generator)
        assert torch.bincount(windows[chosen]).eq(1).all()
        counts += chosen
    expected = 400 / torch.bincount(windows)[windows]
    assert ((counts - expected).abs() < 5 * (expected + 1).sqrt()).all()


def test_pairs_have_different_words_and_only_patches_that_count():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-1, 6, (50, 3), generator=generator)
    scores = torch.rand(50, 3, generator=generator) * (words >= 0)
    keep = torch.rand(50, generator=generator) < 0.7
    places, found = chosen_pairs(words, scores, torch.tensor([[5, 10]]), keep, 2, generator=generator)
    assert len(places) == len(found) == len(set(found.tolist())) > 2
    assert keep[places].all() and all(word in words[place] for place, word in zip(places, found))
    none = chosen_pairs(words, 0 * scores, torch.tensor([[5, 10]]), keep, 2, generator=generator)
    assert len(none[0]) == len(none[1]) == 0


def test_sea_in_eight_lines(small_data, tmp_path):
    "A model, the records, labels by a model with random weights: which is frozen, checked and recorded."
    model, processor = embedded_model(data_folder() / "parts")
    args = AlignConfig(str(tmp_path / "run"), stage=1, report_to="none", **FEW)
    objectives = [Sea(labels="random", most_unlabelled=1.0, label_cache=str(tmp_path / "labels"))]
    trainer = AlignTrainer(model, args, small_data / "captions.jsonl", objectives, processing_class=processor)
    before = model.model.multi_modal_projector.linear_1.weight.clone()
    trainer.train()
    record = load_json(tmp_path / "run" / "teachers.json")["sea"]
    assert record["before"] == record["after"] and "random" in record["name"]
    words = word_file(tmp_path / "run" / "words.txt")
    assert record["targets"]["word_list"] == words.digest and record["targets"]["scorer"] == "surgery"
    assert "loss_sea" in (tmp_path / "run" / "curves.csv").read_text(encoding="utf-8")
    assert not before.equal(model.model.multi_modal_projector.linear_1.weight)
    assert list((tmp_path / "labels").iterdir())


EXACT = {"sea.labels": "exact", "sea.most_unlabelled": 1.0}


def tokens_and_words(small_data, output, **more) -> tuple[list[str], torch.Tensor]:
    "The words of the pairs of a first batch, and the places of their visual tokens."
    settings = {**FEW, **EXACT, "per_device_train_batch_size": 8, "sea.one_a_word": False, **more}
    trainer = trainer_of(configured("scenes_stage1", small_data, output, settings))
    batch = next(iter(trainer.get_train_dataloader()))
    objective = trainer.model.objectives["sea"]
    (target,) = objective.targets([batch])
    (again,) = objective.targets([batch])
    assert again["words"].equal(target["words"]) and again["places"].equal(target["places"])
    return [objective.labeller.words.words[word] for word in target["words"]], target["places"]


def test_controls_keep_what_they_should(small_data, tmp_path):
    words, places = tokens_and_words(small_data, tmp_path / "own")
    shuffled, same = tokens_and_words(small_data, tmp_path / "two", **{"sea.target": "shuffled"})
    assert sorted(shuffled) == sorted(words) and shuffled != words and same.equal(places)
    other, places_of_other = tokens_and_words(small_data, tmp_path / "three", **{"sea.target": "other_image"})
    assert not places_of_other.equal(places)


def test_without_a_text_loss_the_language_model_does_not_run(small_data, tmp_path):
    calls = []
    config = configured("scenes_stage1", small_data, tmp_path / "run", {**FEW, **EXACT, "text.weight": 0.0})
    trainer = trainer_of(config)
    decoder = trainer.model.student.get_decoder()
    decoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert not calls
    curves = (tmp_path / "run" / "curves.csv").read_text(encoding="utf-8")
    assert "loss_sea" in curves
    record = load_json(tmp_path / "run" / "teachers.json")["sea"]["targets"]
    assert record["scorer"] == "exact" and record["model"] == KnownObjects(small_data).digest


def test_a_run_with_other_words_is_another_run(small_data, tmp_path):
    "The word file has changed since the run was stopped."
    settings = {**FEW, "sea.labels": "random", "sea.most_unlabelled": 1.0}
    settings["sea.words"] = str(tmp_path / "words.txt")
    config = configured("scenes_stage1", small_data, tmp_path / "run", settings)
    WordList(("circle", "square", "red")).save(tmp_path / "words.txt")
    claim_folder(config, "scenes_stage1", trainer_of(config))
    save_json({"step": 1}, tmp_path / "run" / "progress.json")
    claim_folder(config, "scenes_stage1", trainer_of(config))
    WordList(("circle", "square", "blue")).save(tmp_path / "words.txt")
    with pytest.raises(InputError, match="sea.word_list was .* and is"):
        claim_folder(config, "scenes_stage1", trainer_of(config))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sea.labels": ""}, "without labels"),
        ({"sea.labels": "./nowhere"}, "no CLIP or SigLIP"),
        ({"sea.temperature": 0.0}, "sea.temperature 0.0. Expected: a number from 0.001"),
        ({"sea.top": 0}, "sea.top 0. Expected: a number from 1"),
        ({"sea.window": 0}, "sea.window 0. Expected: a number from 1"),
        ({"sea.weight": -1.0}, "sea.weight -1.0. Expected: a weight of at least 0"),
        ({"sea.scorer": "value_path", "sea.template": "word"}, "sea.scorer, sea.template beside exact"),
        ({"sea.most_unlabelled": 0.1}, "raise sea.most_unlabelled"),
        ({"sea.labels": "scenes_clip"}, "sea.template=word"),
        ({"sea.words": "nowhere.txt"}, "cannot be read"),
        ({"sea.target": "wrong"}, "sea.target"),
        ({"sea.vectors": "context", "sea.vectors_layer": 99}, "layers"),
        ({"sea.labels": "random", "sea.most_unlabelled": 0.5, "sea.threshold": 0.99}, "have no label"),
    ],
)
def test_bad_settings_are_one_message_before_the_first_step(settings, message, small_data, tmp_path):
    with pytest.raises(InputError, match=message):
        run("scenes_stage1", small_data, tmp_path / "run", {**FEW, **EXACT, **settings})


def test_words_that_the_language_model_does_not_know(small_data, tmp_path):
    WordList(("circle", "zeppelin")).save(tmp_path / "words.txt")
    settings = {**FEW, "sea.labels": "random", "sea.words": str(tmp_path / "words.txt")}
    with pytest.raises(InputError, match="zeppelin"):
        run("scenes_stage1", small_data, tmp_path / "run", settings)


def test_one_word_is_no_contrast(small_data, tmp_path):
    WordList(("circle",)).save(tmp_path / "words.txt")
    settings = {**FEW, "sea.labels": "random", "sea.words": str(tmp_path / "words.txt")}
    with pytest.raises(InputError, match="'circle'. Expected: at least two"):
        run("scenes_stage1", small_data, tmp_path / "run", settings)


def test_exact_labels_may_have_a_longer_list(small_data, tmp_path):
    known = tuple(KnownObjects(small_data).words)
    WordList((*known, "left")).save(tmp_path / "words.txt")
    settings = {**FEW, **EXACT, "sea.words": str(tmp_path / "words.txt")}
    trainer = trainer_of(configured("scenes_stage1", small_data, tmp_path / "run", settings))
    assert trainer.model.objectives["sea"].labeller.words.words == (*known, "left")


def test_text_features_can_be_kept_in_a_folder(small_data, tmp_path):
    settings = {**FEW, "sea.labels": "random", "sea.most_unlabelled": 1.0}
    settings["sea.word_features"] = str(tmp_path / "features")
    trainer = trainer_of(configured("scenes_stage1", small_data, tmp_path / "run", settings))
    features = trainer.model.objectives["sea"].labeller.labeller.features
    kept = np.load(tmp_path / "features" / "features.npy")
    assert features.dtype == torch.float16 and kept.shape == tuple(features.shape)


def test_temperature_pairs_and_share_are_in_the_curves(small_data, tmp_path):
    settings = {**FEW, **EXACT, "max_steps": 3, "save_steps": 3}  # the first step warms up
    folder = run("scenes_stage1", small_data, tmp_path / "run", settings)
    curves = pd.read_csv(folder / "curves.csv").pivot(index="step", columns="name", values="value")
    assert len(curves["sea.temperature"].dropna().unique()) == 2  # it is learnt
    assert (curves["sea.pairs"].dropna() > 1).all()
    assert curves["sea.unlabelled"].dropna().between(0.5, 1).all()


def test_a_dry_run_checks_the_layer_and_shows_the_choices(small_data, tmp_path):
    settings = {**EXACT, "sea.labels": "random", "sea.negatives": "all"}
    config = configured("scenes_stage1", small_data, "", {**settings, "use_cpu": True})
    shown = dry_run("scenes_stage1", config)["Objective sea"]
    assert shown["labels"] == "random by surgery" and shown["words"] == "of the training answers"
    assert shown["template"] == "photo: a photo of a {}." and shown["negatives"] == "of all processes"
    deep = {**settings, "sea.vectors": "context", "sea.vectors_layer": 99, "use_cpu": True}
    with pytest.raises(InputError, match="99"):
        dry_run("scenes_stage1", configured("scenes_stage1", small_data, "", deep))


def test_the_command_names_what_is_missing(small_data, tmp_path, capsys):
    words = ["--recipe", "scenes_stage1", "--data", str(small_data), "--prepare", "--set", "use_cpu=true"]
    assert train([*words, "--set", "sea.labels=exact"]) == 2
    assert "without a folder for them" in capsys.readouterr().err
    assert train([*words, "--objective", "sea", "--teacher", "openai/clip-vit-base-patch32"]) == 2
    assert "--set sea.labels=openai/clip-vit-base-patch32" in capsys.readouterr().err


def test_labels_are_made_ahead_by_the_command(small_data, tmp_path, capsys):
    words = ["--recipe", "scenes_stage1", "--data", str(small_data), "--prepare", "--set", "use_cpu=true"]
    for setting in ("sea.labels=exact", "sea.most_unlabelled=1.0", f"sea.label_cache={tmp_path / 'labels'}"):
        words += ["--set", setting]
    assert train(words) == 0 and train(words) == 0
    first, again = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sea:")]
    assert "'labelled': 0" in again and "'labelled': 0" not in first
    trainer = trainer_of(
        configured(
            "scenes_stage1",
            small_data,
            tmp_path / "run",
            {**FEW, **EXACT, "sea.label_cache": str(tmp_path / "labels")},
        )
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.model.objectives["sea"].targets([batch])[0].count > 1
    assert trainer.model.objectives["sea"].labeller.labelled == 0
    assert pickle.loads(pickle.dumps(trainer.train_dataset)).needed == {}  # memory is not shared


def test_views_with_labels_need_no_pixels(small_data, tmp_path):
    "After prepare, the labeller's pixels are not made; without the cache they are."
    settings = {**FEW, "sea.labels": "random", "sea.most_unlabelled": 1.0}
    prepare("scenes_stage1", small_data, {**settings, "sea.label_cache": str(tmp_path / "labels")})
    found = {}
    for folder in ("labels", "none"):
        settings["sea.label_cache"] = str(tmp_path / folder)
        trainer = trainer_of(configured("scenes_stage1", small_data, tmp_path / "run", settings))
        batch = next(iter(trainer.get_train_dataloader()))
        found[folder] = batch["view_pixels"]["sea"]
        assert trainer.model.objectives["sea"].targets([batch])[0].count > 1
        assert (trainer.model.objectives["sea"].labeller.labelled == 0) == (folder == "labels")
    assert set(found["labels"]) == {None} and all(pixels is not None for pixels in found["none"])
