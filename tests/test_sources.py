"""Drawings and NLVR: the layout and its faults, fair splits, and computed truth against people's verdicts
and the pixels."""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_nlvr import stack, write_small_nlvr

from aligned_mllm.core import InputError
from aligned_mllm.data.images import open_image
from aligned_mllm.data.records import Records
from aligned_mllm.worlds.drawings import (
    DRAWING_RGB,
    ORDERS,
    Item,
    drawing_key,
    picture_of,
    tower_colours,
)
from aligned_mllm.worlds.nlvr import (
    CUE,
    cut_boxes,
    nlvr_records,
    plain_words,
    read_nlvr,
)
from aligned_mllm.worlds.nlvr_data import (
    generated_statements,
    nlvr_parts,
    split_by_directory,
    without_drawings_of,
    write_nlvr,
)
from aligned_mllm.worlds.sentences import Count, computed_truth, generated_sentences


def message(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nlvr")
    write_small_nlvr(folder, "dev", 12)
    write_small_nlvr(folder, "test", 4)
    return folder


@pytest.fixture(scope="module")
def statements(made):
    return read_nlvr(made, "dev")


def real_folder():
    "NLVR itself, from NLVR_FOLDER; skips without."
    place = Path(os.environ.get("NLVR_FOLDER", ""))
    if "NLVR_FOLDER" not in os.environ:
        pytest.skip("NLVR is not here: clone https://github.com/lil-lab/nlvr and set NLVR_FOLDER to it")
    assert any((place / inner / "dev" / "dev.json").is_file() for inner in ("", "nlvr")), (
        f"NLVR_FOLDER={place} holds no NLVR"
    )
    return place


# ---- reading


def test_reads_both_layouts(made, statements, tmp_path):
    assert len(statements) == 48 and statements[0].images[5] == "dev/images/0/dev-0-0-5.png"
    (tmp_path / "nlvr").symlink_to(made)
    inner = read_nlvr(tmp_path, "dev")
    assert inner[0].images[0] == "nlvr/dev/images/0/dev-0-0-0.png"
    assert [each.structure for each in inner] == [each.structure for each in statements]
    assert statements[0].boxes == tuple(f"dev/boxes/0/dev-0-0-box{number}.png" for number in range(3))


def test_a_missing_split_is_named(made):
    said = message(read_nlvr, made, "train")
    assert "no train/train.json and no nlvr/train/train.json" in said and str(made) in said


FAULTS = {
    "label": ({"label": "maybe"}, "KeyError 'maybe'"),
    "colour": (
        {"structured_rep": [[{"type": "square", "color": "Red", "size": 20, "x_loc": 0, "y_loc": 0}]] * 3},
        "KeyError 'Red'",
    ),
    "shape": (
        {"structured_rep": [[{"type": "star", "color": "Black", "size": 20, "x_loc": 0, "y_loc": 0}]] * 3},
        "3 boxes with star",
    ),
    "two boxes": (
        {"structured_rep": [[{"type": "square", "color": "Black", "size": 20, "x_loc": 0, "y_loc": 0}]] * 2},
        "2 boxes",
    ),
    "no sentence": ({"sentence": None}, "AttributeError"),
    "identifier leads out": ({"identifier": "../0-0"}, "identifier '../0-0'"),
    "directory leads out": ({"directory": "../0"}, "directory '../0'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_file_line_and_identifier(made, tmp_path, name):
    change, clause = FAULTS[name]
    lines = (made / "dev" / "dev.json").read_text().splitlines()[:3]
    lines[2] = json.dumps({**json.loads(lines[2]), **change})
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "dev.json").write_text("\n".join(lines))
    (tmp_path / "dev" / "images").symlink_to(made / "dev" / "images")
    said = message(read_nlvr, tmp_path, "dev")
    assert f"{tmp_path}/dev/dev.json:3, identifier" in said and clause in said


def test_what_is_no_json_and_missing_pictures(made, tmp_path):
    line = (made / "dev" / "dev.json").read_text().splitlines()[0]
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "dev.json").write_text(line + "\n{\n")
    assert "dev.json:1, identifier '0-0': no picture dev/images/0/dev-0-0-0.png" in message(
        read_nlvr, tmp_path, "dev"
    )
    (tmp_path / "dev" / "images").symlink_to(made / "dev" / "images")
    assert "dev.json:2: not JSON" in message(read_nlvr, tmp_path, "dev")
    (tmp_path / "dev" / "dev.json").write_text("[1]\n")
    assert "dev.json:1, identifier [1]: TypeError" in message(read_nlvr, tmp_path, "dev")


# ---- words and records


@pytest.mark.parametrize(
    "typed, plain",
    [
        ("There is a Tower.", "there is a tower"),
        (" two  boxes,and one . ", "two boxes , and one"),
        ("it’s\u00a0ablue\u200b block..", "it's ablue block"),
        ("ll 3 towers (or 2)", "ll 3 towers ( or 2 )"),
    ],
)
def test_plain_words(typed, plain):
    assert plain_words(typed) == plain == plain_words(plain)


def test_records_of_both_views(statements):
    whole = nlvr_records(statements)
    assert len(whole) == 6 * len(statements) and whole[1].images == ("dev/images/0/dev-0-0-1.png",)
    assert whole[0].turns[0].question.startswith("<image>\nmade up , ") and whole[0].turns[
        0
    ].question.endswith(CUE)
    assert {record.turns[0].answer for record in whole} == {"true", "false"} and whole[0].turns[
        0
    ].category == "statement"
    boxes = nlvr_records(statements, view="boxes", orders=(4,))
    assert boxes[0].images == tuple(statements[0].boxes[box] for box in ORDERS[4])
    assert boxes[0].turns[0].question.count("<image>\n") == 3
    assert "view 'half'" in message(nlvr_records, statements, view="half")


def test_boxes_are_cut_where_they_are(statements):
    structure = statements[-1].structure
    for order in range(6):
        boxes = cut_boxes(picture_of(structure, order))
        expected = cut_boxes(picture_of(structure))
        assert [box.tobytes() for box in boxes] == [expected[number].tobytes() for number in ORDERS[order]]
    assert "640 x 480" in message(cut_boxes, Image.new("RGB", (640, 480)))


# ---- splits


def test_split_by_directory(statements):
    training, held = split_by_directory(statements, {"1", 2})
    assert {each.directory for each in held} == {"1", "2"} and not {"1", "2"} & {
        each.directory for each in training
    }
    drawings = [{drawing_key(each.structure) for each in part} for part in (training, held)]
    assert not drawings[0] & drawings[1]
    for wrong in ((), {"9"}, {"1", "9"}, {str(number) for number in range(6)}):
        assert "held out" in message(split_by_directory, statements, wrong)


def test_a_drawing_that_comes_up_again_leaves_training(statements):
    copy = type(statements[0])(
        **{name: getattr(statements[0], name) for name in ("sentence", "truth", "images")},
        identifier="99-0",
        directory="99",
        structure=statements[0].structure[::-1],
    )
    training, held = split_by_directory([*statements, copy], {"99"})
    assert held == [copy] and statements[0] not in training and statements[1] in training
    assert without_drawings_of([copy], statements) == []


def test_a_sentence_in_two_directories_is_refused(statements):
    moved = [
        type(each)(
            each.sentence,
            each.truth,
            each.identifier,
            "7" if each.identifier == "0-1" else each.directory,
            each.images,
            each.structure,
        )
        for each in statements
    ]
    assert "sentence 0 is in several directories" in message(split_by_directory, moved, {"7"})


# ---- computed truth


def test_touching():
    def touches(x, y, size=20, bottom=False):
        return Item("square", "blue", size, x, y).touches(bottom)

    assert (
        touches(0, 40)
        and touches(40, 0)
        and touches(80, 40)
        and touches(40, 80)
        and touches(40, 80, bottom=True)
    )
    assert touches(1, 40) is None and touches(79, 40) is None and touches(40, 79, bottom=True) is None
    assert touches(2, 2) is False and touches(0, 40, bottom=True) is False and touches(1, 80) is True


def test_towers():
    assert tower_colours(reversed(stack("blue", "black"))) == ("blue", "black")
    block = Item("square", "blue", 20, 40, 80)
    for box in (
        [Item("circle", "blue", 20, 40, 80)],
        [block, Item("square", "blue", 20, 41, 59)],
        [Item("square", "blue", 20, 40, 70)],
        [block, Item("square", "blue", 20, 40, 50)],
        [block, Item("square", "blue", 10, 40, 69)],
    ):
        assert tower_colours(box) is None


def test_numbers():
    assert [f"{Count(n)} {Count(n):d} {Count(n):are} {Count(n):s} {Count(n):verb}" for n in (1, 2)] == [
        "one 1 is  s",
        "two 2 are s ",
    ]


TOWERS = (stack("black", "yellow", "yellow"), stack("blue"), stack("yellow", "black"))
THINGS = (
    (Item("square", "yellow", 20, 13, 80), Item("triangle", "yellow", 10, 90, 20)),
    (
        Item("circle", "black", 20, 60, 12),
        Item("square", "black", 30, 20, 60),
        Item("triangle", "blue", 20, 79, 50),
    ),
    (Item("circle", "yellow", 10, 40, 40),),
)
READ_BY_EYE = {
    "there are 3 yellow blocks": True,
    "there are 2 yellow blocks": False,
    "there are at least two yellow blocks": True,
    "there is a tower with four blocks": False,
    "there is only one tower with exactly one block": True,
    "there is exactly one tower with a yellow block at the top": True,
    "there are exactly two towers with a yellow block at the top": False,
    "there is no black block as the base of a tower": False,
    "there is a black block as the top of a tower with exactly two blocks": True,
    "there is a tower with a yellow block over a black block": True,
    "there is a tower with a black block over a yellow block": True,
    "there is a black block on a black block": False,
    "there is a blue tower": True,
    "there is a yellow tower": False,
    "there is a tower with only black and yellow blocks": True,
    "there is a tower with only blue and yellow blocks": False,
    "there is a tower with only blue and blue blocks": None,
    "there is a tower which has exactly two yellow blocks": True,
    "there are two towers that contain yellow blocks": True,
    "all towers contain 1 yellow block": False,
    "there is a tower with blocks of all 3 colours": False,
    "there are at least two towers with the same height": False,
    "there is a tower where the second block is black": True,
    "there is a yellow circle": None,  # no sentence about towers
}
READ_BY_EYE_TOO = {
    "there is a yellow circle": True,
    "there is a blue square": False,
    "there are 3 yellow items": True,
    "there are exactly two black circles": False,
    "there are at least two black objects": True,
    "there is a yellow item touching the wall": True,
    "there is a blue triangle touching the wall": None,  # one pixel away
    "there is exactly one yellow circle not touching any edge": True,
    "there is a yellow square closely touching the bottom of a box": True,
    "there is no yellow triangle closely touching the bottom of a box": True,
    "there is a box with 3 items": True,
    "one of the grey boxes has exactly four objects": False,
    "there is a box with only yellow items": True,
    "there is a box with only black items": False,
    "there is a box with only black and blue items": True,
    "there is a box with only black and yellow items": False,
    "there is a box with items of only one color": True,
    "there is a box with items of all 3 different colors": False,
    "there is a box with 2 black items": True,
    "there is a box with a black circle and a blue triangle": True,
    "there is a box with a black circle and a yellow item": False,
    "there is at least 1 yellow item in each box": False,
    "all black items are in the same box": True,
    "all yellow items are in the same box": False,
    "there is a yellow tower": None,  # no sentence about scattered things
}


@pytest.mark.parametrize("structure, verdicts", [(TOWERS, READ_BY_EYE), (THINGS, READ_BY_EYE_TOO)])
def test_truth_against_reading_by_eye(structure, verdicts):
    assert {sentence: computed_truth(sentence, structure) for sentence in verdicts} == verdicts


@pytest.mark.parametrize("towers", [True, False])
def test_truth_does_not_hang_on_the_order_of_the_boxes(statements, towers):
    for statement in [
        each for each in statements if (None not in map(tower_colours, each.structure)) == towers
    ][:3]:
        for sentence in generated_sentences(towers):
            assert (
                len(
                    {
                        computed_truth(sentence, tuple(statement.structure[box] for box in order))
                        for order in ORDERS[::2]
                    }
                )
                == 1
            )


def test_drawn_statements(statements):
    drawn = generated_statements(statements, seed=3, per_drawing=5)
    assert (
        drawn
        == generated_statements(statements, seed=3, per_drawing=5)
        != generated_statements(statements, seed=4, per_drawing=5)
    )
    assert len(drawn) == 5 * len({drawing_key(each.structure) for each in statements})
    balance = Counter((each.sentence, each.truth) for each in drawn)
    patterns = Counter()
    assert all(balance[sentence, True] == balance[sentence, False] for sentence, _ in balance)
    known = {each.images: each.structure for each in statements}
    for each in drawn:
        assert (
            computed_truth(each.sentence, each.structure) is each.truth
            and known[each.images] == each.structure
        )
        patterns[generated_sentences(None not in map(tower_colours, each.structure))[each.sentence][0]] += 1
    assert len(patterns) > 35
    assert len({(each.sentence, each.images) for each in drawn}) == len(drawn)
    assert plain_words(drawn[0].sentence) == drawn[0].sentence
    everything = generated_statements(statements[:4], seed=0, per_drawing=10_000)
    assert 0 < len(everything) < 10_000


# ---- files


def test_write_whole(made, tmp_path):
    assert write_nlvr(made, tmp_path / "new", held_out={"5"}, per_drawing=2) == tmp_path / "new"
    names = ("train", "validation", "test", "drawn")
    parts = {name: Records(tmp_path / "new" / f"{name}.jsonl") for name in names}  # looks for every picture
    assert [len(parts[name]) for name in names] == [40 * 6, 8, 16, 80]
    train, validation = (
        {record.id.rsplit("-", 2)[0] for record in parts[name]} for name in ("train", "validation")
    )
    assert not train & validation and {record.id.rsplit("-", 2)[0] for record in parts["drawn"]} <= train
    assert {record.turns[0].category for record in parts["drawn"]} == {"drawn"}
    assert parts["train"][0].images == ("dev/images/0/dev-0-0-0.png",)
    picture = open_image(parts["test"][0].images[0], parts["test"].image_folder)
    assert picture.tobytes() == open_image("test/images/0/test-0-0-0.png", made).tobytes()
    note = (tmp_path / "new" / "SOURCE.md").read_text()
    assert "CC BY 4.0" in note and "directories 5" in note and 'view "whole"' in note
    assert "drawn 80, test 16, train 240, validation 8" in note
    write_nlvr(made, tmp_path / "new", per_drawing=0)
    assert not (tmp_path / "new" / "drawn.jsonl").exists()


def test_write_boxes(made, statements, tmp_path):
    write_nlvr(made, tmp_path / "new", view="boxes", held_out={"0"})
    record = next(each for each in Records(tmp_path / "new" / "train.jsonl") if each.id.endswith("-3"))
    structure = {each.images[3]: each.structure for each in statements}[
        f"dev/images/{record.images[0].split('/')[2]}/{record.id}.png"
    ]
    pictures = [open_image(name, tmp_path / "new") for name in record.images]
    assert [box.tobytes() for box in pictures] == [
        box.tobytes() for box in cut_boxes(picture_of(structure, 3))
    ]
    assert not (tmp_path / "new" / "dev" / "images").exists()


def test_write_with_a_training_part(made, tmp_path):
    for split in ("dev", "test"):
        (tmp_path / split).symlink_to(made / split)
    write_small_nlvr(tmp_path, "train", 3)
    parts = nlvr_parts(tmp_path, held_out={"1"})
    assert {each.images[0].split("/")[0] for each in parts["train"]} == {"train"}
    assert {each.directory for each in parts["validation"]} == {"1"} and len(parts["test"]) == 16


def test_nothing_is_left_half_written(made, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "holds other files" in message(write_nlvr, made, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    write_nlvr(made, tmp_path / "new")
    before = sorted(tmp_path.rglob("*"))
    broken = tmp_path / "nlvr"
    for split in ("dev", "test"):
        (broken / split).mkdir(parents=True)
        (broken / split / f"{split}.json").write_text((made / split / f"{split}.json").read_text())
        for source in (made / split).rglob("*.png"):
            path = broken / split / source.relative_to(made / split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read_bytes()[:200])
    assert "image 'dev/images/" in message(write_nlvr, broken, tmp_path / "new", view="boxes")
    assert [path for path in sorted(tmp_path.rglob("*")) if broken not in (path, *path.parents)] == before


# ---- NLVR itself

DIGITS = {"1": "one", "2": "two", "3": "three", "4": "four"}


def even_digits(sentence):
    return " ".join(DIGITS.get(word, word) for word in sentence.split())


def test_truth_against_people():
    """Where a pattern makes a sentence of the development part word for word (digits as words), people
    agree with its truth."""
    known = {
        towers: {even_digits(sentence): sentence for sentence in generated_sentences(towers)}
        for towers in (True, False)
    }
    agreed = []
    patterns = defaultdict(int)
    for statement in read_nlvr(real_folder(), "dev"):
        towers = None not in map(tower_colours, statement.structure)
        sentence = known[towers].get(even_digits(plain_words(statement.sentence)))
        truth = sentence and computed_truth(sentence, statement.structure)
        if truth is not None:
            agreed.append(truth == statement.truth)
            patterns[generated_sentences(towers)[sentence][0]] += 1
    assert len(agreed) > 250 and len(patterns) > 20 and np.mean(agreed) > 0.97


def test_drawings_against_the_pixels():
    """The lists agree with the pictures: the same colours in the same places, for orders that
    distinguish left from right."""
    folder = real_folder()
    palette = np.array([DRAWING_RGB[name] for name in ("yellow", "black", "blue", "box", "between")])
    for statement in read_nlvr(folder, "dev")[::120]:
        for order in (0, 3, 4):
            picture = np.asarray(open_image(statement.images[order], folder)).astype(int)
            ours = np.asarray(picture_of(statement.structure, order)).astype(int)
            assert picture.shape == ours.shape and np.abs(picture - ours).mean() < 2
            nearest, expected = (
                np.abs(each[:, :, None] - palette).sum(-1).argmin(-1) for each in (picture, ours)
            )
            assert (nearest != expected).mean() < 0.005
            for box, start in zip(
                ORDERS[order], (0, 150, 300)
            ):  # the area of each colour, from the list alone
                for number, colour in enumerate(("yellow", "black", "blue")):
                    share = {"square": 1.0, "circle": np.pi / 4, "triangle": 0.5}
                    area = sum(
                        share[i.shape] * i.size**2 for i in statement.structure[box] if i.colour == colour
                    )
                    assert abs((nearest[:, start : start + 100] == number).sum() - area) <= 15 + 0.05 * area


def test_the_real_split_is_fair():
    folder = real_folder()
    parts = nlvr_parts(folder, held_out={"5"}, per_drawing=1)
    drawings = {name: {drawing_key(each.structure) for each in part} for name, part in parts.items()}
    assert (
        not drawings["train"] & (drawings["validation"] | drawings["test"])
        and drawings["drawn"] <= drawings["train"]
    )
    assert len(parts["train"]) > 700 and len(parts["validation"]) > 150 and len(parts["test"]) > 900
