"Every benchmark is read from small files in its published form, and its numbers agree with those by hand."

import base64
import csv
import io
import json
import sys
from pathlib import Path

import datasets
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from aligned_mllm.core import InputError
from aligned_mllm.evals.benchmark import BENCHMARKS, all_benchmarks, benchmark_named, verdict_table
from aligned_mllm.evals.benchmark_data import open_questions
from aligned_mllm.evals.benchmark_rows import StoredPicture

CHOICE_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
NAMES = "pope mme mmvp cvbench whatsup whatsup_words mmstar vqav2 textvqa vizwiz gqa scienceqa".split()
NAMES += "mmbench ocrbench mmmu seed realworldqa vstar chartqa".split()


def encoded(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, name: str, content) -> None:
    "A picture, a text, a JSON value, or for .jsonl a list of them."
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.write_bytes(encoded())
    elif path.suffix == ".jsonl" or name.startswith("coco_pope"):
        path.write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_table(path: Path, rows: list[dict]) -> None:
    "A TSV file in VLMEvalKit's form, or a Parquet file as on the hub, with a picture in each row."
    if path.suffix == ".tsv":
        rows = [{"index": number, **row} for number, row in enumerate(rows)]
        with open(path, "w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]) + ["image"], delimiter="\t")
            writer.writeheader()
            writer.writerows({**row, "image": base64.b64encode(encoded()).decode()} for row in rows)
    else:
        table = [{**row, "image": {"bytes": encoded(), "path": None}} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=2)


PEOPLE = [{"answer": "2", "answer_confidence": "yes", "answer_id": number} for number in range(10)]
ADAPTVIS = "<image>\nUSER: Where is the {} in the photo? Answer with left, right, top or bottom.\nASSISTANT:"
WORLD = {
    "image_path": "data/controlled_images/cup_on_tray.jpeg",
    "caption_options": ["A cup on a tray", "A cup under a tray"],
}
WHATSUP = {
    "controlled_images_dataset.json": [WORLD],
    "data/controlled_images/cup_on_tray.jpeg": None,
    "coco_qa_one_obj.json": [[9, "A photo of a dog on the left", "A photo of a dog on the right"]],
    "val2017/000000000009.jpg": None,
    "prompts/Controlled_Images_A_with_answer_four_options.jsonl": [
        {
            "id": 0,
            "question": ADAPTVIS.format("cup").replace("top or bottom", "on or under"),
            "answer": ["On"],
        }
    ],
    "prompts/COCO_QA_one_obj_with_answer_four_options.jsonl": [
        {"id": 0, "question": ADAPTVIS.format("dog"), "answer": ["Left"]}
    ],
}
PROBLEM = {
    "question": "Which is west?",
    "choices": ["Ohio", "Maine"],
    "answer": 0,
    "hint": "A map.",
    "image": None,
}
PROBLEM |= {"task": "closed choice", "grade": "grade2", "subject": "social science", "split": "test"}
SEED = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four", "answer": "B"}
SEED |= {"question": "How many?", "question_type_id": 5, "question_id": "101669", "segment": []}
MMVP = "Index,Question,Options,Correct Answer\n"
MMVP += "1,Is it open?,(a) Open (b) Closed,(b)\n2,Is it open?,(a) Open (b) Closed,(a)\n"
CV = {
    "idx": 0,
    "type": "2D",
    "task": "Count",
    "question": "How many?",
    "choices": ["1", "2"],
    "answer": "(B)",
}
CV |= {"prompt": "How many? Select.\n(A) 1\n(B) 2", "filename": "img/0.png", "source": "ADE20K"}
V = {
    "question_id": 0,
    "image": "direct_attributes/a.jpg",
    "text": f"What colour?\n(A) blue\n(B) red{CHOICE_SUFFIX}",
}
V |= {"category": "direct_attributes", "label": "A"}
OCR = {
    "dataset_name": "IIIT5K",
    "id": 0,
    "question": "What is written?",
    "answers": ["STOP"],
    "image_path": "IIIT5K/1.png",
}
GQA = {"imageId": "n1", "question": "Is it red?", "answer": "yes", "types": {"structural": "verify"}}
POPE = [
    {
        "question_id": 1,
        "image": "COCO_val2014_000000000001.jpg",
        "text": "Is there a dog in the image?",
        "label": "yes",
    },
    {
        "question_id": 2,
        "image": "COCO_val2014_000000000001.jpg",
        "text": "Is there a cat in the image?",
        "label": "no",
    },
]

# The published files of each benchmark (None: a picture), then of its first question: id, answers, options,
# category, unit, and the end of the prompt.
FILES = {
    "pope": (
        {"coco_pope_random.json": POPE, "coco_pope_popular.json": POPE, f"val2014/{POPE[0]['image']}": None},
        ("popular-1", ("yes",), (), "popular", "popular-1", "a dog in the image?"),
    ),
    "mme": (
        {
            "color/0001.txt": "Red? Please answer yes or no.\tYes\nBlue? Please answer yes or no.\tNo\n",
            "color/0001.jpg": None,
            "artwork/questions_answers_YN/2.txt": "Is it by Monet? Please answer yes or no.\tNo\n",
            "artwork/images/2.png": None,
        },
        ("artwork/2-0", ("no",), (), "artwork", "artwork/2", "Please answer yes or no."),
    ),
    "mmvp": (
        {"Questions.csv": MMVP, "MMVP Images/1.jpg": None, "MMVP Images/2.jpg": None},
        ("1", ("B",), ("Open", "Closed"), "all", "pair 1", "Is it open? (a) Open (b) Closed"),
    ),
    "cvbench": (
        {"test_2d.jsonl": [CV], "img/0.png": None},
        ("2D0", ("B",), ("1", "2"), "Count", "2D0", "Select.\n(A) 1\n(B) 2" + CHOICE_SUFFIX),
    ),
    "whatsup": (WHATSUP, ("A-0", ("A cup on a tray",), (), "A", "A cup tray", "one sentence.")),
    "whatsup_words": (
        WHATSUP,
        ("A-0", ("On",), (), "A", "A cup tray", "Answer with left, right, on or under."),
    ),
    "vqav2": (
        {
            "v2_OpenEnded_mscoco_val2014_questions.json": {
                "info": {},
                "questions": [{"question_id": 42001, "image_id": 42, "question": "How many?"}],
            },
            "v2_mscoco_val2014_annotations.json": {
                "annotations": [
                    {"question_id": 42001, "image_id": 42, "answer_type": "number", "answers": PEOPLE}
                ]
            },
            "val2014/COCO_val2014_000000000042.jpg": None,
        },
        ("42001", ("2",) * 10, (), "number", "42001", "How many?"),
    ),
    "textvqa": (
        {
            "TextVQA_0.5.1_val.json": {
                "dataset_type": "val",
                "data": [
                    {
                        "question_id": 7,
                        "question": "What is read?",
                        "image_id": "00b",
                        "answers": ["stop"] * 10,
                    }
                ],
            },
            "train_images/00b.jpg": None,
        },
        ("7", ("stop",) * 10, (), "all", "7", "What is read?"),
    ),
    "vizwiz": (
        {
            "val.json": [
                {"image": "VizWiz_val_0.jpg", "question": "What?", "answers": PEOPLE, "answer_type": "other"}
            ],
            "val/VizWiz_val_0.jpg": None,
        },
        ("0", ("2",) * 10, (), "other", "0", "What?"),
    ),
    "gqa": (
        {"testdev_balanced_questions.json": {"201": GQA, "202": GQA}, "images/n1.jpg": None},
        ("201", ("yes",), (), "verify", "201", "Is it red?"),
    ),
    "scienceqa": (
        {
            "problems.json": {"1": PROBLEM, "2": {**PROBLEM, "image": "image.png"}},
            "pid_splits.json": {"test": ["1", "2"]},
            "test/2/image.png": None,
        },
        (
            "2",
            ("A",),
            ("Ohio", "Maine"),
            "social science",
            "2",
            "Options: (A) Ohio (B) Maine" + CHOICE_SUFFIX,
        ),
    ),
    "ocrbench": (
        {
            "OCRBench.json": [{**OCR, "type": "Regular Text Recognition"}],
            "OCRBench_Images/IIIT5K/1.png": None,
        },
        ("0", ("STOP",), (), "Regular Text Recognition", "0", "What is written?"),
    ),
    "seed": (
        {
            "SEED-Bench.json": {
                "questions": [
                    {**SEED, "data_type": "video"},
                    {**SEED, "data_type": "image", "data_id": "1_2"},
                ],
                "question_type": {"Instances Counting": 5},
            },
            "SEED-Bench-image/1_2": None,
        },
        (
            "101669",
            ("B",),
            ("One", "Two", "Three", "Four"),
            "instances counting",
            "101669",
            "D. Four" + CHOICE_SUFFIX,
        ),
    ),
    "vstar": (
        {"test_questions.jsonl": [V], "direct_attributes/a.jpg": None},
        ("0", ("A",), ("blue", "red"), "direct_attributes", "0", CHOICE_SUFFIX),
    ),
    "chartqa": (
        {"test_human.json": [{"imgname": "1.png", "query": "How many?", "label": "12"}], "png/1.png": None},
        ("test_human.json0", ("12",), (), "human", "test_human.json0", "How many?"),
    ),
}

LETTERED = {"A": "One", "B": "Two", "C": "", "D": ""}
# Tables with pictures inside: their name, one row, and of the question what FILES has.
TABLES = {
    "pope": (
        "POPE.tsv",
        {"question": "Is there a dog?", "answer": "Yes", "category": "popular"},
        ("popular-0", ("yes",), (), "popular", "popular-0", "a dog?"),
    ),
    "mme": (
        "MME.tsv",
        {
            "question": "Is it red? Please answer yes or no.",
            "answer": "Yes",
            "category": "color",
            "image_path": "color/1.jpg",
        },
        ("color/1.jpg-0", ("yes",), (), "color", "color/1.jpg", "yes or no."),
    ),
    "mmvp": (
        "MMVP.tsv",
        {"question": "Is it open?", "A": "Open", "B": "Closed", "answer": "B"},
        ("0", ("B",), ("Open", "Closed"), "all", "pair 1", "(a) Open (b) Closed"),
    ),
    "cvbench": (
        "CV-Bench-2D.tsv",
        {"question": "How many?", **LETTERED, "answer": "B", "category": "Count", "source": "COCO"},
        ("0", ("B",), ("One", "Two"), "Count", "0", "(A) One\n(B) Two" + CHOICE_SUFFIX),
    ),
    "mmstar": (
        "MMStar.tsv",
        {"question": "How many?", **LETTERED, "answer": "B", "category": "math", "l2_category": "geometry"},
        ("0", ("B",), ("One", "Two"), "math", "0", "How many?\nOptions: A: One, B: Two"),
    ),
    "mmbench": (
        "MMBench_DEV_EN.tsv",
        {
            "index": 1000003,
            "question": "How many?",
            "hint": "nan",
            **LETTERED,
            "answer": "B",
            "category": "count",
        },
        ("1000003", ("B",), ("One", "Two"), "count", "question 3", "from the options above. \n"),
    ),
    "mmmu": (
        "validation-0.parquet",
        {
            "id": "validation_Art_3",
            "question": "See <image 1>. How many?",
            "options": "['One', 'Two']",
            "answer": "B",
            "question_type": "multiple-choice",
            "image_1": {"bytes": encoded("blue"), "path": None},
        },
        (
            "validation_Art_3",
            ("B",),
            ("One", "Two"),
            "Art",
            "validation_Art_3",
            "(A) One\n(B) Two\n" + CHOICE_SUFFIX,
        ),
    ),
    "realworldqa": (
        "test-0.parquet",
        {"question": "Which lane?\nA. Left\nB. Right\nPlease answer with the letter.", "answer": "B"},
        ("0", ("B",), ("Left", "Right"), "all", "0", "with the letter."),
    ),
    "scienceqa": (
        "test-0.parquet",
        {
            "question": "Which is west?",
            "choices": ["Ohio", "Maine"],
            "answer": 1,
            "hint": "",
            "subject": "geography",
        },
        ("0", ("B",), ("Ohio", "Maine"), "geography", "0", CHOICE_SUFFIX),
    ),
    "vqav2": (
        "validation-0.parquet",
        {"question_id": 1, "question": "How many?", "answers": PEOPLE, "answer_type": "number"},
        ("1", ("2",) * 10, (), "number", "1", "How many?"),
    ),
    "textvqa": (
        "validation-0.parquet",
        {
            "question_id": 1,
            "image_id": "x",
            "question": "What?",
            "answers": ["a"] * 10,
            "ocr_tokens": ["STOP", "!"],
        },
        ("1", ("a",) * 10, (), "all", "1", "What?"),
    ),
    "seed": (
        "test-0.parquet",
        {
            **{key: value for key, value in SEED.items() if key != "segment"},
            "data_type": "image",
            "data_id": "1_2",
        },
        ("101669", ("B",), ("One", "Two", "Three", "Four"), "instances counting", "101669", CHOICE_SUFFIX),
    ),
    "chartqa": (
        "test-0.parquet",
        {"question": "How many?", "answer": ["12"], "type": "human_test"},
        ("0", ("12",), (), "human", "0", "How many?"),
    ),
    "ocrbench": (
        "test-0.parquet",
        {"question": "What?", "answer": ["STOP"], "dataset": "HME100k", "question_type": "Formula"},
        ("0", ("STOP",), (), "Formula", "0", "What?"),
    ),
    "vstar": (
        "test-0.parquet",
        {key: value for key, value in V.items() if key != "image"},
        ("0", ("A",), ("blue", "red"), "direct_attributes", "0", CHOICE_SUFFIX),
    ),
}


def facts(question) -> tuple:
    return question.id, question.answers, question.options, question.category, question.unit


def folder_of(name: str, folder: Path) -> Path:
    for file, content in FILES[name][0].items():
        write(folder, file, content)
    return folder


def test_every_benchmark_is_read_from_its_published_form():
    assert set(NAMES) == set(all_benchmarks()) and set(FILES) | set(TABLES) == set(NAMES)


@pytest.mark.parametrize("name", FILES)
def test_published_files(name, tmp_path):
    question = open_questions(name, folder_of(name, tmp_path))[0]
    *expected, end = FILES[name][1]
    assert facts(question) == tuple(expected) and question.prompt.endswith(end)
    assert question.pictures()[0].size == (5, 4)


@pytest.mark.parametrize("name", TABLES)
def test_tables_with_pictures(name, tmp_path):
    file, row, (*expected, end) = TABLES[name]
    write_table(tmp_path / file, [row])
    question = open_questions(name, tmp_path)[0]
    assert facts(question) == tuple(expected) and question.prompt.endswith(end)
    colour = (0, 0, 255) if name == "mmmu" else (255, 0, 0)
    assert question.pictures()[0].getpixel((0, 0)) == colour


@pytest.mark.parametrize("name", ["pope", "scienceqa", "vqav2"])
def test_a_data_set_of_the_hub(name, tmp_path, monkeypatch):
    _, row, (*expected, end) = TABLES[name]
    benchmark = benchmark_named(name)
    more = {"question_id": "0"} if name == "pope" else {}
    write_table(tmp_path / "x.parquet", [{**row, **more}])
    data = datasets.Dataset.from_parquet(str(tmp_path / "x.parquet"), cache_dir=str(tmp_path / "cache"))
    data = data.cast_column("image", datasets.Image())
    asked = []

    def load(*words, **more):
        asked.append((words, more))
        return data

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("hub", "someone/copy@main", data):
        question = open_questions(name, source)[0]
        assert facts(question) == tuple(expected) and question.pictures()[0].size == (5, 4)
    with pytest.raises(InputError, match="one split"):
        open_questions(name, datasets.DatasetDict(test=data))
    own = {"split": benchmark.split}
    assert asked[0] == ((benchmark.hub, benchmark.config), own)
    assert asked[1] == (("someone/copy", benchmark.config), {**own, "revision": "main"}) and len(asked) == 2


def test_the_hub_needs_its_package_and_a_name(monkeypatch):
    with pytest.raises(InputError, match="gqa on the hub"):
        open_questions("gqa", "hub")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="without the package datasets"):
        open_questions("pope", "hub")


