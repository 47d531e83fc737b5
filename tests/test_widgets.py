"""Widgets: their results against references; their refusals; and, in a real browser, the changes
of the page after questions, clicks and moved sliders."""

import json
import shutil
import statistics
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from browser import ARTEFACTS, COMMANDS, ROOT, chromium, free_port, keep, served
from PIL import Image
from tiny_models import FAMILIES, tiny

from aligned_mllm.apps import serve as apps
from aligned_mllm.analysis.checkpoints import LoadedModel
from aligned_mllm.core import InputError, save_json
from aligned_mllm.data.collate import model_inputs
from aligned_mllm.data.records import Records
from aligned_mllm.reporting.score import score
from aligned_mllm.worlds.scene_data import Sizes, write_scenes
from aligned_mllm.worlds.small_models import embedded_model
from aligned_mllm.analysis.lens import logit_lens, readable_tokens
from aligned_mllm.apps.answers import (
    PatchWords,
    SelectedAttention,
    Token,
    ask,
    token_attention,
    unknown_words,
)
from aligned_mllm.apps.ask import Ask
from aligned_mllm.apps.compare import ALL_TYPES, Compare, both_answers, differing_answers
from aligned_mllm.apps.drawing import overlay_figure, patch_frame, patch_html
from aligned_mllm.apps.panels import Pair, Panel, Work, checkpoint_choice
from aligned_mllm.analysis.word_probe import probe_table
from aligned_mllm.apps.word_panel import WordPanel, pictures_beside, records_beside, words_beside
from aligned_mllm.apps.session import (
    EMBEDDED,
    KnownQuestion,
    Picture,
    Session,
    data_folder_of,
    drawn_scene,
    initial_runs,
    record_picture,
    uploaded_picture,
)

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, parts) -> Path:
    "Two scored runs of untrained models, and the data they were scored on."
    root = tmp_path_factory.mktemp("widgets") / "runs"
    data = write_scenes(root / "data", 0, Sizes(train=2, captions=2, validation=2, test=4))
    records = Records(data / "test.jsonl")
    for seed, name in enumerate(("toy/first", "toy/second")):
        model, processor = embedded_model(parts, seed=seed)
        model.save_pretrained(root / name / "model")
        processor.save_pretrained(root / name / "model")
        for file, content in (
            ("done", {}),
            ("config", {"data": "runs/data", "with_images": True}),
            ("scores", {"records": "test.jsonl"}),
        ):
            save_json(content, root / name / f"{file}.json")
        rows = []
        for index, record in enumerate(records):
            turn = record.turns[-1]
            wrong = seed and index % 3 == 0
            rows.append(
                {
                    "id": record.id,
                    "category": turn.category,
                    "question": turn.question,
                    "expected": turn.answer,
                    "answer": "nonsense" if wrong else turn.answer,
                    "correct": not wrong,
                }
            )
        pd.DataFrame(rows).to_json(root / name / "answers.jsonl", orient="records", lines=True)
        curve = [(step, "loss", 2 / (1 + seed + step)) for step in range(5)]
        pd.DataFrame(curve, columns=["step", "name", "value"]).to_csv(root / name / "curves.csv", index=False)
    return root


