"Published forms of conversations: read, repaired by name or refused; pictures in tables; long samples."

import csv
import io
import json
import pickle
import shutil
import sys
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset, Features, List, Value
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader

from aligned_mllm.core import InputError, data_folder
from aligned_mllm.data.collate import Collator, Samples, left_out_of
from aligned_mllm.data.encode import IGNORED, encode
from aligned_mllm.data.forms import REPAIRS, parse_record, record_to_json
from aligned_mllm.data.open import open_records
from aligned_mllm.data.record import Record, Turn
from aligned_mllm.data.records import Records, write_records
from aligned_mllm.objectives.viral import Viral, teacher_targets
from aligned_mllm.training.config import configured
from aligned_mllm.training.run import report_parameters, trainer_of
from aligned_mllm.worlds.small_models import embedded_model


def llava(*said, **more):
    "A sample in LLaVA's form: human and gpt by the first letter."
    names = {"h": "human", "g": "gpt", "s": "system"}
    return {"conversations": [{"from": names[who], "value": text} for who, text in said], **more}


def chat(*said, **more):
    names = {"u": "user", "a": "assistant", "s": "system"}
    return {"messages": [{"role": names[who], "content": text} for who, text in said], **more}


def message(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def questions(record):
    return [turn.question for turn in record.turns]


IMAGE_PART = {"type": "image"}


def text_part(text):
    return {"type": "text", "text": text}


def test_chat_forms_are_read():
    expected = (Turn("<image>\nhow many", "two"), Turn("where", "left"))
    parts = [IMAGE_PART, text_part("how many")]
    same = [
        chat(("u", "<image>\nhow many"), ("a", "two"), ("u", "where"), ("a", "left"), images=["a.png"]),
        chat(("u", "how many"), ("a", "two"), ("u", "where"), ("a", "left"), image="a.png"),
        chat(("u", parts), ("a", [text_part("two")]), ("u", "where"), ("a", "left"), images=["a.png"]),
        chat(("u", [{**IMAGE_PART, "image": "a.png"}, text_part("how many")]), ("a", "two"), ("u", "where"))
        | {"completion": None},
        {"images": ["a.png"], "prompt": chat(("u", parts), ("a", "two"), ("u", "where"))["messages"]},
    ]
    same[3]["messages"] += chat(("a", "left"))["messages"]
    same[4]["completion"] = "left"
    for number, raw in enumerate(same):
        record = parse_record(raw, "a.jsonl:4")
        assert record.turns == expected and record.images == ("a.png",), number
        assert record.prompt_turns == (number == 4) and record.id == "a.jsonl:4"
        again = parse_record(record_to_json(record))
        assert again == record
    plain = parse_record({"id": 3, "prompt": "how many", "completion": "two"})
    assert plain == Record("3", (), (Turn("how many", "two"),))
    numbered = [{**IMAGE_PART, "index": 1}, {**IMAGE_PART, "index": 0}, text_part("which")]
    raw = chat(("u", numbered), ("a", "first"), id="x", images=["a.png", "b.png"])
    assert parse_record(raw).images == ("b.png", "a.png")
    several = parse_record(chat(("u", "compare"), ("a", "same"), id="x", images=["a.png", "b.png"]))
    assert questions(several) == ["<image>\n<image>\ncompare"]


def test_system_turns_survive_a_round_trip(tmp_path):
    raws = [
        chat(("s", "be brief"), ("u", "how"), ("a", "so"), id="1"),
        llava(("s", "be brief"), ("h", "how"), ("g", "so"), id="1"),
        llava(("h", "how"), ("g", "so"), id="1", system_prompt="be brief"),
    ]
    records = [parse_record(raw) for raw in raws]
    assert records[0].system == "be brief" and records[0] == records[1] == records[2]
    late = parse_record(chat(("u", [text_part("name it"), IMAGE_PART]), ("a", "a"), id="2", images=["a.png"]))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    write_records([late, records[0]], tmp_path / "a.jsonl")
    opened = Records(tmp_path / "a.jsonl")
    assert list(opened) == [late, records[0]] and opened.repairs == {} and opened.first_system == 1


REFUSED = {
    "video": (llava(("h", "<video>\nhow"), ("g", "so"), video="a.mp4"), "a sample about a video"),
    "number as text": (chat(("u", [text_part(7)]), ("a", "b")), "turn 1 has a part"),
    "unknown part": (
        chat(("u", [{"type": "image_url"}]), ("a", "b")),
        "turn 1 has a part \"{'type': 'image_url'}\"",
    ),
    "two users": (chat(("u", "a"), ("u", "b"), ("a", "c")), "turn 2 is from 'user'"),
    "two humans behind an answer": (
        llava(("g", "ready"), ("h", "a"), ("h", "b"), ("g", "c")),
        "turn 3 is from 'human'",
    ),
    "late system turn": (chat(("u", "a"), ("a", "b"), ("s", "c"), ("a", "d")), "turn 3 is from 'system'"),
    "placeholder in a system turn": (chat(("s", "<image>"), ("u", "a"), ("a", "b")), "the system text is"),
    "number as system text": (llava(("h", "a"), ("g", "b"), system_prompt=7), "the system text is '7'"),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "\"completion\" is 'None'"),
    "only a prompt": ({"prompt": chat(("u", "a"))["messages"], "completion": []}, "turn 1 has no answer"),
    "unknown number": (
        chat(("u", [{**IMAGE_PART, "index": 4}]), ("a", "b"), images=["a.png"]),
        "image parts with the numbers [4] for 1 images",
    ),
    "image never shown": (
        llava(("h", "a"), ("g", "b"), image="a.png"),
        "0 placeholders <image> for 1 images",
    ),
    "all of it a prompt": (llava(("h", "a"), ("g", "b"), prompt_turns=1), "a prompt of 1 turns, of 1"),
    "nothing left": (llava(("h", "a"), ("g", " ")), "turn 2 says ' '"),
    "no text": (chat(("u", "a"), ("a", None)), "turn 2 says 'None'"),
    "no message": ({"messages": [{"role": "user"}, 7]}, "turn 1 says 'None'"),
    "no words": ({"messages": "hello"}, "\"messages\" is 'hello'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_refused(name):
    raw, clause = REFUSED[name]
    said = message(parse_record, raw, "data/a.jsonl:3", [])
    assert said.startswith("data/a.jsonl:3") and clause in said


REPAIRED = {
    "image_not_first": (
        llava(("h", "how many\n<image>"), ("g", "two"), image="a.png"),
        ("<image>\nhow many", "two"),
    ),
    "starts_with_answer": (llava(("g", "ready"), ("h", "how"), ("g", "so")), ("how", "so")),
    "empty_turn": (
        llava(("h", "how"), ("g", "so"), ("h", "where"), ("g", ""), ("h", "x"), ("g", "y")),
        ("how", "so"),
    ),
    "no_last_answer": (chat(("u", "how"), ("a", "so"), ("u", "where")), ("how", "so")),
    "literal_image": (
        llava(("h", "close the <image> tag"), ("g", "</image>")),
        ("close the <image > tag", "</image>"),
    ),
}


def test_every_repair_is_named_counted_and_can_be_refused(tmp_path):
    assert set(REPAIRED) == set(REPAIRS)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for name, (raw, turn) in REPAIRED.items():
        needed = []
        assert [(each.question, each.answer) for each in parse_record(raw, "a:1", needed).turns] == [turn], (
            name
        )
        assert needed == [name]
        if name == "image_not_first":  # no fault: without repairs it stays
            assert questions(parse_record(raw, "a:1")) == ["how many\n<image>"]
        else:
            message(parse_record, raw, "a:1")
    raws = [
        llava(("h", "how"), ("g", "so")),
        *(raw for raw, _ in REPAIRED.values()),
        REPAIRED["empty_turn"][0],
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(raw) + "\n" for raw in raws))
    records = Records(path)
    assert records.repairs == {**dict.fromkeys(REPAIRS, 1), "empty_turn": 2} and len(records) == 7
    assert records.repairs.first["empty_turn"] == f"{path}:4" and records.repairs.rows()[0][0] == "empty_turn"
    assert [records[k].turns[0].question for k in (1, 5)] == ["<image>\nhow many", "close the <image > tag"]
    assert pickle.loads(pickle.dumps(records)).repairs.first == records.repairs.first
    strict = Records(path, broken="leave_out", repair=False)
    assert len(strict) == 2 and len(strict.left_out) == 5 and strict.repairs == {}


def test_several_repairs_of_one_sample():
    raw = llava(
        *[("g", "see <image>"), ("h", "<image> or\n<image>"), ("g", "the <image>"), ("h", "left <image>")],
        *[("g", "yes"), ("h", "why")],
        image=["a.png", "b.png", "c.png"],
        category=["which", "side", "reason"],
    )
    needed = []
    record = parse_record(raw, "a:1", needed)
    assert questions(record) == ["<image> or\n<image>", "<image>\nleft"]
    assert record.turns[0].answer == "the <image >" and record.turns[1].category == "side"
    assert needed == ["starts_with_answer", "literal_image", "no_last_answer", "image_not_first"]


def test_an_object_over_several_lines(tmp_path):
    raw = llava(("h", "how"), ("g", "so\n {deep}"), id="größe")
    path = tmp_path / "one.json"
    for text in (
        json.dumps(raw, indent=2),
        "\ufeff\n" + json.dumps(raw, indent=2, ensure_ascii=False) + "\n\n",
    ):
        path.write_text(text, encoding="utf-8")
        assert [record.id for record in Records(path)] == ["größe"]
    path.write_text(f"{json.dumps(raw, indent=1)}\n{json.dumps(raw, indent=3)}\n")
    assert [record.where.rsplit(":")[-1] for record in Records(path)] == ["1", "14"]
    path.write_text(json.dumps(raw, indent=2) + "\n{ no")
    lines = json.dumps(raw, indent=2).count("\n") + 2
    assert f"one.json:{lines}: not JSON" in message(Records, path, broken="leave_out")


def test_a_run_lists_what_it_repairs_and_leaves_out(small_data, tmp_path, capsys):
    raws = [record_to_json(record) for record in Records(small_data / "train.jsonl")[:8]]
    first = raws[0]["conversations"][0]
    first["value"] = f"{first['value'].removeprefix('<image>').strip()}\n<image>"
    raws[1]["conversations"].insert(0, {"from": "gpt", "value": "red"})
    raws[2]["conversations"][0]["value"] += " circle" * 60
    del raws[3]["conversations"]

    shutil.copytree(small_data / "images", tmp_path / "data" / "images")
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(raw) + "\n" for raw in raws))
    settings = {"broken_records": "leave_out", "too_long": "leave_out", "max_length": 70, "max_steps": 4}
    settings |= {"evaluation_records": "", "logging_steps": 1, "per_device_train_batch_size": 2}
    config = configured(
        "scenes_plain", tmp_path / "data", tmp_path / "run", {**settings, "disable_tqdm": True}
    )
    trainer = trainer_of(config)
    report_parameters(trainer)
    trainer.train()
    listed = {}
    for name in ("left_out", "repairs", "too_long"):
        rows = list(csv.reader((tmp_path / "run" / f"{name}.csv").read_text(encoding="utf-8").splitlines()))
        listed[name] = [[value.rsplit("/", 1)[-1] for value in row] for row in rows[1:]]
    assert listed["left_out"][0][:2] == ["train.jsonl:4", raws[3]["id"]]
    assert sorted(listed["repairs"]) == [
        ["image_not_first", "1", "train.jsonl:1"],
        ["starts_with_answer", "1", "train.jsonl:2"],
    ]
    assert [row[:2] for row in listed["too_long"]] == [["train.jsonl:3", raws[2]["id"]]]
    assert "repaired: 1 record, starts_with_answer, the first at" in capsys.readouterr().out
    strict = configured("scenes_plain", tmp_path / "data", tmp_path / "other", {"repair_records": False})
    assert "turn 1 is from 'gpt'" in message(trainer_of, strict)
    assert "too_long 'cut'" in message(configured, "scenes_plain", "x", "y", {"too_long": "cut"})