FAULTS = {  # benchmark, file, what to replace by what: the place and the fault in the message
    ("pope", "coco_pope_random.json", '"no"', '"maybe"'): ("coco_pope_random.json:2", "'label' is 'maybe'"),
    ("pope", "coco_pope_random.json", '"text": "Is there a cat in the image?"', '"q": ""'): (
        ":2",
        "'question' or 'text'",
    ),
    ("pope", "coco_pope_random.json", '"question_id": 2', '"question_id": 1'): (":2", "the id 'random-1'"),
    ("pope", "coco_pope_random.json", "}\n{", "}\n{{"): ("coco_pope_random.json:2", "not JSON"),
    ("pope", "coco_pope_random.json", "000001.jpg", "000002.jpg"): ("random.json:1", "1 picture missing"),
    ("pope", "coco_pope_random.json", "COCO_val", "../COCO_val"): ("", "leads out of"),
    ("mme", "color/0001.txt", "\tNo", " No"): ("0001.txt:2", "a tab"),
    ("mmvp", "Questions.csv", "(a) Open (b) Closed,(a)", "(a) Open,(a)"): (
        "Questions.csv:3",
        "options '(a) Open'",
    ),
    ("mmvp", "Questions.csv", ",(b)\n", "\n"): ("Questions.csv:2", "3 columns"),
    ("mmvp", "Questions.csv", "Closed,(b)", "Closed,(c)"): ("Questions.csv:2", "'Correct Answer' is '(c)'"),
    ("cvbench", "test_2d.jsonl", '"(B)"', '"(C)"'): ("test_2d.jsonl:1", "'answer' is '(C)'"),
    ("cvbench", "test_2d.jsonl", '["1", "2"]', '[["1"], 2]'): ("test_2d.jsonl:1", "'choices'"),
    ("whatsup", "controlled_images_dataset.json", "caption_options", "captions"): (
        "row 0",
        "caption_options",
    ),
    ("whatsup_words", "prompts/COCO_QA_one_obj_with_answer_four_options.jsonl", "Answer", "Say"): (
        "row 0",
        "Answer with",
    ),
    ("vqav2", "v2_mscoco_val2014_annotations.json", "42001", "42002"): ("questions[0]", "question 42001"),
    ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", "42001", '"x"'): ("questions[0]", "whole number"),
    ("textvqa", "TextVQA_0.5.1_val.json", '["stop"', '[["stop"]'): ("data[0]", "'answers'"),
    ("scienceqa", "problems.json", '"answer": 0', '"answer": 2'): ("problems.json, '2'", "answer 2 of 2"),
    ("scienceqa", "pid_splits.json", "test", "val"): ("pid_splits.json", "lacks 'test'"),
    ("vstar", "test_questions.jsonl", "(", "["): ("test_questions.jsonl:1", "no option"),
    ("gqa", "testdev_balanced_questions.json", "n1", "n2"): ("'201'", "1 picture missing"),
    ("chartqa", "test_human.json", "imgname", "file"): (
        "test_human.json:1",
        "no picture in 'image' or 'imgname'",
    ),
}