@pytest.fixture(scope="module")
def scores(runs) -> Path:
    "Both runs scored on four questions in POPE's form; then the first one's answers are made right."
    rows = []
    for record in Records(runs / "data" / "test.jsonl"):
        turn = record.turns[0]
        if turn.category == "existence":
            text = turn.question.removeprefix("<image>").strip()
            row = {"question_id": len(rows), "image": record.images[0], "text": text, "label": turn.answer}
            rows.append(row)
    (runs / "data" / "coco_pope_random.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    models = [runs / "toy" / name for name in ("first", "second")]
    folder = score(models, ["pope"], runs / "data", runs / "scores", max_new_tokens=4, draws=20).parent
    for name, right in (("first", True), ("second", False)):
        wrong = {"yes": "no", "no": "yes"}
        lines = []
        for number, row in enumerate(rows):
            answer = row["label"] if right or number else wrong[row["label"]]
            lines.append(json.dumps({"id": f"random-{number}", "answer": answer}) + "\n")
        (folder / name / "pope" / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def session(runs) -> Session:
    return Session(runs)


@pytest.fixture(scope="module")
def answer(session):
    return ask(session.checkpoint("toy/first"), drawn_scene(3), "count red circle", max_new_tokens=4)


# results


def test_probabilities_are_those_of_a_plain_pass(session, answer):
    model = session.checkpoint("toy/first").model
    with torch.no_grad():
        logits = model(**model_inputs(answer.batch), use_cache=False).logits[0].float()
    for place, token in enumerate(answer.tokens):
        expected = logits[answer.prompt + place - 1].softmax(-1)
        assert token.id == int(expected.argmax()) and token.probability == pytest.approx(
            float(expected.max()), abs=1e-4
        )
    assert answer.batch["input_ids"][0, answer.prompt :].tolist() == [token.id for token in answer.tokens]


def test_token_attention_is_eagers_row_of_the_position_before_it(session, answer):
    loaded = session.checkpoint("toy/first")
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = loaded.model(
            **model_inputs(answer.batch), output_attentions=True, use_cache=False
        ).attentions
    loaded.model.set_attn_implementation("sdpa")
    for index in (0, 2):
        expected = torch.stack(
            [
                layer[0, :, answer.prompt + index - 1][:, answer.batch["visual_mask"][0]]
                for layer in attentions
            ]
        )
        weights = token_attention(loaded, answer, index)
        assert torch.allclose(weights, expected, atol=1e-4)
    selected = SelectedAttention(answer.tokens[2], weights, layer=2, head=3)
    assert np.allclose(selected.percent(answer.views[0]), 100 * expected[1, 2].reshape(5, 5), atol=0.01)
    assert np.allclose(
        SelectedAttention(answer.tokens[2], weights, layer=2).percent(answer.views[0]),
        100 * expected[1].mean(0).reshape(5, 5),
        atol=0.01,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_and_shows_its_attention(family):
    loaded = LoadedModel(family, *tiny(family))
    picture = Picture(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8)), "noise"
    )
    heard = []
    answer = ask(loaded, picture, "what is here ?", heard.append, max_new_tokens=2)
    visual = int(answer.batch["visual_mask"].sum())
    weights = token_attention(loaded, answer, len(heard) - 1)
    assert tuple(heard) == answer.tokens and weights.shape[-1] == visual == sum(
        rows * columns for _, rows, columns, _ in answer.views
    )
    figure = overlay_figure(picture.image, answer.views[-1], SelectedAttention(heard[-1], weights))
    assert np.shape(figure.data[0].z) == answer.views[-1][1:3]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_lens_does_not_show_is_the_rest_of_its_distribution(family):
    loaded = LoadedModel(family, *tiny(family))
    batch = loaded.batch(
        [Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8))],
        "what is here ?",
    )
    tokenizer = loaded.processor.tokenizer
    words = int(readable_tokens(tokenizer, loaded.model.get_output_embeddings().weight.shape[0]).sum())
    lens = logit_lens(loaded, batch, layers=[0, 1], top=words)  # every word that can be shown
    expected = 1 - lens.groupby(["layer", "patch"]).probability.sum().to_numpy().reshape(2, -1)
    found = PatchWords.of(loaded, SimpleNamespace(batch=batch)).unreadable
    assert np.allclose(found[:2].numpy(), expected, atol=1e-3) and 0 < found.mean() < 1


def test_the_share_of_special_tokens_is_shown():
    words = pd.DataFrame([(0, 1, "red", 0.5)], columns=["patch", "rank", "token", "cosine"])
    lens = pd.DataFrame(
        [(0, 0, 1, "red", 0.0125)], columns=["layer", "patch", "rank", "token", "probability"]
    )
    page = patch_html(PatchWords(words, lens, torch.tensor([[0.98]])), 0, [(0, 1, 1, ())])
    assert (
        "not shown: special tokens" in page
        and page.count("98%") == 1
        and page.index("98%") > page.index("red 1%")
    )