def encoded_file(color, kind="PNG"):
    content = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(content, kind)
    return content.getvalue()


def table():
    "Five rows: pictures as bytes, decoded, in parts, none, and several."
    said = {"messages": chat(("u", "how"), ("a", "so"))["messages"]}
    red, blue = encoded_file("red"), encoded_file("blue", "JPEG")
    inside = [{**IMAGE_PART, "image": Image.new("LA", (2, 3), (0, 0))}, text_part("how")]
    return [
        {"id": "bytes", "images": [{"bytes": red, "path": "red.png"}], **said, "source": "unused"},
        {
            "id": "image",
            "image": Image.new("RGB", (8, 6), "teal"),
            **llava(("h", "how\n<image>"), ("g", "so")),
        },
        chat(("u", inside), ("a", "so")),
        {"id": "text", "image": None, "images": None, **said},
        {"id": "two", "images": [blue, {"bytes": red, "path": None}], **said},
    ]


def corners(records):
    return [[records.image(name).getpixel((0, 0)) for name in record.images] for record in records]


COLOURS = [[(255, 0, 0)], [(0, 128, 128)], [(255, 255, 255)], [], [(0, 0, 254), (255, 0, 0)]]


PART = {"type": Value("string"), "text": Value("string"), "image": datasets.Image()}
FEATURES = Features(
    {
        "id": Value("string"),
        "image": datasets.Image(),
        "images": List(datasets.Image()),
        "messages": List({"role": Value("string"), "content": List(PART)}),
        "conversations": List({"from": Value("string"), "value": Value("string")}),
        "source": Value("string"),
    }
)