@pytest.mark.parametrize("name, file, old, new", FAULTS)
def test_a_fault_is_named_with_file_and_row(name, file, old, new, tmp_path):
    path = folder_of(name, tmp_path) / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError) as error:
        open_questions(name, tmp_path)
    place, fault = FAULTS[name, file, old, new]
    assert place in str(error.value) and fault in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_benchmark_is_refused(name, tmp_path):
    with pytest.raises(InputError, match=f"no file of the benchmark {name}"):
        open_questions(name, tmp_path)


def test_near_names_are_offered():
    with pytest.raises(InputError, match="perhaps mmvp"):
        benchmark_named("mmpv")
    with pytest.raises(InputError, match="prompt style of pope.*perhaps viral"):
        open_questions("pope", ".", style="virl")


@pytest.mark.parametrize(
    "name, file, answer",
    [
        ("pope", "coco_pope_random.json", '"label"'),
        ("cvbench", "test_2d.jsonl", '"answer"'),
        ("gqa", "", '"answer"'),
    ],
)
def test_questions_without_an_answer_are_asked(name, file, answer, tmp_path):
    path = folder_of(name, tmp_path) / (file or "testdev_balanced_questions.json")
    path.write_text(path.read_text(encoding="utf-8").replace(answer, '"hidden"'), encoding="utf-8")
    questions = open_questions(name, path)
    for rule in BENCHMARKS[name].rules.values():
        table = verdict_table(questions, ["yes"] * len(questions), rule)
        assert len(table) and table.verdict.isna().all() and (table.expected == "").all()