def test_unknown_words_are_named(session):
    tokenizer = session.checkpoint("toy/first").processor.tokenizer
    asked = "what weather in Paris , red circle , Paris"
    expected = [
        word
        for word in dict.fromkeys(asked.split())
        if tokenizer.convert_tokens_to_ids(word) == tokenizer.unk_token_id
    ]
    assert {"weather", "Paris"} <= set(expected) and not {"red", "circle"} & set(expected)
    assert unknown_words(tokenizer, asked) == expected and unknown_words(tokenizer, "count red circle") == []
    assert unknown_words(SimpleNamespace(unk_token_id=None), asked) == []
    pair = Pair(session, Work(lambda: []))
    pair.ask(["toy/first", EMBEDDED], drawn_scene(1), "where weather circle")
    assert all("unknown to this model: weather<" in panel.unknown.value for panel in pair.panels)
    pair.ask(["toy/first"], drawn_scene(1), "where red circle")
    assert pair.panels[0].unknown.value == ""


def test_the_first_choice_is_a_plain_and_an_aligned_run(tmp_path):
    kinds = ("blind", "other_image", "plain", "stage1", "viral")
    runs = [f"scenes_quick/seed{seed}/{kind}" for seed in range(2) for kind in kinds]

    def session(place: str, names: list[str], aligned: str = "viral") -> Session:
        for name in names:
            save_json({}, tmp_path / place / name / "model" / "config.json")
            save_json({}, tmp_path / place / name / "done.json")
            layers = {"teacher": "dense", "layers": [3]} if name.endswith(aligned) else {"layers": []}
            save_json({"alignment": layers}, tmp_path / place / name / "objectives.json")
        return Session(tmp_path / place)

    both = session("all", runs)
    assert initial_runs(both) == ["scenes_quick/seed0/plain", "scenes_quick/seed0/viral"]
    assert [checkpoint_choice(both, "run", place=place).value for place in (0, 1)] == initial_runs(both)
    assert initial_runs(session("renamed", runs, "stage1"))[1] == "scenes_quick/seed0/stage1"
    fewer = session("fewer", [name for name in runs if name != runs[4]])
    assert initial_runs(fewer) == ["scenes_quick/seed0/plain", "scenes_quick/seed1/viral"]
    assert initial_runs(session("unaligned", ["blind", "one", "two"])) == ["one", "two"]
    assert initial_runs(session("blind", ["blind", "viral"])) == ["viral", EMBEDDED]  # blind ones last


def test_a_patch_is_drawn_where_its_view_lies():
    view = (4, 2, 3, (0.25, 0.5, 1.0, 1.0))  # four tokens before it, 2 x 3 patches at the lower right
    (frame,) = patch_frame(Image.new("RGB", (80, 40)), view, 4 + 5)
    assert [frame[name] for name in ("x0", "x1", "y0", "y1")] == [60, 80, 30, 40]
    assert (
        patch_frame(Image.new("RGB", (80, 40)), view, 3)
        == []
        == patch_frame(Image.new("RGB", (80, 40)), view, 10)
    )


def test_differing_answers_are_counted_as_by_hand(session, runs):
    answers = both_answers(session, ["toy/first", "toy/second"])
    lines = [
        [json.loads(line) for line in (runs / name / "answers.jsonl").read_text().splitlines()]
        for name in ("toy/first", "toy/second")
    ]
    for category in (ALL_TYPES, "count", "where"):
        table, said = differing_answers(answers, category)
        expected = [
            index
            for index, (one, two) in enumerate(zip(*lines))
            if one["answer"] != two["answer"] and category in (ALL_TYPES, one["category"])
        ]
        assert (
            table.record.tolist() == expected
            and said.startswith(f"{len(expected)} of ")
            and f"first is right in {len(expected)}" in said
        )