def stored(rows):
    "The rows as a data set of Hugging Face: texts in parts, every picture encoded."

    def in_parts(message):
        content = message["content"]
        content = [text_part(content)] if isinstance(content, str) else content
        return {**message, "content": [{name: part.get(name) for name in PART} for part in content]}

    rows = [{name: row.get(name) for name in FEATURES} for row in rows]
    for row in rows:
        row["messages"] = [in_parts(message) for message in row["messages"] or []] or None
    return Dataset.from_list(rows, features=FEATURES)


def test_tables_with_pictures_inside(tmp_path):
    records = open_records(table())
    assert corners(records) == COLOURS and open_records(records) is records
    assert [record.id for record in records] == ["bytes", "image", "row 2", "text", "two"]
    assert questions(records[4]) == ["<image>\n<image>\nhow"] and records[-1].where == "row 4"
    assert records.repairs == {"image_not_first": 1} and records.image_folder is None
    assert corners(pickle.loads(pickle.dumps(records))) == COLOURS
    names = [name for record in records for name in record.images]
    assert len(set(names)) == 5 and open_records(table()).digest == records.digest
    assert open_records(table()[:4]).digest != records.digest
    old = {"conversations": {"from": ["human", "gpt"], "value": ["how", "so"]}}
    assert open_records([old])[0].turns == (Turn("how", "so"),)
    old["conversations"]["value"].append("lost")
    assert message(open_records, [old]).startswith("row 0: \"conversations\" is \"{'from'")
    Image.new("RGB", (8, 6), "gold").save(tmp_path / "gold.png")
    files = [
        {**table()[3], "image": "gold.png"},
        {**table()[3], "image": {"bytes": None, "path": "gold.png"}},
    ]
    assert corners(open_records(files, tmp_path)) == [[(255, 215, 0)]] * 2
    assert open_records(files, tmp_path).image_folder == tmp_path
    said = message(open_records, files)
    assert said.startswith("row 0, id 'text': image 'gold.png' is a file, and no folder")
    assert "leads out of" in message(open_records, [{**table()[3], "image": "../x.png"}], tmp_path)