def test_links_and_another_folder_of_pictures(tmp_path):
    folder_of("pope", tmp_path / "data")
    (tmp_path / "data" / "val2014").rename(tmp_path / "coco")
    assert len(open_questions("pope", tmp_path / "data", images=tmp_path / "coco")) == 4
    (tmp_path / "data" / "val2014").symlink_to(tmp_path / "coco")
    with pytest.raises(InputError, match="by a link"):
        open_questions("pope", tmp_path / "data")
    assert len(open_questions("pope", tmp_path / "data", follow_links=True)) == 4


def test_a_folder_of_several_benchmarks(tmp_path):
    folder_of("pope", tmp_path / "pope")
    folder_of("gqa", tmp_path / "gqa")
    assert len(open_questions("pope", tmp_path)) == 4 and len(open_questions("gqa", tmp_path)) == 2


def test_pictures_of_tables_stay_on_the_disk(tmp_path):
    rows = [{"question": "How many?", "answer": "B", "category": "x", **LETTERED}] * 5
    write_table(tmp_path / "MMStar.tsv", rows)
    questions = open_questions("mmstar", tmp_path)
    assert all(isinstance(each, StoredPicture) for question in questions for each in question.images)
    (tmp_path / "MMStar.tsv").unlink()
    with pytest.raises(InputError, match="MMStar.tsv"):
        questions[4].pictures()