def test_answers_to_other_questions_are_refused(runs, tmp_path):
    copy = shutil.copytree(runs, tmp_path / "runs")
    lines = (copy / "toy" / "second" / "answers.jsonl").read_text().splitlines()
    (copy / "toy" / "second" / "answers.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError, match="different questions"):
        both_answers(Session(copy), ["toy/first", "toy/second"])


# refusals


def test_nothing_outside_the_folder_of_runs(runs, tmp_path):
    copy = shutil.copytree(runs, tmp_path / "runs")
    outside = shutil.copytree(runs / "toy" / "first", tmp_path / "outside" / "run")
    (copy / "linked").symlink_to(outside)
    for name, records in (
        ("first", "../../outside/secret.jsonl"),
        ("second", str(runs / "data" / "test.jsonl")),
    ):
        save_json({"data": "runs/data"}, copy / "toy" / name / "config.json")
        save_json({"records": records}, copy / "toy" / name / "scores.json")
    session = Session(copy)
    assert session.names == ["toy/first", "toy/second", EMBEDDED]
    for name in ("../outside/run", str(outside), "linked", EMBEDDED):
        with pytest.raises(InputError, match="not a run in"):
            session.records(name)
    for name in ("toy/first", "toy/second"):
        with pytest.raises(InputError, match="leads out of"):
            session.records(name)
    save_json({"records": "test.jsonl"}, copy / "toy" / "first" / "scores.json")
    lines = [json.loads(line) for line in (copy / "data" / "test.jsonl").read_text().splitlines()]
    lines[0]["image"] = "../../outside/run/model/config.json"
    (copy / "data" / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="leads out of"):
        record_picture(session.records("toy/first"), 0)


@pytest.mark.parametrize("served", ["runs", "runs/toy"])
def test_data_are_found_from_whichever_folder_is_served(runs, tmp_path, monkeypatch, served):
    """The config names them from the repository; the folder that is served may be runs/, or one
    experiment in it."""
    copy = shutil.copytree(runs, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs" / "data")
    session = Session(tmp_path / served)
    name = "toy/first" if served == "runs" else "first"
    assert (
        session.records(name).image_folder == copy / "data" and record_picture(session.records(name), 0).known
    )


def test_data_named_in_other_ways(runs, tmp_path, monkeypatch):
    run = shutil.copytree(runs / "toy" / "first", tmp_path / "deep" / "first")
    monkeypatch.chdir(runs.parent)
    for name, expected in (
        (str(runs / "data"), runs / "data"),
        ("runs/data", runs / "data"),
        ("./runs/../runs/data", runs / "data"),
    ):
        save_json({"data": name}, run / "config.json")
        assert data_folder_of(run) == expected
    for config in ({}, {"data": "runs/nowhere"}, {"data": str(tmp_path / "nowhere")}):
        save_json(config, run / "config.json")
        with pytest.raises(InputError, match="no (data )?folder"):
            data_folder_of(run)


def test_uploads_pass_the_check_of_every_picture():
    def file(kind, size=(6, 4), **settings):
        content = BytesIO()
        Image.new("RGB", size).save(content, kind, **settings)
        return content.getvalue()

    assert uploaded_picture("good.png", file("PNG")).image.size == (6, 4)
    for content, words in (
        (b"", "not in a supported format"),
        (b"<svg/>", "not in a supported format"),
        (file("PNG")[:40], "good.png"),
        (file("ICO"), "not in a supported format"),
        (file("PNG", (6000, 5000)), "the limit is"),
        (bytes(11 * 2**20), "at most 10 MiB"),
    ):
        with pytest.raises(InputError) as caught:
            uploaded_picture("good.png", content)
        assert words in str(caught.value) and "/tmp" not in str(caught.value)


def test_no_text_of_a_model_or_a_file_is_read_as_a_page(session, answer):
    words = pd.DataFrame([(0, 1, HOSTILE, 0.5)], columns=["patch", "rank", "token", "cosine"])
    lens = pd.DataFrame([(0, 0, 1, HOSTILE, 0.5)], columns=["layer", "patch", "rank", "token", "probability"])
    panel = Panel(print, print)
    panel.begin(HOSTILE, HOSTILE)
    panel.finish(session.checkpoint("toy/first"), replace(answer, question=HOSTILE))
    work = Work(lambda: [])
    work.show(HOSTILE)
    title = SelectedAttention(Token(1, HOSTILE, 0.5), torch.ones(1, 1, 1)).title
    for page in (
        patch_html(PatchWords(words, lens, torch.zeros(1, 1)), 0, [(0, 1, 1, ())]),
        panel.heading.value,
        work.message.value,
        title,
    ):
        assert "<img" not in page and "&lt;img" in page
    assert "&lt;" in panel.unknown.value and "<img" not in panel.unknown.value


def test_a_failing_call_is_a_message_and_the_other_answer_stays(session, monkeypatch):
    app = Ask(session)
    app.work.thread.join()
    app.second.value = "toy/second"
    app.work.thread.join()

    def broken(*arguments, **settings):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(session.checkpoint("toy/second").model, "generate", broken)
    app.button.click()
    app.work.thread.join()
    first, second = app.pair.panels
    assert "RuntimeError: out of memory, say" in app.work.message.value and first.answer and not second.answer
    assert not any(control.disabled for control in app.controls()) and len(app.pair.buttons()) == len(
        first.answer.tokens
    )
    monkeypatch.undo()
    app.button.click()
    app.work.thread.join()
    assert second.answer and "Click a token" in app.work.message.value


def test_the_word_panel_shows_the_nearest_words_of_both_checkpoints(session):
    models = [session.checkpoint(name) for name in ("toy/first", "toy/second")]
    every, records = records_beside(session, [EMBEDDED, "toy/first"])
    picture = drawn_scene(3)
    words = words_beside(models, picture, records)
    assert not {"yes", "no"} & set(words.words) and {"triangle", "blue"} <= set(words.words)
    panel = WordPanel()
    panel.show(models, picture, every, records)
    pictures = [picture.image, *pictures_beside(every)]
    expected = probe_table(models, pictures, words)
    assert panel.tables["input"].equals(expected) and panel.layout.display == ""
    assert set(panel.tables["middle"].words) == {"layer 3"}
    (first,) = panel.plots.children
    panel.choice.value = "middle"
    (second,) = panel.plots.children
    assert "layer 3" in str(second.layout) and "layer 3" not in str(first.layout)
    panel.begin()
    assert panel.layout.display == "none" and panel.plots.children == ()
    assert records_beside(session, [EMBEDDED]) == ([], []) and len(pictures_beside([])) == 7


def test_without_known_words_the_word_panel_shows_why(session):
    panel = WordPanel()
    image = drawn_scene(3).image
    panel.show([session.checkpoint("toy/first")], Picture(image, "upload"), (), ())
    assert panel.plots.children == () and "known answers" in panel.note.value
    hostile = Picture(image, "upload", (KnownQuestion("what", HOSTILE),))
    with pytest.raises(InputError, match="0 words"):
        words_beside([session.checkpoint("toy/first")], hostile)


def test_controls_are_disabled_while_something_goes_on():
    button = SimpleNamespace(disabled=False)
    seen = []
    work = Work(lambda: [button])
    work.start("busy ...", lambda: time.sleep(0.2) or seen.append(button.disabled))
    work.start("dropped, as another wish comes ...", seen.append, "the second")
    work.start("later ...", lambda: seen.append("the last"))
    work.thread.join()
    assert seen == [True, "the last"] and button.disabled is False


def test_without_any_run_there_is_the_embedded_model(tmp_path):
    app = Ask(Session(tmp_path))
    both = Compare(Session(tmp_path))
    for work in (app.work, both.work):
        work.thread.join()
    assert (
        app.first.value == EMBEDDED
        and "Ready" in app.work.message.value
        and "two different finished runs" in both.work.message.value
    )
    app.pair.begin([EMBEDDED])
    assert "never trained" in app.pair.panels[0].heading.value


def test_a_picture_of_a_runs_data_brings_its_questions(session):
    app = Ask(session)
    app.work.thread.join()
    app.picker.source.value = "run"
    app.work.thread.join()
    expected = session.records("toy/first")[0].turns[0]
    assert app.picker.chosen.known == (KnownQuestion(app.question.value, expected.answer, expected.category),)


def test_applications_are_stored_small_and_without_outputs():
    for path in sorted((ROOT / "nbs" / "apps").glob("*.ipynb")):
        assert path.stat().st_size < 5000 and not any(
            cell.get("outputs") for cell in nbformat.read(path, 4).cells
        )


def test_the_applications_listen_on_this_machine_only(capsys):
    command, _ = apps.voila_command(8866, browser=False)
    assert [word for word in command if "ip=" in word] == [
        "--Voila.ip=127.0.0.1"
    ] and "--Voila.auto_token=True" in command
    with pytest.raises(SystemExit):
        apps.main(["--ip", "0.0.0.0"])
    assert "--ip" in capsys.readouterr().err


# in a real browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def lab(runs, browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    port = free_port()
    shutil.copytree(ROOT / "nbs" / "apps", folder / "nbs" / "apps")  # JupyterLab saves what it shows
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={folder / 'nbs'}",
    ]
    address = f"http://127.0.0.1:{port}"
    with served(
        [COMMANDS / "jupyter", "lab", *options],
        f"{address}/api",
        folder,
        JUPYTER_TOKEN="only-here",
        ALIGNED_MLLM_RUNS=str(runs),
    ):
        yield address


@pytest.fixture(scope="module")
def voila(runs, scores, browser, tmp_path_factory):
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "aligned_mllm.apps.serve",
        "--no-browser",
        "--port",
        str(port),
        "--runs",
        str(runs),
    ]
    folder = tmp_path_factory.mktemp("voila")
    with served(command, f"http://127.0.0.1:{port}/voila/", folder, JUPYTER_TOKEN="only-here"):
        yield f"http://127.0.0.1:{port}"
    log = (folder / "server.log").read_text()
    assert (
        "Culling kernels with idle durations > 300 seconds at 60 second intervals" in log
        and "nrecognized" not in log
    ), log[-2000:]