def test_a_data_set_of_hugging_face(tmp_path, monkeypatch):
    source = stored(table())
    monkeypatch.setattr(datasets.Image, "decode_example", None)  # a picture that it decoded would fail
    records = open_records(source)
    plain = open_records(table())
    assert [record.turns for record in records] == [record.turns for record in plain]
    assert corners(records) == COLOURS and records[2].where == "row 2" and records.image_folder is None
    assert corners(pickle.loads(pickle.dumps(records))) == COLOURS
    assert open_records(source.with_format("torch")).digest == records.digest
    turned = open_records(source.select([4, 3, 2, 1, 0]))
    assert corners(turned) == COLOURS[::-1] and turned.digest != records.digest
    (tmp_path / "disk").mkdir()
    source.save_to_disk(tmp_path / "disk")
    assert open_records(datasets.load_from_disk(tmp_path / "disk")).digest == records.digest
    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.png")
    opened = Dataset.from_list([chat(("u", "how"), ("a", "so"), image=Image.open(tmp_path / "red.png"))])
    assert corners(open_records(opened, tmp_path)) == COLOURS[:1]  # `datasets` keeps it by its path alone
    for wrong, part in (
        (opened, "no folder is given"),
        (tmp_path / "disk", "datasets.load_from_disk("),
        (source.with_transform(lambda batch: batch), "a transform"),
        (source.to_iterable_dataset(), "without streaming"),
        (datasets.DatasetDict(train=source), "source['train']"),
        (Dataset.from_list([{"text": "how so"}]), "the data set has the columns ['text']"),
    ):
        assert part in message(open_records, wrong)


