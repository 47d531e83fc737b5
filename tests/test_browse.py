"""The browsers' data: answers joined by question and filtered as by hand, records as the collator feeds
them with tokens counted by hand; whatever is gone or broken is a message, and the rest still works."""

import json
import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tiny_models import FAMILIES, tiny

from aligned_mllm.apps.browse import Browse, question_card
from aligned_mllm.apps.browse_records import BrowseRecords, checkpoint_processor, record_files
from aligned_mllm.apps.fed_record import fed_record, fed_views, record_html, record_line, tokens_html
from aligned_mllm.apps.paged_list import PagedList
from aligned_mllm.apps.score_folder import ScoreFolder, filtered_answers, joined_answers
from aligned_mllm.apps.score_folder import outcome_counts
from aligned_mllm.apps.serve import session_variables
from aligned_mllm.apps.session import EMBEDDED, Session
from aligned_mllm.core import InputError, save_json
from aligned_mllm.data.collate import Samples
from aligned_mllm.data.open import open_records
from aligned_mllm.evals.answer_file import kept_answers
from aligned_mllm.evals.benchmark import BenchmarkQuestion, benchmark_named, verdict_table
from aligned_mllm.teachers.pixels import crop_view
from aligned_mllm.worlds.small_models import embedded_model

HOSTILE = "<img src=x onerror=alert(1)>"
LABELS = ("yes", "no", "yes", "yes", "no", "no")
ANSWERS = {
    "first": ("yes", "no", "no", "a <b>cat</b>", "no", "yes"),
    "second": ("no", "no", "yes", "yes", "", "yes"),
}


def write_questions(folder: Path, labels=LABELS) -> Path:
    "POPE's files: the even questions are random, the odd ones popular."
    (folder / "val2014").mkdir(parents=True)
    rows = []
    for number, label in enumerate(labels):
        Image.new("RGB", (8, 6), (40 * number, 0, 0)).save(folder / "val2014" / f"{number}.png")
        row = {"question_id": number, "image": f"{number}.png", "text": f"is {HOSTILE} {number} there ?"}
        rows.append({**row, "label": label})
    for part, name in ((rows[::2], "random"), (rows[1::2], "popular")):
        text = "\n".join(map(json.dumps, part))
        (folder / f"coco_pope_{name}.json").write_text(text, encoding="utf-8")
    return folder


