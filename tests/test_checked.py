"""Faults that opening the records cannot see are found before the first step, or passed over later; leaving
samples out does not orphan a run. Control tokens in texts are text. Links are followed where this is set."""

import functools
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from tiny_models import tiny
from torch.utils.data import DataLoader

from aligned_mllm.core import InputError, counted, data_folder, load_json, path_inside
from aligned_mllm.data.check import Check, check_samples
from aligned_mllm.data.collate import Collator, Samples
from aligned_mllm.data.encode import IGNORED, control_tokens, encode, require_shape
from aligned_mllm.data.open import open_records
from aligned_mllm.data.record import IMAGE, BrokenSample, Record, Turn
from aligned_mllm.data.records import Records, record_to_json
from aligned_mllm.training.checked import prepare_samples
from aligned_mllm.training.config import configured
from aligned_mllm.training.run import run
from aligned_mllm.training.trainer import Filled, ResumableTrainer
from aligned_mllm.worlds.small_models import embedded_model

FAMILIES = ("llava", "llava_padded", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl", "idefics3")
FAMILIES += ("paligemma", "gemma3")


def message(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request):
    return tiny(request.param)[1]


def asked(question: str, answer: str, system: str = "") -> Record:
    return Record("7", ("a.png",), (Turn(f"<image>\n{question}", answer), Turn("why", "so")), "a:1", system)


def test_control_tokens_in_texts_are_text(processor):
    "Each in a question and in an answer: as many control tokens as without it, and the word is learnt."
    tokenizer = processor.tokenizer
    image = Image.new("RGB", (50, 40))
    named = {tokenizer.eos_token, tokenizer.pad_token, processor.image_token} | {tokenizer.bos_token}
    templated = {token for token in tokenizer.get_added_vocab() if token in processor.chat_template}
    for token in (named | {token for token in templated if not token.isspace()}) - {None}:
        ids = set(tokenizer.convert_tokens_to_ids([token]))
        plain = encode(asked("dog cat", "dog cat"), [image], processor)
        question = "dog cat" if token == IMAGE else f"dog {token} cat"  # else a placeholder of an image
        placed = encode(asked(question, "dog cat"), [image], processor)
        learnt = encode(asked("dog cat", f"dog {token} cat"), [image], processor)
        for sample in (placed, learnt):
            counts = [sum(id in ids for id in each["input_ids"].tolist()) for each in (sample, plain)]
            assert counts[0] == counts[1], token
        labels = learnt["labels"][learnt["labels"] != IGNORED]
        assert f"dog {token[:-1]} {token[-1]} cat" in tokenizer.decode(labels, skip_special_tokens=False)
        assert (placed["labels"] != IGNORED).sum() == (plain["labels"] != IGNORED).sum()


def test_tokens_of_the_data_stay(processor):
    "A special token that nobody writes around a text, such as a box in an answer."
    tokenizer = processor.tokenizer
    if not {"<box>"} & set(tokenizer.get_added_vocab()):
        tokenizer.add_tokens(["<box>"], special_tokens=True)
    sample = encode(asked("where", "<box>1 2"), [Image.new("RGB", (50, 40))], processor)
    assert tokenizer.convert_tokens_to_ids("<box>") in sample["labels"]
    assert not control_tokens(processor).search("a < b, c > d and <b>bold</b> [INST")


def test_no_sample_has_more_tokens_than_estimated(processor):
    for sizes in ([(50, 40)], [(40, 200)], [(8, 796)], [(300, 60), (60, 60)]):
        images = [Image.new("RGB", (width, height)) for height, width in sizes]
        names = tuple(map(str, range(len(images))))
        question = "<image>\n" * len(images) + "what is left </s> of two red towers"
        record = Record("7", names, (Turn(question, "one blue circle " * 3),), "a:1")
        check = Check(Samples([record], processor))
        real = len(encode(record, images, processor)["input_ids"])
        assert real <= check.most_tokens(record, sizes)
        assert check.most_tokens(record, sizes) <= real + 100 or len(sizes) > 1


def test_shapes_are_limited(processor):
    pads = type(processor.image_processor).__name__.startswith(("LlavaImage", "LlavaOnevision"))
    require_shape(3, 600, processor, "image 1")
    for size in ((3, 601), (20000, 3)):
        assert "pixels" in message(require_shape, *size, processor, "image 1")
    if pads:
        assert "padded to a square 89491600" in message(require_shape, 9000, 9460, processor, "image 1")
    else:
        require_shape(9000, 9460, processor, "image 1")
    with pytest.raises(BrokenSample, match="record '7' a:1: image 1 has 2000 x 4 pixels"):
        encode(asked("dog", "cat"), [Image.new("RGB", (2000, 4))], processor)


def test_a_shape_of_which_no_tile_shows_a_patch_is_found():
    _, processor = tiny("llava_next")
    pictures = {"wide": Image.new("RGB", (796, 4)), "tall": Image.new("RGB", (4, 796))}
    turns = [{"role": "user", "content": "which"}, {"role": "assistant", "content": "red"}]
    rows = [{"id": id, "images": [each], "messages": turns} for id, each in pictures.items()]
    records = open_records(rows)
    _, findings = check_samples(Samples(records, processor), range(2))
    assert [each.kind for each in findings] == ["broken"] and "too narrow for a patch" in findings[0].reason
    first = findings[0]
    assert first.id in message(encode, records[first.index], [pictures[first.id]], processor)


@pytest.fixture()
def data(small_data, tmp_path) -> Path:
    "Ten samples, each with a picture of its own; `damage` breaks some."
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    lines = []
    for number, record in enumerate(Records(small_data / "train.jsonl")[:10]):
        raw = record_to_json(record)
        shutil.copy(small_data / record.images[0], folder / "images" / f"{number}.png")
        lines.append(json.dumps({**raw, "id": f"id{number}", "image": f"images/{number}.png"}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def truncate_picture(data: Path) -> None:
    picture = data / "images" / "3.png"
    picture.write_bytes(picture.read_bytes()[:80])


def remove_picture(data: Path) -> None:
    (data / "images" / "3.png").unlink()


def stretch_picture(data: Path) -> None:
    Image.new("RGB", (20000, 3)).save(data / "images" / "3.png")


def change_line(data: Path, old: str, new: str) -> None:
    lines = (data / "train.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace(old, new)
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")


def lengthen_question(data: Path) -> None:
    change_line(data, "<image>\\n", "<image>\\n" + "circle " * 60)


def write_token(data: Path) -> None:
    change_line(data, "<image>\\n", "<image>\\nred <eos> ")


FAULTS = {  # a damage: what the message has, the setting that leaves it out, its list
    truncate_picture: ("image file is truncated", "broken_records", "left_out.csv"),
    remove_picture: ("no image 'images/3.png'", "broken_records", "left_out.csv"),
    stretch_picture: ("image 1 has 20000 x 3 pixels", "broken_records", "left_out.csv"),
    lengthen_question: ("max_length 70 would cut", "too_long", "too_long.csv"),
    write_token: ("the control token <eos>", "broken_records", "left_out.csv"),
}
SETTINGS = {"max_length": 70, "use_cpu": True, "disable_tqdm": True}


@functools.cache
def embedded():
    "The processor of the embedded model."
    return embedded_model(data_folder() / "parts")[1]


def prepared(data: Path, resumed: bool = False, **settings) -> Samples:
    "The samples of a run on the data, checked."
    config = configured("", data, data / "run", {**SETTINGS, **settings})
    choices = {"repair": config.repair_records, "check_images": False}
    records = open_records(data, broken=config.broken_records, **choices)
    rules = {"broken": config.broken_records, "too_long": config.too_long}
    samples = Samples(records, embedded(), max_length=config.max_length, **rules)
    prepare_samples(samples, config, resumed)
    return samples


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_a_fault_is_refused_or_left_out_at_the_start_and_passed_over_later(data, damage):
    fault, setting, listed = FAULTS[damage]
    strict = {"repair_records": damage is not write_token}
    assert [record.id for record in prepared(data).records] == [f"id{number}" for number in range(10)]
    damage(data)
    for resumed in (False, True):
        said = message(prepared, data, resumed=resumed, **strict)
        assert said.startswith(f"{data}/train.jsonl:4, id 'id3': ") and fault in said
        assert f"{setting}=leave_out" in said
    if damage is not write_token:  # encoded as plain text, even when it is met later
        later = prepared(data, resumed=True, **{setting: "leave_out"})
        assert [int(later[index]["index"]) for index in (2, 3, 4)] == [2, 4, 4] and len(later) == 10
        assert [int(later[index]["asked"]) for index in (2, 3, 4)] == [2, 3, 4]
    samples = prepared(data, **{setting: "leave_out"}, **strict)
    assert [record.id for record in samples.records] == [f"id{k}" for k in range(10) if k != 3]
    assert samples.records.digest == Records(data / "train.jsonl", check_images=False).digest
    rows = load_json(data / "run" / "samples.json")["left_out"]
    assert [row["id"] for row in rows] == ["id3"] and fault in rows[0]["reason"]
    if listed == "too_long.csv":
        assert pd.read_csv(data / "run" / listed).id.tolist() == ["id3"]
    else:
        assert [row.id for row in samples.records.left_out] == ["id3"]


def test_answers_that_are_cut_are_counted_and_listed(data, capsys):
    whole = prepared(data, max_length=500)
    ends = [int((whole[index]["labels"] != IGNORED).nonzero().max()) + 1 for index in range(len(whole))]
    limit = max(ends) - 1
    samples = prepared(data, max_length=limit)
    cut = [record.id for record, end in zip(samples.records, ends) if end > limit]
    assert 0 < len(cut) and len(samples) == 10
    assert f"cuts answers of {counted(len(cut), 'sample')}:" in capsys.readouterr().out
    assert pd.read_csv(data / "run" / "cut_answers.csv").id.tolist() == cut
    prepared(data, max_length=limit)  # from the findings that were kept
    assert f"cuts answers of {counted(len(cut), 'sample')}:" in capsys.readouterr().out


def test_several_faults_are_counted_and_repairs_too(data):
    for damage in FAULTS:
        damage(data)
    remove = data / "images" / "8.png"
    remove.unlink()
    assert "id 'id3': no image 'images/3.png'" not in (said := message(prepared, data))
    assert "id 'id3': image 1 has 20000 x 3 pixels" in said and "; 2 of 10 samples have such a fault" in said
    samples = prepared(data, broken_records="leave_out")
    assert samples.records.repairs == {"literal_token": 1} and len(samples) == 8
    short = prepared(data, broken_records="leave_out", check_samples=False)
    assert [record.id for record in short.records] == [f"id{number}" for number in range(10) if number != 8]
    shutil.rmtree(data / "images")
    assert "10 of 10 samples" in message(prepared, data, broken_records="leave_out")


def test_samples_left_out_at_the_first_step_stay_out(data):
    "Also when the picture is repaired and the setting is taken back; a new run has them again."
    good = (data / "images" / "3.png").read_bytes()
    truncate_picture(data)
    first = prepared(data, broken_records="leave_out")
    (data / "images" / "3.png").write_bytes(good)
    again = prepared(data, resumed=True)
    assert [each.id for each in again.records] == [each.id for each in first.records] and len(again) == 9
    assert [row.id for row in again.records.left_out] == ["id3"]
    assert len(prepared(data)) == 10
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join(lines[:9]))
    assert "9 samples for a run that began with 10" in message(prepared, data, resumed=True)


def test_only_changed_files_are_checked_again(data, monkeypatch):
    read = []
    image = Records.image
    monkeypatch.setattr(Records, "image", lambda self, name: read.append(name) or image(self, name))
    prepared(data, max_length=500)
    assert len(read) == 10
    prepared(data, max_length=500)
    assert len(read) == 10
    stretch_picture(data)
    message(prepared, data, max_length=500)
    assert read[10:] == ["images/3.png"]
    prepared(data, max_length=501, broken_records="leave_out")
    assert len(read) == 21
    samples = Samples(Records(data / "train.jsonl"), embedded())
    parts = [check_samples(samples, range(start, 10, 2)) for start in (0, 1)]
    assert {**parts[0][0], **parts[1][0]} == check_samples(samples, range(10))[0]
    assert [each.index for _, found in parts for each in found] == [3]


def test_pictures_inside_tables_are_checked(data):
    pictures = [(data / "images" / f"{number}.png").read_bytes() for number in range(4)]
    turns = [{"role": "user", "content": "which"}, {"role": "assistant", "content": "red"}]
    rows = [{"images": [{"bytes": content, "path": None}], "messages": turns} for content in pictures]
    rows[2]["images"][0]["bytes"] = pictures[2][:80]
    _, findings = check_samples(Samples(open_records(rows), embedded()), range(4))
    assert [(each.index, each.where, each.kind) for each in findings] == [(2, "row 2", "broken")]


def test_an_error_of_a_worker_process_keeps_its_type_and_its_line(data):
    truncate_picture(data)
    filled = Filled(Samples(Records(data / "train.jsonl"), embedded()), Collator(0))
    trainer = ResumableTrainer.__new__(ResumableTrainer)
    trainer.is_in_train = False
    loader = DataLoader(filled, 2, num_workers=1, collate_fn=filled.collate)
    with pytest.raises(BrokenSample, match="train.jsonl:4, id 'id3': image 'images/3.png'"):
        trainer.get_batch_samples(iter(loader), 5, "cpu")


STEPS = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
STEPS |= {"evaluation_records": "", "disable_tqdm": True, "use_cpu": True}
STEPS |= {"train_sampling_strategy": "sequential"}


def test_a_run_that_stopped_at_a_bad_picture_is_resumed(data, tmp_path):
    "Repaired, it ends as if nothing had happened; removed or left out, with the next sample in its place."
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join([*lines[:2], *lines[4:9], lines[3], lines[2], lines[9]]))
    whole = run("scenes_plain", data, tmp_path / "whole", STEPS)
    good = (data / "images" / "3.png").read_bytes()
    truncate_picture(data)
    place = f"{data / 'train.jsonl'}:8, id 'id3': image 'images/3.png'"
    assert place in message(run, "scenes_plain", data, tmp_path / "early", STEPS)
    assert not (tmp_path / "early" / "progress.json").exists()
    unchecked = {**STEPS, "check_samples": False}
    assert place in message(run, "scenes_plain", data, tmp_path / "a", unchecked)
    assert (tmp_path / "a" / "checkpoint-2" / "whole.json").is_file()
    for name in "bc":
        shutil.copytree(tmp_path / "a", tmp_path / name)
    curves = {}
    run("scenes_plain", data, tmp_path / "a", {**unchecked, "broken_records": "leave_out"})
    remove_picture(data)
    run("scenes_plain", data, tmp_path / "b", {**STEPS, "broken_records": "leave_out"})
    (data / "images" / "3.png").write_bytes(good)
    run("scenes_plain", data, tmp_path / "c", STEPS)
    for folder in (whole, *(tmp_path / name for name in "abc")):
        curves[folder.name] = pd.read_csv(folder / "curves.csv")
    assert curves["c"].equals(curves["whole"]) and curves["a"].equals(curves["b"])
    assert not curves["a"].equals(curves["c"])
    assert [len(pd.read_csv(tmp_path / name / "left_out.csv")) for name in "abc"] == [1, 1, 0]
    assert pd.read_csv(tmp_path / "a" / "left_out.csv").id.tolist() == ["id3"]
    assert load_json(tmp_path / "a" / "done.json")["steps"] == 6


def test_links_are_followed_where_this_is_set(data, tmp_path):
    outside = tmp_path / "outside" / "deep"
    outside.mkdir(parents=True)
    shutil.move(data / "images" / "3.png", outside / "3.png")
    (data / "images" / "3.png").symlink_to(outside / "3.png")
    (data / "folder").symlink_to(outside)
    (tmp_path / "outside" / "secret.png").write_bytes(b"")
    for name in ("images/3.png", "folder/3.png"):
        assert "by a link" in (said := message(path_inside, data, name)) and "follow_links=true" in said
        assert path_inside(data, name, follow_links=True) == (outside / "3.png").resolve()
    for name in ("../outside/secret.png", str(tmp_path / "outside" / "secret.png")):
        assert "leads out" in message(path_inside, data, name, follow_links=True)
    assert message(open_records, data, follow_links=True, image_folder=data / "folder")
    assert path_inside(data, "folder/../images/0.png", follow_links=True) == data.resolve() / "images/0.png"
    assert "follow_links=true" in message(open_records, data)
    records = open_records(data, follow_links=True)
    assert records.image("images/3.png").size == records.image("images/0.png").size
    rows = [{**json.loads(line)} for line in (data / "train.jsonl").read_text().splitlines()]
    assert "follow_links=true" in message(open_records, rows, data)
    assert open_records(rows, data, follow_links=True).image("images/3.png").size
    assert "follow_links=true" in message(prepared, data)
    assert torch.is_tensor(Samples(records, embedded())[3]["pixel_values"])
