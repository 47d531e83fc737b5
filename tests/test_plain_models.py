"""Models of transformers that this library did not train: the page of the inside and the widgets, with chat
messages and with tables that have pictures inside."""

import json
import os
import re
from io import BytesIO

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from tiny_models import tiny, vision_sizes

from aligned_mllm.analysis.checkpoints import load_checkpoint, same_views, source_kind
from aligned_mllm.apps.ask import Ask
from aligned_mllm.apps.compare import Compare
from aligned_mllm.apps.serve import main as serve
from aligned_mllm.apps.serve import session_variables
from aligned_mllm.apps.session import EMBEDDED, KnownQuestion, Session, initial_runs
from aligned_mllm.cli import main
from aligned_mllm.core import InputError, save_json
from aligned_mllm.data.collate import model_inputs
from aligned_mllm.data.open import open_records, questions_of
from aligned_mllm.reporting import model_report
from aligned_mllm.reporting.case import case_of

COUNT = 5  # good records


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Two model folders, and one of a vision model."
    root = tmp_path_factory.mktemp("models")
    for family in ("llava", "smolvlm"):
        for part in tiny(family):
            part.save_pretrained(root / family)
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    CLIPVisionModel(CLIPVisionConfig(**vision_sizes())).save_pretrained(root / "clip")
    sizes = {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}}
    CLIPImageProcessorPil(**sizes).save_pretrained(root / "clip")
    return root


def said(number):
    "A conversation about an image."
    answer = {"role": "assistant", "content": "two red towers"}
    return [{"role": "user", "content": f"what is right of {number} ?"}, answer]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    "Chat messages with images in another folder: five good ones, one without an image, one broken."
    root = tmp_path_factory.mktemp("chats")
    noise = np.random.default_rng(0)
    (root / "photos").mkdir()
    rows = []
    for number in range(COUNT):
        picture = Image.fromarray(noise.integers(0, 255, (40, 60, 3), dtype=np.uint8))
        picture.save(root / "photos" / f"{number}.png")
        rows.append({"id": str(number), "images": [f"{number}.png"], "messages": said(number)})
    rows.insert(2, {"id": "text", "messages": said(2)})
    rows.insert(1, {"id": "lost", "images": ["lost.png"], "messages": said(1)})
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "chats.jsonl"


def table(chats):
    "The same records as the rows of a table, with the content of the files inside."
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    for row in rows:
        files = [chats.parent / "photos" / name for name in row.get("images", [])]
        row["images"] = [
            {"bytes": file.read_bytes() if file.is_file() else b"", "path": None} for file in files
        ]
    return rows


@pytest.fixture
def parquet(chats, tmp_path):
    "This table as a Parquet file."
    path = tmp_path / "test-0.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table(chats)), path, row_group_size=2)
    return path


def look(output, *words):
    "The command's exit status."
    return main(["inside", *map(str, words), "--output", str(output), "--pictures", "5"])


def share_on_image(folder, picture, question):
    "The share of attention on the image by layer, from transformers' own matrices."
    loaded = load_checkpoint(folder)
    loaded.model.set_attn_implementation("eager")
    batch = loaded.batch([picture], question)
    with torch.no_grad():
        layers = loaded.model(**model_inputs(batch), output_attentions=True).attentions
    return [float(layer[0, :, -1][:, batch["visual_mask"][0]].sum(-1).mean()) for layer in layers]