class Window:
    "A page with a widget in it, as a person uses it."

    def __init__(self, browser, name: str):
        self.page = browser.new_page(viewport={"width": 1280, "height": 800})
        self.name = name
        self.problems = []
        self.requests = []
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind:
            keep(self.page, f"{self.name}_broken")
        self.page.close()

    def wait_until(self, condition: str, arg=None) -> None:
        "Ask ten times a second; by default the browser is asked, and draws, sixty times a second."
        self.page.wait_for_function(condition, arg=arg, polling=100)

    def says(self, words: str) -> None:
        "Wait until the widget's message has these words."
        self.wait_until(
            "words => [...document.querySelectorAll('.aligned-message')]"
            ".some(e => e.textContent.includes(words))",
            arg=words,
        )

    def enter(self, address: str, name: str, notebook: str) -> None:
        "From the first page to an application."
        self.page.goto(f"{address}/?token=only-here")
        self.page.get_by_role("link", name=name).click()
        self.page.get_by_role("heading", name=name).wait_for()
        assert self.page.url == f"{address}/voila/render/{notebook}.ipynb?token=only-here"

    def leave(self) -> None:
        "From an application to the first page."
        self.page.get_by_role("link", name="all applications").click()
        self.page.get_by_role("heading", name="aligned_mllm").wait_for()

    def asked_only(self, address: str) -> None:
        "Fails if a request has left the machine."
        here = (address, address.replace("http", "ws"), "data:", "blob:")
        assert self.requests and all(url.startswith(here) for url in self.requests), self.requests

    def choose(self, label: str, option: str) -> None:
        self.page.locator(".widget-dropdown", has=self.page.get_by_text(label, exact=True)).locator(
            "select"
        ).select_option(label=option)

    def press(self, label: str) -> None:
        self.page.get_by_role("button", name=label, exact=True).click()

    def panel(self, index: int):
        return self.page.locator(".aligned-panel").nth(index)

    def tokens(self, index: int) -> list[str]:
        return self.panel(index).locator(".aligned-token").all_text_contents()

    def drawn(self, index: int) -> str:
        "The numbers under a panel's picture, as the page has drawn them."
        return (
            self.panel(index)
            .locator(".js-plotly-plot")
            .evaluate("figure => JSON.stringify(figure.calcdata[0][0].z)")
        )

    def slide(self, key: str) -> float:
        "Press a key on the layer slider; milliseconds until the first panel's figure has been drawn again."
        self.page.locator(".widget-slider .noUi-handle").first.focus()
        self.page.evaluate("""() => {
            const plot = '.aligned-panel .js-plotly-plot';
            const drawn = () => JSON.stringify(document.querySelector(plot)?.calcdata?.[0]?.[0]?.z ?? null);
            const before = drawn();
            window.redrawn = new Promise(resolve => window.addEventListener('keydown', () => {
                const start = performance.now();
                const passed = () => performance.now() - start;
                const check = () => {
                    if (![before, 'null'].includes(drawn())) requestAnimationFrame(() => resolve(passed()));
                    else if (passed() < 10000) setTimeout(check, 2);
                    else resolve(Infinity);
                };
                check();
            }, {capture: true, once: true}));
        }""")
        self.page.keyboard.press(key)
        return self.page.evaluate("() => window.redrawn")