def test_all_rotations_of_mmbench_count(tmp_path):
    rows = [
        ("1", "One", "Two", "A"),
        ("1000001", "Two", "One", "B"),
        ("2", "One", "Two", "B"),
        ("1000002", "Two", "One", "A"),
    ]
    with open(tmp_path / "MMBench_DEV_EN.tsv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t")
        writer.writerow(["index", "question", "A", "B", "answer", "category", "image"])
        for number, (index, a, b, answer) in enumerate(rows):
            image = base64.b64encode(encoded("blue")).decode() if number == 0 else "1"
            writer.writerow([index, "How many?", a, b, answer, "count", image])
    questions = open_questions("mmbench", tmp_path)
    assert {question.pictures()[0].getpixel((0, 0)) for question in questions} == {(0, 0, 255)}
    benchmark = BENCHMARKS["mmbench"]
    table = verdict_table(questions, ["A", "One", "B", "B"], benchmark.rules["official"])
    assert benchmark.aggregate(table) == {"circular": 0.5, "single": 0.75, "count": 0.5}
    always = verdict_table(questions, ["A"] * 4, benchmark.rules["official"])
    assert benchmark.aggregate(always)["circular"] == 0 and benchmark.aggregate(always)["single"] == 0.5


def scores_of(name: str, folder: Path, answers: list[str], rule: str) -> dict[str, float]:
    benchmark = benchmark_named(name)
    questions = open_questions(name, folder_of(name, folder))
    return benchmark.aggregate(verdict_table(questions, answers, benchmark.rules[rule], benchmark.details))