def write_answers(scores: Path, data: Path, answers=ANSWERS, source: str = "nowhere") -> Path:
    "Answers as a score leaves them; those of the second model without the last question."
    names = [f"{('random', 'popular')[number % 2]}-{number}" for number in range(len(LABELS))]
    rule = benchmark_named("pope").rules["official"]
    for model, texts in answers.items():
        folder = scores / model / "pope"
        folder.mkdir(parents=True)
        count = len(names) - (model == "second")
        rows = [{"id": name, "answer": text} for name, text in list(zip(names, texts))[:count]]
        (folder / "answers.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
        made = [BenchmarkQuestion(row["id"], (), "", (label,)) for row, label in zip(rows, LABELS)]
        verdict_table(made, [row["answer"] for row in rows], rule).to_csv(
            folder / "verdicts.csv", index=False
        )
        facts = {
            "benchmark": "pope",
            "model": model,
            "rule": "official",
            "prompt": "official",
            "path": source,
        }
        save_json({**facts, "data": str(data), "images": ""}, folder / "scores.json")
        save_json({"questions": "of another time"}, folder / "answers.json")
        save_json({"source": source, "stamp": {"config.json": [1, 1]}}, folder.parent / "source.json")
    return scores


@pytest.fixture
def scores(tmp_path) -> Path:
    return write_answers(tmp_path / "runs" / "scores", write_questions(tmp_path / "data"))


def ready(app):
    app.work.thread.join()
    return app


# answers


def test_answers_are_joined_by_question_and_judged_by_the_chosen_rule(scores):
    folder = ScoreFolder(scores)
    tables = [folder.verdicts("pope", name, "official") for name in ("first", "second")]
    joined = joined_answers(tables).set_index("id")
    assert set(joined.index) == {"random-0", "popular-1", "random-2", "popular-3", "random-4"}
    assert joined.outcome.to_dict() == {
        "random-0": "changed: right to wrong",
        "popular-1": "both right",
        "random-2": "changed: wrong to right",
        "popular-3": "both right",  # the official rule takes whatever is not "no" for "yes"
        "random-4": "changed: right to wrong",
    }
    strict = joined_answers([folder.verdicts("pope", name, "strict") for name in ("first", "second")])
    strict = strict.set_index("id").outcome
    assert (
        strict["popular-3"] == "changed: unparsed to right"
        and strict["random-4"] == "changed: right to unparsed"
    )
    assert joined_answers(tables[:1]).word_0.tolist() == joined_answers(tables[:1]).outcome.tolist()
    with pytest.raises(InputError, match="rule of pope 'no such'"):
        folder.verdicts("pope", "first", "no such")


def test_verdicts_in_words():
    made = [BenchmarkQuestion(str(number), (), "", ("a",) if number < 4 else ()) for number in range(5)]
    values = iter([1.0, 0.3, None, 0.0])
    table = verdict_table(made, ["x"] * 5, lambda question, answer: next(values)).assign(cut=False)
    words = ["right", "partly right", "unparsed", "wrong", "no published answer"]
    assert joined_answers([table]).outcome.tolist() == words
    assert list(outcome_counts(joined_answers([table]))) == [
        "right",
        "wrong",
        "no published answer",
        "partly right",
        "unparsed",
    ]


def test_filters_select_what_a_loop_selects(scores):
    folder = ScoreFolder(scores)
    joined = joined_answers([folder.verdicts("pope", name, "official") for name in ("first", "second")])
    outcomes, categories = (outcome_counts(joined, column) for column in ("outcome", "category"))
    assert sum(outcomes.values()) == sum(categories.values()) == len(joined)
    assert list(outcomes)[0] == "changed: right to wrong"
    for outcome, category in product(["", *outcomes], ["", *categories]):
        rows = [row for row in joined.itertuples() if outcome in ("", row.outcome)]
        expected = [row.Index for row in rows if category in ("", row.category)]
        assert filtered_answers(joined, outcome, category).index.tolist() == expected


def test_a_folder_that_is_being_written_is_only_read(scores):
    path = scores / "first" / "pope" / "answers.jsonl"
    whole = kept_answers(path)
    with open(path, "a", encoding="utf-8") as handle:
        handle.write('{"id": "random-6", "ans')
    before = path.read_bytes()
    assert kept_answers(path) == whole and path.read_bytes() == before
    path.write_text('{"id": 1}\n', encoding="utf-8")
    with pytest.raises(InputError, match="an object with id and answer"):
        kept_answers(path)
    with pytest.raises(InputError, match="no answers in"):
        ScoreFolder(scores / "first")


def test_no_text_of_a_score_is_read_as_a_page(scores):
    answers = {"first": [HOSTILE] * 6, HOSTILE: [HOSTILE] * 6}
    shutil.rmtree(scores)
    write_answers(scores, scores.parents[1] / "data", answers, HOSTILE)
    app = ready(Browse(Session(scores.parent)))
    app.choice.second.value = "first"
    ready(app)
    app.button.click()
    ready(app)
    row = next(app.choice.answers.itertuples())._replace(id=HOSTILE, category=HOSTILE, unit=HOSTILE)
    question = BenchmarkQuestion("1", (Path(HOSTILE),), HOSTILE, (HOSTILE,), (HOSTILE,))
    assert len(app.choice.names) == 2
    pages = [
        app.card.value,
        app.note.value,
        app.work.message.value,
        question_card(row, [HOSTILE], [question]),
    ]
    for page in pages:
        assert "<img src=x" not in page and "<b>cat" not in page
    assert sum("&lt;img src=x" in page for page in pages) == 3  # the note speaks of no text


def test_without_pictures_questions_or_checkpoint_the_rest_still_works(scores):
    data = scores.parents[1] / "data"
    (data / "val2014" / "0.png").unlink()
    app = ready(Browse(Session(scores.parent)))
    assert "have changed since" in app.note.value and len(app.list.entries) == 6
    cards = {}
    for _, index in app.list.entries:
        app.list.chosen.value = index
        cards[app.choice.answers.id[index]] = app.card.value
    assert [name for name in cards if "no picture" in cards[name]] == ["random-0"]
    assert all("is &lt;img" in card for card in cards.values())
    assert sum("data:image/png" in card for card in cards.values()) == 5
    app.list.chosen.value = app.choice.answers.index[app.choice.answers.id == "popular-1"][0]
    app.button.click()
    assert "checkpoint of &#x27;first&#x27; is gone" in ready(app).work.message.value
    assert not app.button.disabled and app.card.value
    moved = shutil.move(data, data.with_name("moved"))
    app = ready(Browse(Session(scores.parent)))
    assert "questions of pope are gone" in app.note.value and app.choice.rule.options == (
        ("official", "official"),
    )
    app.choice.second.value = "second"
    assert len(ready(app).list.entries) == 5 and "✓" in app.card.value
    assert "answered by one only: 1 question." in app.work.message.value
    app.button.click()
    assert "no question to ask" in ready(app).work.message.value
    app = ready(Browse(Session(scores.parent, questions=moved)))
    assert len(app.choice.rule.options) == 4 and len(app.list.entries) == 6
    assert "no folder of scores" in ready(Browse(Session(moved))).work.message.value


def test_a_score_folder_is_found_by_name_and_below_runs(scores, tmp_path):
    other = shutil.copytree(scores, tmp_path / "elsewhere" / "mine")
    app = ready(Browse(Session(scores.parent, scores=other)))
    assert list(app.choice.folders) == ["mine", "scores"]
    found = session_variables(scores=str(other), questions=str(tmp_path / "data"))
    assert found == {"ALIGNED_MLLM_SCORES": str(other), "ALIGNED_MLLM_QUESTIONS": str(tmp_path / "data")}
    for wrong in ({"scores": "nowhere"}, {"questions": "nowhere"}):
        with pytest.raises(InputError, match="nowhere"):
            session_variables(**wrong)


def test_pages_hold_every_entry_once():
    pages = PagedList(lambda key: None, "questions", size=4)
    pages.show([(str(number), number) for number in range(11)])
    seen = []
    for _ in range(3):
        seen += [key for _, key in pages.chosen.options]
        pages.next.click()
    assert seen == list(range(11)) and pages.start == 8
    for _ in range(5):
        pages.previous.click()
    assert pages.start == 0 and pages.tally.value == "questions 1 to 4 of 11"


# records


def write_conversations(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = np.linspace(0, 255, 60 * 90 * 3).reshape(60, 90, 3).astype(np.uint8)
    Image.fromarray(values).save(folder / "wide.png")
    turns = [("<image>\nwhat is left", "two red towers"), (f"where {HOSTILE}", "above"), ("what", "yes")]
    talk = [{"from": part, "value": text} for turn in turns for part, text in zip(("human", "gpt"), turn)]
    text = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "no"}]
    rows = [{"id": "a", "image": "wide.png", "conversations": talk}, {"id": HOSTILE, "conversations": text}]
    rows.append({"id": "c", "image": "gone.png", "conversations": talk})
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "train.json"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_record_is_shown_as_it_is_fed(family, tmp_path):
    _, processor = tiny(family)
    records = open_records(write_conversations(tmp_path), broken="leave_out")
    fed = fed_record(Samples(records, processor), 0)
    runs = fed.runs
    assert [run.start for run in runs] + [fed.tokens] == [0] + [run.stop for run in runs]
    assert sum(run.visual for run in runs) == fed.visual == int(fed.batch["grids"].prod(1).sum())
    assert sorted(view for run in runs for view in run.views) == list(range(len(fed.batch["grids"])))
    ids = fed.batch["input_ids"][0]
    learnt = [run for run in runs if run.learnt]
    words = processor.tokenizer.decode([int(ids[run.start]) for run in learnt], skip_special_tokens=True)
    assert "".join(words.split()) == "tworedtowersaboveyes"
    page = tokens_html(fed)
    assert page.count("class='aligned-learnt'") == fed.supervised == len(learnt)
    for run in (run for run in runs if run.visual):
        assert f"{run.visual} visual tokens" in page and f"index {run.start}..{run.stop - 1}" in page
    assert "<img" not in page and record_html(fed).count("<img src='data:image/png") >= 2