def test_two_model_folders_and_chat_messages(models, chats, tmp_path):
    words = [models / "llava", models / "smolvlm", "--data", chats, "--images", chats.parent / "photos"]
    words += ["--measures", "answers,convergence,attention,words"]
    assert look(tmp_path, *words, "--batch-size", 2) == 0
    page = (tmp_path / "inside.html").read_text()
    assert (
        f"on {COUNT} questions of chats.jsonl (1 broken, left out (left_out.csv), 1 without an image" in page
    )
    (reason,) = re.findall("Not measured: ([^<]*)", page)
    assert reason.startswith("no accuracy curve of llava, smolvlm.")
    assert pd.read_csv(tmp_path / "left_out.csv").id.tolist() == ["lost"]
    answers = pd.read_csv(tmp_path / "answers.csv")
    assert answers.model.tolist() == ["llava", "smolvlm"] and (answers.questions == COUNT).all()
    kept = [json.loads(line)["id"] for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert kept == [str(number) for number in range(COUNT)]
    found = pd.read_csv(tmp_path / "attention.csv").set_index("model")
    assert set(found.pictures) == {COUNT}
    for name in ("llava", "smolvlm"):
        rows = []
        for number in range(COUNT):
            picture = Image.open(chats.parent / "photos" / f"{number}.png")
            rows.append(share_on_image(models / name, picture, f"what is right of {number} ?"))
        assert np.allclose(found.loc[name].value, np.mean(rows, 0), atol=1e-4)


def test_a_table_with_pictures_inside_gives_the_same(models, chats, parquet, tmp_path):
    words = [models / "llava", "--measures", "attention"]
    assert look(tmp_path / "files", *words, "--data", chats, "--images", chats.parent / "photos") == 0
    assert look(tmp_path / "inside", *words, "--data", parquet) == 0
    assert look(tmp_path / "folder", *words, "--data", parquet.parent) == 0
    pages = [pd.read_csv(tmp_path / name / "attention.csv") for name in ("files", "inside", "folder")]
    for page in pages[1:]:
        pd.testing.assert_frame_equal(page, pages[0], atol=1e-6)
    assert "questions of test-0.parquet (1 broken" in (tmp_path / "folder" / "inside.html").read_text()


def test_the_digest_of_questions_covers_pictures_inside(chats):
    samples = table(chats)
    every = open_records(samples, broken="leave_out")
    first = questions_of(every, 3)
    assert [record.id for record in first] == ["0", "1", "2"]
    assert first.image(first[1].images[0]).getpixel((0, 0)) == every.image(every[1].images[0]).getpixel(
        (0, 0)
    )
    content = BytesIO()
    Image.new("RGB", (60, 40), "red").save(content, "PNG")
    samples[0]["images"] = [{"bytes": content.getvalue(), "path": None}]
    others = [questions_of(open_records(samples, broken="leave_out"), 3), questions_of(every, 2)]
    assert len({each.digest for each in (first, *others)}) == 3
    assert questions_of(open_records(table(chats), broken="leave_out"), 3).digest == first.digest


def test_teachers_are_references_and_part_of_what_a_table_is_kept_for(models, chats, tmp_path, monkeypatch):
    calls = []

    def stub(loaded, pictures, teachers, encoder, **settings):
        calls.append((loaded.name, len(pictures), encoder, list(teachers)))
        names = [*teachers, *["encoder"] * encoder]
        return pd.DataFrame({"model": loaded.name, "reference": names, "value": 1.0})

    monkeypatch.setattr(model_report, "cknna_table", stub)
    common = {"data": chats, "images": chats.parent / "photos", "pictures": 3}
    sources = [models / "llava", models / "smolvlm"]
    case = case_of(sources, tmp_path, **common)
    assert "smolvlm's encoder" in model_report.measured(case, "cknna", tmp_path)
    calls.clear()
    for teachers in ([str(models / "clip")], [str(models / "clip")], [str(models / "clip"), "dense"]):
        case = case_of(sources, tmp_path, **common, teachers=teachers)
        found = model_report.measured(case, "cknna", tmp_path)
    once = [("llava", 3, True, ["clip"]), ("smolvlm", 3, False, ["clip"])]
    both = [(*call[:3], ["clip", "dense"]) for call in once]
    assert calls == once + both
    assert found.reference.tolist() == [
        "clip",
        "dense",
        "clip",
        "dense",
        "encoder",
    ]  # those of all models first


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            [],
            "a model without questions. Expected: records to ask about, from --data. What to do: add --data",
        ),
        (["--data", "nowhere.json"], "no file nowhere.json"),
        (["--data", "CHATS", "--images", "CHATS"], "no folder"),
        (["--data", "CHATS", "--images", "PHOTOS", "--teacher", "./nothing"], "no teacher in './nothing'"),
    ],
)
def test_what_is_missing_is_named_in_one_line(models, chats, tmp_path, capsys, words, expected):
    places = {"CHATS": chats, "PHOTOS": chats.parent / "photos"}
    assert look(tmp_path, models / "llava", *(places.get(word, word) for word in words)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"aligned_mllm: {expected}") and error.count("\n") == 1 and "What to do" in error