def use_ask(window: Window, timings: dict) -> None:
    "What a person does with Ask, and what must change in the page."
    page = window.page
    window.choose("and", "toy/second")
    window.panel(1).get_by_text("toy/second").wait_for()  # it is getting ready
    window.says("Ready")
    window.press("Ask")
    window.says("Click a token")
    answers = [window.tokens(0), window.tokens(1)]
    assert (
        all(answers)
        and all("%" in text for answer in answers for text in answer)
        and answers[0] != answers[1]
    )
    keep(page, f"{window.name}_1_answered")
    page.locator(".aligned-panel").first.scroll_into_view_if_needed()
    assert "click a token" in window.panel(0).text_content() and set(json.loads(window.drawn(0))[0]) == {0}
    window.panel(0).locator(".aligned-token").first.click()
    window.wait_until(
        "() => document.querySelector('.aligned-panel')"
        ".textContent.includes('attention in layer 1, mean of heads')"
    )
    before = window.drawn(0)
    assert np.array(json.loads(before)).shape == (5, 5) and np.array(json.loads(before)).sum() > 0
    keep(page, f"{window.name}_2_attention")
    timings["slider_ms"] = [round(window.slide(key)) for key in ["ArrowRight"] * 5 + ["ArrowLeft"] * 3]
    assert "attention in layer 3" in window.panel(0).text_content() and window.drawn(0) != before
    picture = window.panel(0).locator(".nsewdrag")
    box = picture.bounding_box()
    place = {"x": 0.3 * box["width"], "y": 0.5 * box["height"]}
    picture.hover(position=place, force=True)  # scrolls there
    picture.click(position=place, force=True)
    window.wait_until("() => document.querySelectorAll('.aligned-patch').length === 2")
    said = window.panel(0).locator(".aligned-patch").text_content()
    assert (
        "Patch 12 (row 3, column 2)" in said
        and "nearest words" in said
        and window.panel(0).locator(".aligned-patch tr").count() == 1 + 7
    )
    keep(page, f"{window.name}_3_patch")
    window.choose("checkpoint", EMBEDDED)
    window.panel(0).get_by_text(EMBEDDED).wait_for()
    window.says("Ready")
    assert window.tokens(0) == [] and "never trained" in window.panel(0).text_content()
    page.get_by_placeholder("what to ask").fill("")
    window.press("Ask")
    window.says("an empty question")
    keep(page, f"{window.name}_4_failed")
    page.get_by_placeholder("what to ask").fill("where blue circle")
    window.press("Ask")
    window.says("Click a token")
    assert window.tokens(0) and window.tokens(0) != answers[0]
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    (ARTEFACTS / f"{window.name}_timings.json").write_text(json.dumps(timings))
    assert min(timings["slider_ms"]) <= 200, (
        timings
    )  # the best of eight: other work on the machine is not the widget's
    assert window.problems == [] and statistics.median(timings["slider_ms"]) < 2000


