"Records: every rule with its place, lazy reading, and images that mean harm."

import json
import multiprocessing
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from aligned_mllm.core import InputError
from aligned_mllm.data.forms import parse_record, record_to_json
from aligned_mllm.data.images import open_image, to_rgb
from aligned_mllm.data.json_spans import ArrayWindow, array_spans
from aligned_mllm.data.record import Record, Turn
from aligned_mllm.data.records import Records, scan_file, write_records


def sample(identity="7", image="a.png", question="<image>\nhow many circles", answer="two", **more):
    raw = {
        "id": identity,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        **more,
    }
    return raw if image is None else {**raw, "image": image}


def turns(*pairs):
    return [{"from": speaker, "value": value} for speaker, value in pairs]


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 6), "teal").save(tmp_path / name)
    return tmp_path


def write_lines(path, *raws):
    path.write_text(
        "".join(
            (raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False)) + "\n" for raw in raws
        ),
        encoding="utf-8",
    )
    return path


def message(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    return str(caught.value)


BROKEN = {
    "no object": ("just words", "'just words'"),
    "empty id": (sample(" "), "\"id\" is ' '"),
    "true as id": (sample(True), '"id" is True'),
    "number as image": (sample(image=7), "\"image\" is '7'"),
    "empty image": (sample(image=""), "\"image\" is ''"),
    "empty name in a list": (sample(image=["a.png", ""]), '"image" is'),
    "zero byte in a name": (sample(image="a\0.png"), '"image" is'),
    "no conversation": ({"id": "7"}, "no 'conversations' among ['id']"),
    "empty conversation": ({"id": "7", "conversations": []}, "\"conversations\" is '[]'"),
    "gpt first": (
        {"id": "7", "conversations": turns(("gpt", "two"), ("human", "how"))},
        "turn 1 is from 'gpt'",
    ),
    "human twice": (
        {"id": "7", "conversations": turns(("human", "how"), ("human", "how"))},
        "turn 2 is from 'human'",
    ),
    "system": ({"id": "7", "conversations": turns(("system", "be kind"))}, "turn 1 is from 'system'"),
    "turn without speaker": ({"id": "7", "conversations": [{"value": "how"}]}, "turn 1 is from 'None'"),
    "turn that is not an object": ({"id": "7", "conversations": ["how", "two"]}, "turn 1 is from 'how'"),
    "no answer": (
        {"id": "7", "conversations": turns(("human", "a"), ("gpt", "b"), ("human", "c"))},
        "turn 3 has no answer",
    ),
    "empty question": (sample(image=None, question="  "), "turn 1 says '  '"),
    "empty answer": (sample(answer=""), "turn 2 says ''"),
    "number as answer": (sample(answer=2), "turn 2 says '2'"),
    "half a surrogate pair": (sample(answer="\ud800"), "turn 2 says"),
    "placeholder in an answer": (sample(answer="see <image>"), "turn 2, an answer, contains <image>"),
    "placeholder without image": (sample(image=None), "1 placeholders <image> for 0 images"),
    "image without placeholder": (sample(question="how many"), "0 placeholders <image> for 1 images"),
    "two images, one placeholder": (sample(image=["a.png", "b.png"]), "1 placeholders <image> for 2 images"),
    "number as category": (sample(category=3), "\"category\" is '3' for 1 questions"),
    "too many categories": (sample(category=["a", "b"]), "for 1 questions"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_names_file_line_and_id(name):
    raw, clause = BROKEN[name]
    said = message(parse_record, raw, "train.jsonl:12")
    assert said.startswith("train.jsonl:12") and clause in said
    assert "Expected: " in said and "What to do: " in said
    if isinstance(raw, dict) and "id" in raw:
        assert f"id {raw['id']!r}" in said


def test_what_is_allowed():
    assert parse_record(sample(image=None, question="how")).images == ()
    assert parse_record({**sample(image=None, question="how"), "image": None}).images == ()
    assert parse_record(sample(33471)).id == "33471"
    record = parse_record(
        {
            "id": "x",
            "image": ["a.png", "b.png"],
            "conversations": turns(("human", "<image> or"), ("gpt", "1"), ("human", "<image>"), ("gpt", "2")),
        }
    )
    assert record.images == ("a.png", "b.png") and [turn.answer for turn in record.turns] == ["1", "2"]
    assert parse_record(sample(image=None, images=["a.png"])).images == ("a.png",)
    nameless = {key: value for key, value in sample().items() if key != "id"}
    assert parse_record(nameless, "data/train.jsonl:12").id == "train.jsonl:12"
    assert '"id" is None' in message(parse_record, nameless)  # no place either


@pytest.mark.parametrize("category", [None, "count", ["count", "where"], ["", "where"]])
def test_to_json_and_back(category):
    raw = {
        "id": "x",
        "image": "a.png",
        "conversations": turns(("human", "<image>\nhow"), ("gpt", "2"), ("human", "where"), ("gpt", "left")),
    }
    raw = raw if category is None else {**raw, "category": category}
    assert record_to_json(parse_record(raw)) == raw


SAMPLES = [
    sample("1"),
    sample("2", None, "wie groß ist die 東京-Bahn 🚲?", "größer\nals {das} [hier]", category="größe"),
    sample("1", ["a.png", "b.png"], '<image><image> "quoted" \\ \u2028 end', "ja"),  # the id again: allowed
]


@pytest.mark.parametrize(
    "style", [{}, {"indent": 1}, {"indent": 4, "ensure_ascii": True}, {"separators": (",", ":")}]
)
def test_array_and_lines_give_equal_records(folder, style):
    lines = Records(write_lines(folder / "a.jsonl", *SAMPLES))
    (folder / "a.json").write_text(
        "\ufeff \r\n" + json.dumps(SAMPLES, **{"ensure_ascii": False, **style}) + "\r\n",
        encoding="utf-8",
        newline="",
    )
    array = Records(folder / "a.json")
    assert list(lines) == list(array) == [parse_record(raw) for raw in SAMPLES]
    content = (folder / "a.json").read_bytes()
    for start, length, line, value in array_spans(folder / "a.json"):
        assert json.loads(content[start : start + length]) == value
        assert line == 1 + content[:start].count(b"\n")
        assert content[start : start + 1] == b"{" and content[start + length - 1 : start + length] == b"}"


def test_windows_that_end_anywhere(folder, monkeypatch):
    "However the file falls into windows, even in the middle of a letter or a number, the spans are the same."
    text = json.dumps([*SAMPLES, 12345, "wörter", 1.5e10, None, [], SAMPLES[1]], ensure_ascii=False, indent=2)
    (folder / "a.json").write_text(text, encoding="utf-8")
    expected = list(array_spans(folder / "a.json"))
    assert [value for *_, value in expected] == json.loads(text)
    for size in (1, 2, 7, 50):

        def grow(self, size=size):
            more = self.handle.read(size)
            if more:
                self.text = self.text[self.position :] + more
                self.position = 0
            return bool(more)

        monkeypatch.setattr(ArrayWindow, "grow", grow)
        assert list(array_spans(folder / "a.json")) == expected


def test_byte_order_mark_blank_lines_and_crlf(folder):
    body = "\r\n\r\n".join(json.dumps(raw, ensure_ascii=False) for raw in SAMPLES)
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + body.encode())
    records = Records(folder / "a.jsonl")
    assert [record.where.rsplit(":", 1)[1] for record in records] == ["1", "3", "5"]
    assert list(records) == [parse_record(raw) for raw in SAMPLES]


def test_sequence_behaviour(folder):
    records = Records(write_lines(folder / "a.jsonl", *SAMPLES))
    assert len(records) == 3 and records[-1] == records[2] and records[np.int64(1)] == records[1]
    assert records[::2] == [records[0], records[2]]
    assert records.left_out == [] and records.image_folder == folder and len(records.digest) == 16
    assert "3 records" in repr(records)
    with pytest.raises(IndexError):
        records[3]


BAD_ARRAYS = {
    "cut": ('[{"id": 1},\n {"id": ', ":2: not JSON"),
    "cut between": ('[{"id": 1},\n {"id": 2}\n', ":3: not JSON (the array has no end)"),
    "comma at the end": ('[{"id": 1},\n]', ":2: not JSON"),
    "comma missing": ('[{"id": 1}\n {"id": 2}]', ":2: not JSON"),
    "bracket in between": ('[{"id": 1}\n [2]]', ":2: not JSON"),
    "more behind": ('[{"id": 1}]\nx', ":2: not JSON"),
    "fault inside": ('[\n{"id": 1},\n{"id": 2,\n  "image" 7}]', ":4: not JSON (Expecting ':' delimiter)"),
    "too deep": ("[\n" + "[" * 100_000, ":2: not JSON"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
@pytest.mark.parametrize("broken", ["raise", "leave_out"])
def test_faults_in_arrays_name_the_line(folder, name, broken):
    text, clause = BAD_ARRAYS[name]
    (folder / "a.json").write_text(text)
    if broken == "raise" and name not in ("cut", "fault inside", "too deep"):
        assert clause in message(list, array_spans(folder / "a.json"))
    else:
        said = message(Records, folder / "a.json", broken="leave_out", check_images=False)
        assert f"a.json{clause}" in said


def test_not_utf8(folder):
    (folder / "a.json").write_bytes(b'[{"id": "\xff"}]')
    assert "a.json:1: not JSON ('utf-8' codec" in message(Records, folder / "a.json")
    (folder / "a.jsonl").write_bytes(json.dumps(SAMPLES[0]).encode() + b'\n{"id": "\xff"}\n')
    assert "a.jsonl:2: not JSON ('utf-8' codec" in message(Records, folder / "a.jsonl")


def test_broken_lines_raise_or_are_listed(folder):
    mixed = [
        SAMPLES[0],
        "{ no",
        sample("x", "none.png"),
        sample("y", "../up.png"),
        sample("z", answer=""),
        "7",
        "[" * 100_000,
        SAMPLES[1],
    ]
    path = write_lines(folder / "a.jsonl", *mixed)
    assert f"{path}:2: not JSON" in message(Records, path)
    records = Records(path, broken="leave_out")
    assert [record.id for record in records] == ["1", "2"]
    found = [(each.where, each.id, each.reason) for each in records.left_out]
    assert [(where.rsplit(":", 1)[1], identity) for where, identity, _ in found] == [
        ("2", ""),
        ("3", "x"),
        ("4", "y"),
        ("5", "z"),
        ("6", ""),
        ("7", ""),
    ]
    reasons = [reason for *_, reason in found]
    assert reasons[0].startswith("not JSON") and reasons[1].startswith("no image 'none.png'")
    assert (
        reasons[2].startswith("path '../up.png' leads out")
        and reasons[3] == "turn 2 says ''"
        and reasons[4] == "'7'"
    )


def test_images_are_looked_for_at_opening(folder):
    path = write_lines(folder / "a.jsonl", SAMPLES[0], sample("9", "b.jpg"))
    said = message(Records, path)
    assert said.startswith(f"{path}:2, id '9': no image 'b.jpg' in {folder}")
    assert len(Records(path, check_images=False)) == 2
    assert f"no folder {folder / 'images'}" in message(Records, path, folder / "images")


def test_paths_that_lead_out(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    Image.new("RGB", (2, 2)).save(outside)
    (folder / "link.png").symlink_to(outside)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "inside.png").symlink_to(folder / "a.png")
    for name in (f"../{outside.parent.name}/secret.png", str(outside), "link.png"):
        assert f"path {name!r} leads out of" in message(open_image, name, folder)
        path = write_lines(folder / "a.jsonl", sample("9", name))
        assert f"{path}:1, id '9': path {name!r} leads out of" in message(Records, path)
    assert "'loop.png'" in message(open_image, "loop.png", folder)
    assert "'.'" in message(open_image, ".", folder)
    assert "no image" in message(open_image, "a" * 300 + ".png", folder)
    assert open_image("inside.png", folder).size == (8, 6)


def test_files_without_records(folder):
    for text in ("", "\n\n", "[]", " [ ] "):
        (folder / "a.json").write_text(text)
        assert "a.json has no usable record" in message(Records, folder / "a.json")
    path = write_lines(folder / "a.jsonl", sample("9", "none.png"))
    assert "1 left out; the first: no image 'none.png'" in message(Records, path, broken="leave_out")
    assert "no file" in message(Records, folder / "none.jsonl")
    assert "no file" in message(Records, folder)
    assert "broken='skip'" in message(Records, path, broken="skip")


def test_a_file_that_changes_is_noticed(folder):
    path = write_lines(folder / "a.jsonl", *SAMPLES)
    records = Records(path)
    write_lines(path, *SAMPLES[::-1], SAMPLES[0])
    assert "a.jsonl has changed since it was opened" in message(records.__getitem__, 0)


def test_digest_follows_the_content(folder):
    first = Records(write_lines(folder / "a.jsonl", *SAMPLES)).digest
    assert Records(write_lines(folder / "b.jsonl", *SAMPLES)).digest == first
    assert Records(write_lines(folder / "c.jsonl", *SAMPLES[:2])).digest != first


def read_answers(records):
    return [record.turns[0].answer for record in records]


def test_pickle_processes_and_threads(folder):
    records = Records(write_lines(folder / "a.jsonl", *SAMPLES * 40))
    expected = read_answers(records)
    assert read_answers(pickle.loads(pickle.dumps(records))) == expected
    pool = multiprocessing.get_context("fork").Pool(2)
    assert pool.map(read_answers, [records, records]) == [expected, expected]
    pool.close()  # not terminated: an earlier test may have set this process's answer to SIGTERM
    pool.join()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda index: records[index].turns[0].answer, range(120))) == expected


def test_memory_of_a_long_file_stays_small(folder, capsys):
    lines = "".join(json.dumps(raw) + "\n" for raw in SAMPLES)
    count = 100_002
    (folder / "a.jsonl").write_text(lines * (count // 3))
    records = Records(folder / "a.jsonl", check_images=False)
    assert len(records) == count and records[count - 1] == parse_record(SAMPLES[2])
    assert len(pickle.dumps(records)) < 25 * count
    few = 9_999
    (folder / "b.json").write_text(
        "[" + lines.replace("\n", ",") * (few // 3 - 1) + lines.strip().replace("\n", ",") + "]"
    )
    tracemalloc.start()
    spans, _ = scan_file(folder / "b.json", folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(spans) == few and peak < 8 * 2**20  # windows of 1 MiB, not the file's objects
    assert "it/s" not in capsys.readouterr().out


def test_write_whole_or_not_at_all(folder):
    records = [parse_record(raw) for raw in SAMPLES]
    assert write_records(iter(records), folder / "new" / "a.jsonl") == 3
    assert list(Records(folder / "new" / "a.jsonl", folder)) == records
    before = (folder / "new" / "a.jsonl").read_bytes()
    wrong = Record("9", ("a.png",), (Turn("no placeholder", "yes"),))
    assert "record 4 for a.jsonl, id '9': 0 placeholders" in message(
        write_records, [*records, wrong], folder / "new" / "a.jsonl"
    )
    assert "no record to write" in message(write_records, [], folder / "new" / "a.jsonl")
    assert (folder / "new" / "a.jsonl").read_bytes() == before
    assert [path.name for path in (folder / "new").iterdir()] == ["a.jsonl"]


def test_bombs(folder, monkeypatch):
    Image.new("1", (600, 500)).save(folder / "wide.png")
    assert "image 'wide.png'" in (said := message(open_image, "wide.png", folder, pixel_limit=299_999))
    assert "600 x 500 pixels, the limit is 299999" in said
    assert open_image("wide.png", folder, pixel_limit=300_000).size == (600, 500)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # three times as many: Pillow's own error
    assert "DecompressionBombError" in message(open_image, "wide.png", folder)


@pytest.mark.filterwarnings("error")
def test_bomb_warning_as_error(folder, monkeypatch):
    Image.new("1", (600, 500)).save(folder / "wide.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    assert "image 'wide.png'" in message(open_image, "wide.png", folder)


def test_default_limit_is_where_pillow_warns(folder):
    assert open_image.__defaults__ == (Image.MAX_IMAGE_PIXELS,)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
def test_truncated_images(folder, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / f"a.{suffix}")
    assert open_image(f"a.{suffix}", folder).size == (64, 64)
    whole = (folder / f"a.{suffix}").read_bytes()
    (folder / f"half.{suffix}").write_bytes(whole[: len(whole) // 2])
    assert f"image 'half.{suffix}' in {folder}: " in message(open_image, f"half.{suffix}", folder)


def test_what_is_no_image(folder):
    (folder / "words.png").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    for name in ("words.png", "empty.png", "script.png"):
        assert f"image {name!r} in {folder}: not in a supported format" in message(
            open_image, name, folder
        )
    assert "no image 'none.png'" in message(open_image, "none.png", folder)


def test_orientation(folder):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, :20] = 255  # white on the left
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.fromarray(pixels).save(folder / "turned.png", exif=tag)
    image = open_image("turned.png", folder)
    assert (
        image.size == (20, 40)
        and image.getpixel((10, 5)) == (255,) * 3
        and image.getpixel((10, 35)) == (0,) * 3
    )


def test_every_mode_becomes_rgb(folder):
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    palette.save(folder / "palette.png", transparency=0)
    grey = np.array([[0, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(folder / "grey16.png")
    Image.fromarray(grey).save(folder / "grey16.tif")
    Image.new("LA", (1, 1), (0, 51)).save(folder / "faint.png")
    Image.new("CMYK", (1, 1), (0, 0, 0, 0)).save(folder / "print.tif")
    Image.new("L", (1, 1), 9).save(folder / "keyed.png", transparency=9)
    expected = {
        "palette.png": [(255, 255, 255), (0, 0, 255)],
        "grey16.png": [(0,) * 3, (128,) * 3, (255,) * 3],
        "grey16.tif": [(0,) * 3, (128,) * 3, (255,) * 3],
        "faint.png": [(204,) * 3],
        "print.tif": [(255,) * 3],
        "keyed.png": [(255,) * 3],
    }
    for name, colours in expected.items():
        image = open_image(name, folder)
        assert image.mode == "RGB" and [image.getpixel((x, 0)) for x in range(image.width)] == colours, name
    for mode, value in (("1", 1), ("YCbCr", (9, 9, 9)), ("HSV", (9, 9, 9)), ("I", 65535)):
        assert to_rgb(Image.new(mode, (1, 1), value)).mode == "RGB"


def test_numbers_without_a_range(folder):
    Image.fromarray(np.array([[0.0, 1.5]], dtype=np.float32)).save(folder / "depth.tif")
    Image.fromarray(np.array([[-1, 70_000]], dtype=np.int32)).save(folder / "map.tif")
    assert "pixels of mode F between 0.0 and 1.5" in message(open_image, "depth.tif", folder)
    assert "pixels of mode I between -1 and 70000" in message(open_image, "map.tif", folder)