def test_tokens_with_loss_are_counted_as_by_hand(tmp_path, parts):
    _, processor = embedded_model(parts)
    turns = [("<image>\ncount red circle", "2"), ("where blue square", "top-left")]
    talk = [{"from": part, "value": text} for turn in turns for part, text in zip(("human", "gpt"), turn)]
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    row = {"id": "a", "image": "red.png", "conversations": talk}
    records = open_records([row], tmp_path)
    samples = Samples(records, processor)
    fed = fed_record(samples, 0)
    assert fed.supervised == sum(len(answer.split()) + 1 for _, answer in turns)  # each ends with <eos>
    assert fed.visual == 25 and [run.visual for run in fed.runs if run.visual] == [25]
    line, remark = record_line(samples, 0)
    assert line == f"1. a: {fed.tokens} tokens, 25 visual, 4 with loss" and remark == ""
    short = Samples(records, processor, max_length=fed.tokens - 1)
    assert record_line(short, 0)[1] == "truncated" and fed_record(short, 0).supervised == 3
    assert record_line(Samples(records, processor, with_images=False), 0)[1] == "no picture"
    assert "2 turns that do not see each other" in record_html(
        fed_record(Samples(records, processor, separate_turns=True), 0)
    )
    processor.chat_template = (
        "{% for message in messages %}{% for part in message['content'] if part['type'] == 'image' %}"
        "{{ '<image>' }}{% endfor %}{% endfor %}"
    )  # leaves all texts out
    assert record_line(Samples(records, processor), 0)[1] == "no token with loss"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_views_are_those_of_the_batch(family, tmp_path):
    _, processor = tiny(family)
    records = open_records(write_conversations(tmp_path), broken="leave_out")
    fed = fed_record(Samples(records, processor), 0)
    views, from_batch = fed_views(fed)
    assert from_batch == (family not in ("llava_next", "llava_onevision")) and len(views) == len(
        fed.batch["grids"]
    )
    for view, box in zip(views, fed.batch["boxes"].tolist()):
        cut = crop_view(fed.images[0], box, (view.height, view.width), (127, 127, 127))
        inside = np.abs(np.asarray(view, float) - np.asarray(cut, float))
        assert np.median(inside) <= 8  # out of 255; edges and padding may differ