def test_ask_in_jupyterlab(browser, lab):
    with Window(browser, "lab") as window:
        window.page.goto(f"{lab}/lab/tree/apps/ask.ipynb?token=only-here&reset")
        window.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        window.page.wait_for_selector(r"text=/\| Idle/")
        start = time.time()
        window.page.get_by_role("menuitem", name="Run", exact=True).click()
        window.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        window.says("Ready")
        use_ask(window, {"ready_s": round(time.time() - start, 1)})


def test_the_first_page_links_to_all_applications_and_asks_nobody_else(browser, voila):
    with Window(browser, "start") as window:
        window.page.goto(f"{voila}/?token=only-here")
        assert [link.get_attribute("href") for link in window.page.locator("a").all()] == [
            f"/voila/render/{name}.ipynb?token=only-here" for name in ("ask", "compare", "browse", "records")
        ]
        keep(window.page, "start_1")
        window.page.goto(f"{voila}/voila/tree/nowhere")
        window.page.goto(f"{voila}/voila/tree?classic-tree=true")
        window.asked_only(voila)


def test_ask_as_an_application(browser, voila):
    with Window(browser, "voila") as window:
        start = time.time()
        window.enter(voila, "Ask a checkpoint", "ask")
        window.says("Ready")
        use_ask(window, {"ready_s": round(time.time() - start, 1)})
        window.page.set_viewport_size({"width": 480, "height": 900})
        window.page.wait_for_timeout(300)
        keep(window.page, "voila_5_narrow")
        assert window.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
            "wider than a narrow window"
        )
        window.leave()
        window.asked_only(voila)