def test_values_of_several_kinds_are_stored_as_json(tmp_path):
    "A content that is a text here and parts there; `datasets` stores such values as JSON."
    asked = [IMAGE_PART, text_part("how")]
    rows = [chat(("s", "be brief"), ("u", asked), ("a", 'so "far"'), image="red.png")]
    rows += [chat(("u", "how many"), ("a", answer), image="red.png") for answer in ("2", "true", "2 or 3")]
    Image.new("RGB", (8, 6), "red").save(tmp_path / "red.png")
    lines = tmp_path / "chat.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    source = datasets.load_dataset(
        "json", data_files=str(lines), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert "Json" in str(source.features)
    source.to_parquet(tmp_path / "train.parquet")
    expected = [(record.system, record.turns) for record in Records(lines)]
    for found in (
        open_records(source, tmp_path),
        open_records(Dataset.from_list(rows, on_mixed_types="use_json"), tmp_path),
        open_records(tmp_path / "train.parquet"),
    ):
        assert [(record.system, record.turns) for record in found] == expected
        assert corners(found) == COLOURS[:1] * 4


def test_broken_rows_have_numbers():
    rows = table()
    rows[1]["image"] = 7
    rows[3]["messages"] = []
    rows[4]["images"][1] = {"bytes": b"", "path": None}
    assert message(open_records, rows).startswith("row 1, image 1 is int")
    records = open_records(rows, broken="leave_out")
    assert [record.id for record in records] == ["bytes", "row 2"] and corners(records) == COLOURS[:3:2]
    assert [item.where for item in records.left_out] == ["row 1", "row 3", "row 4"]
    assert "row 4, image 2 is ['bytes', 'path'] without content" in records.left_out[2].reason
    assert "the table has no usable record (1 left out" in message(
        open_records, rows[3:4], broken="leave_out"
    )
    for content in (encoded_file("red")[:45], b"no picture"):
        cut = open_records([{**table()[0], "images": [content]}])
        assert message(cut.image, cut[0].images[0]).startswith("row 0, image 1: ")


def test_parquet_is_read_group_by_group(tmp_path, monkeypatch):
    for name, rows in (("train-3", table()[:3]), ("train-5", table()), ("test-1", table()[:1])):
        parquet.write_table(stored(rows).data.table, tmp_path / f"{name}.parquet", row_group_size=2)
    read = []

    class Counting(parquet.ParquetFile):
        def read_row_group(self, group, columns):
            assert "source" not in columns
            read.append(group)
            return super().read_row_group(group, columns)

    monkeypatch.setattr(parquet, "ParquetFile", Counting)
    records = open_records(tmp_path)
    assert corners(records) == [*COLOURS[:3], *COLOURS] and records.image_folder is None
    assert records[2].where == f"{tmp_path}/train-3.parquet:row 2"
    assert (
        records[7].where == f"{tmp_path}/train-5.parquet:row 4" and records[5].id == "train-5.parquet:row 2"
    )
    assert pickle.loads(pickle.dumps(records))[7] == records[7]
    alone = open_records(tmp_path / "train-5.parquet")
    assert alone.digest == open_records(stored(table())).digest
    read.clear()
    corners(records)
    assert len(read) == 5  # each group once
    (tmp_path / "train-3.parquet").write_bytes(b"PAR1 and more")
    assert "has changed since it was opened" in message(records.__getitem__, 0)
    assert "train-3.parquet: Parquet magic bytes not found" in message(open_records, tmp_path)
    texts = Dataset.from_list([{"text": "how so"}])
    texts.to_parquet(tmp_path / "texts.parquet")
    assert "texts.parquet has the columns ['text']" in message(open_records, tmp_path / "texts.parquet")
    assert "neither train.jsonl nor" in message(open_records, tmp_path.parent / tmp_path.name / "..")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    said = message(open_records, tmp_path / "train-5.parquet")
    assert "without the package pyarrow" in said and "the extra [data]" in said