def test_a_run_trained_on_one_file_is_not_asked_its_training_data(models, chats, tmp_path, capsys):
    for file, content in (("done", {}), ("config", {"data": str(chats)})):
        save_json(content, tmp_path / "run" / f"{file}.json")
    assert source_kind(tmp_path / "run") == "run" and source_kind(models / "llava") == "model"
    save_json({}, tmp_path / "adapter" / "adapter_config.json")
    assert source_kind(tmp_path / "adapter") == "model"
    assert look(tmp_path / "page", tmp_path / "run") == 2 and "add --data" in capsys.readouterr().err


# widgets


@pytest.fixture(scope="module")
def session(models, chats, tmp_path_factory):
    sources = [models / "llava", models / "smolvlm"]
    return Session(tmp_path_factory.mktemp("runs"), sources, chats, chats.parent / "photos")


def test_a_model_folder_is_asked_about_a_record(session):
    assert session.names == ["llava", "smolvlm", EMBEDDED] and initial_runs(session) == ["llava", "smolvlm"]
    app = Ask(session)
    app.work.thread.join()
    assert app.picker.chosen.title == "0" and app.question.value == "what is right of 0 ?"
    assert app.picker.chosen.known == (KnownQuestion("what is right of 0 ?", "two red towers"),)
    app.button.click()
    app.work.thread.join()
    (answer,) = [panel.answer for panel in app.pair.panels if panel.answer]
    assert answer.name == "llava" and answer.tokens and "two red towers" in app.right.value
    assert all(token.text for token in answer.tokens)  # also those of spare rows of the vocabulary


def test_two_model_folders_are_compared(session):
    app = Compare(session)
    app.work.thread.join()
    assert app.names == ["llava", "smolvlm"] and app.answers.answers.record.tolist() == [0, 1, 3, 4, 5]
    app.answers.chosen.index = 2
    app.button.click()
    app.work.thread.join()
    assert "what is right of 2 ?" in app.work.message.value
    panels = [panel.overlay.figure.layout.title.text for panel in app.pair.panels]
    assert all("attention in layer 1" in title for title in panels)
    assert [figure.layout.title.text[:13] for figure in app.colours.children] == ["Visual tokens"] * 2


def test_the_server_passes_models_and_data_on(models, chats, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(models)
    photos = str(chats.parent / "photos")
    found = session_variables(models=["llava", "owner/name"], data=str(chats), images=photos)
    folder = str(models / "llava")
    assert found["ALIGNED_MLLM_MODELS"].split(os.pathsep) == [folder, "owner/name"]
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    session = Session(tmp_path)
    assert session.models == {"llava": folder, "name": "owner/name"}
    assert len(session.records("name")) == COUNT + 1
    assert serve(["--model", "./nothing"]) == 2 and "no folder ./nothing" in capsys.readouterr().err
    assert serve(["--model", "llava", "--data", "nothing.json"]) == 2 and "no file" in capsys.readouterr().err


def test_a_model_without_data_is_shown_uploads_only(models, tmp_path):
    session = Session(tmp_path, [models / "llava"])
    with pytest.raises(InputError, match="no data for 'llava'"):
        session.records("llava")
    app = Ask(session)
    app.work.thread.join()
    app.picker.source.value = "run"
    app.work.thread.join()
    assert "start with --data" in app.work.message.value
    with pytest.raises(InputError, match="neither a finished run nor a model"):
        Session(tmp_path, [tmp_path])


def test_of_an_image_in_several_views_the_whole_is_shown(session):
    app = Ask(session)
    app.work.thread.join()
    app.first.value = "smolvlm"
    app.work.thread.join()
    app.button.click()
    app.work.thread.join()
    overlay = app.pair.panels[0].overlay
    assert len(overlay.part.options) == len(overlay.answer.views) > 1
    assert overlay.view[3] == (0.0, 0.0, 1.0, 1.0) != overlay.answer.views[0][3]
    loaded = session.checkpoint("smolvlm")
    ((_, view, boxes),) = same_views([loaded], [app.picker.chosen.image])
    assert view == overlay.part.index and boxes == [[0.0, 0.0, 1.0, 1.0]]