def test_broken_records_are_messages_and_the_others_are_shown(tmp_path, parts):
    model, processor = embedded_model(parts)
    model.save_pretrained(tmp_path / "runs" / "one" / "model")
    processor.save_pretrained(tmp_path / "runs" / "one" / "model")
    save_json({}, tmp_path / "runs" / "one" / "done.json")
    save_json({"data": "data", "records": "train.json"}, tmp_path / "runs" / "one" / "config.json")
    write_conversations(tmp_path / "runs" / "data")
    app = ready(BrowseRecords(Session(tmp_path / "runs")))
    assert Counter(remark for _, remark, _ in app.lines) == {"": 1, "no picture": 1, "left out": 1}
    assert "25 visual tokens" in app.card.value and app.session.loaded == {}
    app.remark.value = "no picture"
    assert "<img src=x" not in app.card.value and "&lt;img src=x" in app.card.value
    app.remark.value = "left out"
    assert "gone.png" in app.card.value and "broken_records=leave_out" in app.card.value
    (tmp_path / "runs" / "data" / "wide.png").write_bytes(b"no picture")
    app.limit.value = 1000
    assert [remark for _, remark, _ in ready(app).lines] == ["error", "no picture", "left out"]
    app.remark.value = "error"
    assert "not in a supported format" in app.card.value and not app.file.disabled
    app.limit.value = 2
    assert [remark for _, remark, _ in ready(app).lines] == ["error", "error", "left out"]
    assert "max_length 2 would cut" in app.lines[1][0]


def test_a_processor_alone_is_that_of_the_checkpoint(tmp_path):
    model, processor = tiny("llava")
    model.save_pretrained(tmp_path / "llava")
    del processor.patch_size
    processor.patch_size = None
    processor.save_pretrained(tmp_path / "llava")
    session = Session(
        tmp_path, models=[tmp_path / "llava"], data=write_conversations(tmp_path / "data").parent
    )
    assert list(record_files(session)) == ["train.json"]
    alone = checkpoint_processor(session, "llava")
    assert session.loaded == {} and alone.patch_size == model.config.vision_config.patch_size
    loaded = session.checkpoint("llava").processor
    records = open_records(tmp_path / "data" / "train.json", broken="leave_out")
    assert record_line(Samples(records, alone), 0) == record_line(Samples(records, loaded), 0)
    assert checkpoint_processor(session, EMBEDDED).image_token == "<image>"


def test_a_table_without_questions_is_read_as_text(scores):
    path = scores / "first" / "pope" / "verdicts.csv"
    table = pd.read_csv(path).assign(answer=["NA", "1.0", "null", "", "007", "no"])
    table.to_csv(path, index=False)
    shutil.rmtree(scores.parents[1] / "data")
    found = ScoreFolder(scores).verdicts("pope", "first", "official")
    assert found.answer.tolist() == ["NA", "1.0", "null", "", "007", "no"] and found.verdict.notna().all()