@pytest.fixture(scope="module")
def processor():
    return embedded_model(data_folder() / "parts")[1]


def test_pictures_inside_reach_a_batch(processor):
    samples = Samples(open_records(table()), processor)
    loader = DataLoader(samples, batch_size=5, collate_fn=Collator(0), num_workers=1)
    (batch,) = loader
    assert len(batch["pixel_values"]) == 5 and batch["image_names"] == [
        name for record in samples.records for name in record.images
    ]


def test_system_and_prompt_in_the_encoding(processor, monkeypatch):
    said = (Turn("count circle", "2"), Turn("where circle", "left"))
    record = Record("7", (), said, "a:1", "where red", 1)
    learnt = []
    for each in (record, Record("7", (), said, "a:1")):
        sample = encode(each, [], processor)
        text = processor.tokenizer.decode(sample["input_ids"])
        assert text.startswith("<bos> where red count circle") == bool(each.system)
        learnt.append(processor.tokenizer.decode(sample["labels"][sample["labels"] != IGNORED]))
    assert learnt == ["left <eos>", "2 <eos> left <eos>"]
    body = "{% for part in message['content'] %} {{ part['text'] }}{% endfor %}"
    templates = {
        "leaves it out": "{% for message in messages if message['role'] != 'system' %}"
        + body
        + "{% endfor %}",
        "raises no system": "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ raise_exception('no system') }}{% endif %}" + body + "{% endfor %}",
        "renders it as an answer": "{% for message in messages %}"
        "{{ 'USER' if message['role'] == 'user' else 'ASSISTANT' }}" + body + "{% endfor %}",
    }
    for fault, template in templates.items():
        monkeypatch.setattr(processor, "chat_template", template)
        found = message(encode, record, [], processor)
        assert found.startswith(f"record '7' a:1 has a system turn, and the chat template {fault}")


def test_disk_caches_need_files():
    context = SimpleNamespace(records=open_records(table()), teacher=lambda name, pixels: None)
    settings = Viral(teacher="dense", layers=[1], teacher_cache="cache")
    assert "pictures inside a data set" in message(teacher_targets, settings, context)


def test_samples_that_are_too_long_are_replaced(processor):
    long = {"conversations": llava(("h", "circle " * 50), ("g", "red"))["conversations"]}
    short = llava(("h", "circle"), ("g", "red"))
    records = open_records([short, long, long, short, long])
    samples = Samples(records, processor, max_length=40, too_long="leave_out")
    used = [(int(samples[k]["asked"]), int(samples[k]["index"])) for k in range(5)]
    assert used == [(0, 0), (1, 3), (2, 3), (3, 3), (4, 0)]
    batch = Collator(0)([samples[k] for k in (4, 0, 1)])
    assert left_out_of([batch], 5) == {4, 1, 2} and left_out_of([], 5) == set()
    again = Samples(records, processor, max_length=40, too_long="leave_out", cache_mib=0)
    assert [int(again[k]["index"]) for k in (4, 2, 1)] == [0, 3, 3]
    assert "max_length 40 would cut" in message(Samples(records, processor, max_length=40).__getitem__, 1)
    only = Samples(records, processor, max_length=2, too_long="leave_out")
    assert "no sample fits: record" in message(only.__getitem__, 1)