def test_a_model_that_always_says_yes_does_not_look_balanced(tmp_path):
    scores = scores_of("pope", tmp_path, ["Yes"] * 4, "official")
    assert (
        scores["all yes"] == 1 and scores["all accuracy"] == 0.5 and scores["mean F1"] == pytest.approx(2 / 3)
    )


def test_pope_by_hand(tmp_path):
    # popular: a hit and a false alarm, F1 2/3; random: a miss and a right no, F1 0; together 2 * 1 / (2 + 2)
    scores = scores_of("pope", tmp_path, ["Yes", "Yes.", "no", "No, there is none."], "strict")
    assert scores["mean F1"] == pytest.approx(1 / 3) and scores["all F1"] == pytest.approx(1 / 2)
    assert scores["popular precision"] == 0.5 and scores["random recall"] == 0 and scores["all yes"] == 0.5


def test_an_unparsed_answer_is_missing_and_never_zero(tmp_path):
    scores = scores_of("pope", tmp_path, ["Yes", "", "I see nothing", "no"], "strict")
    assert scores["all accuracy"] == 1 and scores["all yes"] == 0.5


def test_mme_by_hand(tmp_path):
    # artwork has one question, right: 100 + 100; color one of two: 50 + 0
    scores = scores_of("mme", tmp_path, ["no", "Yes", "Yes"], "official")
    assert scores["artwork"] == 200 and scores["color"] == 50 and scores["perception"] == 250
    assert pd.isna(scores["cognition"])


def test_mmvp_by_hand(tmp_path):
    assert scores_of("mmvp", tmp_path, ["(b)", "Open"], "cambrian")["pairs"] == 1
    assert scores_of("mmvp", tmp_path, ["(b)", "I cannot say"], "cambrian")["pairs"] == 0
    assert pd.isna(scores_of("mmvp", tmp_path, ["(b)", "I cannot say"], "strict")["pairs"])
    assert scores_of("mmvp", tmp_path, ["(a)", "I cannot say"], "strict")["pairs"] == 0


def test_only_2d_has_no_score_of_cv_bench(tmp_path):
    scores = scores_of("cvbench", tmp_path, ["B"], "official")
    assert scores["ADE20K"] == 1 and pd.isna(scores["CV-Bench"]) and pd.isna(scores["3D"])


def test_points_of_ocrbench(tmp_path):
    assert scores_of("ocrbench", tmp_path, ["It says stop"], "official")["points"] == 1