def test_compare_as_an_application(browser, voila, session):
    with Window(browser, "compare") as window:
        window.enter(voila, "Compare two runs", "compare")
        window.says("Choose a question")
        lines = window.page.locator(".widget-select option").count()
        table, said = differing_answers(both_answers(session, ["toy/first", "toy/second"]))
        assert lines == len(table) and said in window.page.text_content("body")
        window.choose("type", "count")
        window.wait_until(
            "lines => document.querySelectorAll('.widget-select option').length < lines", arg=lines
        )
        window.press("Look inside")
        window.says("sliders move both")
        window.wait_until(
            "() => [...document.querySelectorAll('.aligned-panel')]"
            ".every(e => e.textContent.includes('attention in layer 1'))"
        )
        before = [window.drawn(0), window.drawn(1)]
        window.slide("ArrowRight")
        window.wait_until(
            "() => [...document.querySelectorAll('.aligned-panel')]"
            ".every(e => e.textContent.includes('attention in layer 2'))"
        )
        assert window.drawn(0) != before[0] and window.drawn(1) != before[1]
        keep(window.page, "compare_1")
        words = window.page.locator(".js-plotly-plot", has_text="The nearest word of each patch")
        assert "words by input embeddings" in words.text_content()
        window.choose("patches", "words by states of the middle layer")
        words.get_by_text("words by states, layer 3").first.wait_for()
        window.page.get_by_text("Visual tokens as images").scroll_into_view_if_needed()
        keep(window.page, "compare_2")
        assert window.problems == []
        window.leave()
        window.asked_only(voila)


def test_browse_as_an_application(browser, voila, session):
    with Window(browser, "browse") as window:
        window.enter(voila, "Browse answers", "browse")
        window.says("Filter")
        window.choose("and", "second")
        changed = window.page.locator("option", has_text="changed: right to wrong (1)")
        changed.wait_for(state="attached")
        window.says("Filter")
        window.choose("verdict", "changed: right to wrong (1)")
        window.wait_until("() => document.querySelectorAll('.widget-select option').length === 1")
        card = window.page.locator(".aligned-card")
        assert "✓ right" in card.text_content() and "✗ wrong" in card.text_content()
        prompt = window.page.locator(".aligned-prompt").text_content()
        window.press("Ask and show attention")
        window.says("Click a token")
        window.wait_until(
            "() => [...document.querySelectorAll('.aligned-panel')]"
            ".every(e => e.textContent.includes('attention in layer 1'))"
        )
        records = session.records("toy/first")
        asked = [index for index, record in enumerate(records) if record.turns[0].category == "existence"]
        number = int(card.text_content().split("question random-")[1].split(",")[0])
        picture = record_picture(records, asked[number])
        for place, name in enumerate(("toy/first", "toy/second")):
            expected = ask(session.checkpoint(name), picture, prompt).tokens
            found = [text.split("  ")[0] for text in window.tokens(place)]
            assert found == [token.text for token in expected]
        keep(window.page, "browse_1")
        assert window.problems == []
        window.leave()
        window.asked_only(voila)


def test_records_as_an_application(browser, voila, session):
    with Window(browser, "records") as window:
        window.enter(voila, "Browse training records", "records")
        window.says("are encoded")
        learnt = window.page.locator(".aligned-learnt")
        records = Records(session.root / "data" / "train.jsonl")
        words = [turn.answer.split() for turn in records[0].turns]
        assert learnt.count() == sum(len(answer) + 1 for answer in words)
        assert "▦ 25 visual tokens" in window.page.locator(".aligned-visual").text_content()
        assert window.page.locator(".aligned-record img").count() == 2
        window.page.set_viewport_size({"width": 480, "height": 900})
        window.page.wait_for_timeout(300)
        keep(window.page, "records_1")
        assert window.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert window.problems == []
        window.leave()
        window.asked_only(voila)


def test_the_application_gives_nothing_away(voila):
    "Neither a page without the token, nor a file, nor the list of notebooks is served without the token."

    def status(path: str) -> int:
        try:
            with urllib.request.urlopen(f"{voila}{path}", timeout=20) as answer:
                return 403 if "/login" in answer.url else answer.status
        except urllib.error.HTTPError as error:
            return error.code

    assert status("/voila/render/ask.ipynb") == 403 and status("/voila/tree") == 403
    for path in ("ask.ipynb", "voila/templates/offline/conf.json", "../lib/00_core.ipynb"):
        assert status(f"/voila/files/{path}?token=only-here") in (403, 404)
