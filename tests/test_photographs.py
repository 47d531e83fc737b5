"Photographs: layouts of folders, refusals, exact geometry, true and balanced answers, held-out names."

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aligned_mllm.core import InputError
from aligned_mllm.data.records import Records
from aligned_mllm.worlds.collage_questions import CORNERS, collage_caption, form_of
from aligned_mllm.worlds.collages import (
    CollageWorld,
    box_of,
    collages_of,
    draw_collage,
    mask_of,
    run_lengths,
    same_word,
    sample_collage,
    split_of_collage,
)
from aligned_mllm.worlds.cutouts import (
    DRAWN,
    LEAST_SIDE,
    OBJECT_KINDS,
    draw_cutouts,
    plural_of,
    read_cutouts,
    read_photographs,
    trimmed,
    with_article,
)
from aligned_mllm.worlds.photographs import (
    PhotographSizes,
    commonest_answers,
    held_out_names,
    photograph_config,
    write_photographs,
)

SIZES = PhotographSizes(train=150, captions=30, validation=20, test=60, unseen=40, held_out=0.3)
PARTS = ("train", "captions", "validation", "test", "unseen")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return read_cutouts(draw_cutouts(tmp_path_factory.mktemp("drawn")))


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("data") / "photographs", source, 3, SIZES)


def cut_out(path: Path, size=(40, 30), colour=(200, 40, 40), sentence: str | None = None) -> Path:
    "A rectangle in the middle of a transparent picture."
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", (size[0] + 10, size[1] + 10))
    picture.paste((*colour, 255), (5, 5, 5 + size[0], 5 + size[1]))
    picture.save(path)
    if sentence is not None:
        path.with_suffix(".txt").write_text(sentence, encoding="utf-8")
    return path


def geometry(folder: Path, part: str) -> list[dict]:
    text = (folder / f"{part}.geometry.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def turns(folder: Path, part: str) -> list[tuple[str, str, str, str]]:
    "Image, question, answer and category of every record; each has one turn."
    records = list(Records(folder / f"{part}.jsonl"))
    assert all(len(record.turns) == 1 for record in records)
    every = [(record.images[0], record.turns[0]) for record in records]
    prefix = "<image>\n"
    return [(image, turn.question.removeprefix(prefix), turn.answer, turn.category) for image, turn in every]


# Layouts


def test_a_tree_gives_names_and_kinds_and_counts_what_it_leaves_out(tmp_path):
    cut_out(tmp_path / "animals" / "birds" / "owl_2.png", sentence="An owl.\nEine Eule.")
    cut_out(tmp_path / "animals" / "birds" / "peacock.png", sentence="A peacock (a male peafowl).")
    cut_out(tmp_path / "food" / "fruit" / "red.png", sentence="A “Fuji” apple.")
    cut_out(tmp_path / "clothes" / "pants.png", sentence="A pair of pants.")
    cut_out(tmp_path / "clothes" / "button.png", sentence="A button.")
    cut_out(tmp_path / "vehicles" / "Fire_Truck.png")
    cut_out(tmp_path / "animals" / "birds" / "owl_3.png", sentence="An owl.")
    cut_out(tmp_path / "animals" / "cartoon" / "cat.png", sentence="A cat.")
    cut_out(tmp_path / "symbols" / "one.png", sentence="A one.")
    cut_out(tmp_path / "vehicles" / "car_mirror.png")
    cut_out(tmp_path / "food" / "broccoli.png", sentence="Eat your broccoli!")
    cut_out(tmp_path / "animals" / "heron.png", sentence="A great blue heron.")
    cut_out(tmp_path / "plants" / "flower.png", sentence="A flower.")
    cut_out(tmp_path / "military" / "f22.png", sentence="An F-22 Raptor.")
    found = read_cutouts(tmp_path)
    assert found.kinds == {
        "button": (),
        "fire truck": ("vehicle",),
        "fuji apple": ("fruit", "food"),
        "owl": ("bird", "animal"),
        "pair of pants": ("clothing",),
        "peacock": ("bird", "animal"),
    }
    assert found.by_name["owl"][0].path.name == "owl_2.png"
    assert found.left_out == {
        "further picture of a name": 1,
        "cartoon, symbol or seasonal": 2,
        "mirrored picture": 1,
        "sentence that is not a name": 2,
        "name of more than two words": 1,
        "name of a kind of things": 1,
    }


def test_a_flat_folder_needs_no_text_and_has_no_kinds(tmp_path):
    cut_out(tmp_path / "big_red_car.png")
    cut_out(tmp_path / "scissors.png")
    cut_out(tmp_path / "x1.png", sentence="An elephant.")
    assert read_cutouts(tmp_path).kinds == {"big red car": (), "elephant": (), "pair of scissors": ()}


def test_the_checksum_covers_names_and_pixels(tmp_path):
    cut_out(tmp_path / "car.png")
    first = read_cutouts(tmp_path)
    cut_out(tmp_path / "car.png", colour=(0, 0, 255))
    second = read_cutouts(tmp_path)
    assert first.digest != second.digest
    assert trimmed(second.cutouts[0]).getpixel((3, 3)) == (0, 0, 255, 255)
    (tmp_path / "car.png").rename(tmp_path / "bus.png")
    assert read_cutouts(tmp_path).digest not in (first.digest, second.digest)


@pytest.mark.parametrize(
    "name, plural, article",
    [
        ("cherry", "cherries", "a"),
        ("toy", "toys", "a"),
        ("mouse", "mice", "a"),
        ("clownfish", "clownfish", "a"),
        ("guinea fowl", "guinea fowl", "a"),
        ("woodlouse", "woodlice", "a"),
        ("fireman", "firemen", "a"),
        ("pair of pliers", "pairs of pliers", "a"),
        ("bunch of grapes", "bunches of grapes", "a"),
        ("green mango", "green mangoes", "a"),
        ("orange", "oranges", "an"),
        ("unicorn", "unicorns", "a"),
        ("umbrella", "umbrellas", "an"),
        ("hour glass", "hour glasses", "an"),
    ],
)
def test_names_in_a_sentence(name, plural, article):
    assert plural_of(name) == plural and with_article(name) == f"{article} {name}"


def test_photographs_of_a_class_are_divided(tmp_path):
    for name in ("Faces", "water_lilly", "car_side", "scissors", "BACKGROUND_Google"):
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.new("RGB", (60, 40), (20 * number, 90, 90)).save(tmp_path / name / f"{number}.jpg")
    found = read_photographs(tmp_path, per_class=5)
    assert list(found.by_name) == ["car", "face", "pair of scissors", "water lily"]
    assert found.left_out["beyond per_class"] == 20
    files = {
        split: {(item.name, item.cutout.path.name) for each in collages for item in each.objects}
        for split in ("train", "validation", "test")
        if (collages := collages_of(split, 20, 1, found))
    }
    assert not files["train"] & files["test"] and not files["train"] & files["validation"]
    assert not files["validation"] & files["test"]
    assert {name for name, _ in files["train"]} == {name for name, _ in files["test"]}


# Refusals


def broken(path: Path) -> None:
    cut_out(path)
    path.write_bytes(path.read_bytes()[:-60])


REFUSED = {
    "no alpha": lambda path: Image.new("RGB", (40, 40)).save(path),
    "128 or more everywhere": lambda path: Image.new("RGBA", (40, 40), (9, 9, 9, 255)).save(path),
    "transparent everywhere": lambda path: Image.new("RGBA", (40, 40), (9, 9, 9, 100)).save(path),
    "1 x 1 pixels": lambda path: cut_out(path, size=(1, 1)),
    f"40 x {LEAST_SIDE - 1} pixels": lambda path: cut_out(path, size=(40, LEAST_SIDE - 1)),
    "cannot be decoded": broken,
    "the name ''": lambda path: cut_out(path, sentence=""),
    "the name '12'": lambda path: cut_out(path, sentence="12"),
    "same name, 'dog'": lambda path: cut_out(path, sentence="A dog."),
    "not UTF-8": lambda path: cut_out(path).with_suffix(".txt").write_bytes(b"caf\xe9"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_faulty_cut_out_is_refused(tmp_path, fault):
    cut_out(tmp_path / "dog.png")
    REFUSED[fault](tmp_path / "zebra.png")
    with pytest.raises(InputError) as caught:
        read_cutouts(tmp_path)
    assert fault in caught.value.found and "zebra" in caught.value.found


def test_a_missing_folder_names_the_command_that_installs_one(tmp_path):
    with pytest.raises(InputError, match="apt install tuxpaint-stamps-default, or name any folder"):
        read_cutouts(tmp_path / "none")
    with pytest.raises(InputError, match="no picture in"):
        read_cutouts(tmp_path)


@pytest.mark.parametrize("files, fault", [(4, "4 photographs"), (0, "no picture in")])
def test_a_class_needs_photographs(tmp_path, files, fault):
    (tmp_path / "dog").mkdir()
    for number in range(files):
        Image.new("RGB", (60, 40)).save(tmp_path / "dog" / f"{number}.jpg")
    with pytest.raises(InputError, match=fault):
        read_photographs(tmp_path)


def test_two_classes_of_one_name_and_broken_photographs_are_refused(tmp_path):
    for name in ("dog", "Dog_"):
        (tmp_path / name).mkdir()
        for number in range(5):
            Image.new("RGB", (60, 40)).save(tmp_path / name / f"{number}.jpg")
    with pytest.raises(InputError, match="two folders with the name 'dog'"):
        read_photographs(tmp_path)
    (tmp_path / "Dog_").rename(tmp_path / "cat")
    path = tmp_path / "cat" / "3.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="3.jpg cannot be decoded"):
        read_photographs(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        read_photographs(tmp_path / "none")


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 8},
        {"objects": (0, 2)},
        {"objects": (3, 2)},
        {"scale": (0.5, 1.2)},
        {"jitter": 0.3},
        {"repeat": 1.5},
        {"backgrounds": ()},
        {"backgrounds": ("striped",)},
        {"background_folder": "somewhere"},
        {"noise": -1.0},
    ],
)
def test_an_impossible_world_is_refused(wrong):
    with pytest.raises(InputError, match=f"^{next(iter(wrong))} "):
        CollageWorld(**wrong)


def test_photographed_backgrounds_need_a_folder():
    with pytest.raises(InputError, match="^background_folder ''"):
        CollageWorld(backgrounds=("photographed",))


@pytest.mark.parametrize(
    "wrong", [{"train": -1}, {"per_scene": (1,)}, {"per_scene": (0,) * 6}, {"held_out": 1.0}]
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(InputError):
        PhotographSizes(**wrong)


def test_too_few_names_are_refused_before_anything_is_written(source, tmp_path):
    for names in (["apple", "saw", "lime"], ["apple", "saw", "lime", "axe", "pear"]):
        with pytest.raises(InputError, match="names"):
            write_photographs(tmp_path / "data", source.part(names), 0, SIZES)
    with pytest.raises(InputError, match="different collages"):
        few = CollageWorld(objects=(1, 1))
        write_photographs(tmp_path / "data", source, 0, PhotographSizes(train=100, unseen=0), few)
    with pytest.raises(InputError, match="no picture in the folder"):
        world = CollageWorld(backgrounds=("photographed",), background_folder=str(tmp_path))
        write_photographs(tmp_path / "data", source, 0, SIZES, world)
    assert list(tmp_path.iterdir()) == []


# Geometry


def test_boxes_and_masks_are_exact(tmp_path):
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    for number, (name, colour) in enumerate(colours.items()):
        cut_out(tmp_path / f"{name}.png", (40 + 9 * number, 50), colour, f"A {name}.")
    source = read_cutouts(tmp_path)
    options = {"lighting": 0, "backgrounds": ("plain",), "jitter": 0.2, "scale": (0.6, 0.98), "repeat": 0}
    world = CollageWorld(**options, max_overlap=0.3)
    hidden = 0
    for seed in range(40):
        collage = sample_collage(seed, source, world)
        picture, masks = draw_collage(collage)
        pixels = np.asarray(picture)
        for item, mask in zip(collage.objects, masks):
            exact = (pixels == colours[item.name]).all(-1)
            assert (mask == exact).all()
            rows, columns = exact.nonzero()
            assert box_of(mask) == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert (mask_of(run_lengths(mask), 224) == mask).all()
            hidden += mask.sum() < item.width * item.height
    assert hidden > 0  # some objects are partly covered


@pytest.mark.parametrize("mask", [np.zeros((3, 3), bool), np.ones((3, 3), bool), np.eye(3, dtype=bool)])
def test_run_lengths_return_the_mask(mask):
    assert (mask_of(run_lengths(mask), 3) == mask).all()
    assert box_of(mask) == ([0, 0, 3, 3] if mask.any() else [0, 0, 0, 0])


def test_masks_of_curved_objects_follow_their_colour(source):
    world = CollageWorld(objects=(1, 1), lighting=0, backgrounds=("plain",))
    for seed in range(20):
        collage = sample_collage(seed, source, world)
        picture, masks = draw_collage(collage)
        pixels = np.asarray(picture).astype(int)
        background = pixels[collage.objects[0].row * -223 + 223, 0]  # a corner of an empty quarter
        colour = next(DRAWN[key][0] for key in DRAWN if key.endswith(f"/{collage.objects[0].name}"))
        nearer = abs(pixels - colour).sum(-1) - abs(pixels - background).sum(-1)
        assert nearer[masks[0]].max() <= 12 and nearer[~masks[0]].min() >= -12  # of at least 77: rounding


def test_objects_are_in_their_quarters_and_overlap_little(source):
    world = CollageWorld(jitter=0.2, scale=(0.6, 0.95), max_overlap=0.05)
    for seed in range(200):
        items = sample_collage(seed, source, world).objects
        places = [(item.row, item.column) for item in items]
        assert len(set(places)) == len(items)
        for index, item in enumerate(items):
            assert 0 <= item.x and item.x + item.width <= 224 and 0 <= item.y and item.y + item.height <= 224
            middle = item.y + item.height / 2, item.x + item.width / 2
            assert [place > 112 for place in middle] == [item.row, item.column]
            for other in items[:index]:
                across = min(item.x + item.width, other.x + other.width) - max(item.x, other.x)
                down = min(item.y + item.height, other.y + other.height) - max(item.y, other.y)
                smaller = min(item.width * item.height, other.width * other.height)
                assert max(across, 0) * max(down, 0) <= 0.05 * smaller


def test_names_of_one_word_are_not_mixed_and_copies_occur(tmp_path):
    for name in ("green apple", "red apple", "apple", "saw", "axe"):
        cut_out(tmp_path / f"{name}.png")
    source = read_cutouts(tmp_path)
    most = Counter()
    for seed in range(200):
        names = [item.name for item in sample_collage(seed, source).objects]
        assert not [1 for one in set(names) for other in set(names) if one < other and same_word(one, other)]
        most[max(Counter(names).values())] += 1
    assert min(most[number] for number in (1, 2, 3, 4)) >= 5


def test_photographed_backgrounds_come_from_the_folder(source, tmp_path):
    Image.new("RGB", (80, 50), (10, 200, 30)).save(tmp_path / "meadow.png")
    world = CollageWorld(backgrounds=("photographed",), background_folder=str(tmp_path))
    picture, masks = draw_collage(sample_collage(0, source, world))
    outside = np.asarray(picture)[~masks.any(0)]
    assert (np.median(outside, 0) == (10, 200, 30)).all()
    before = photograph_config(0, source, SIZES, world)
    assert str(tmp_path) not in json.dumps(before)
    Image.new("RGB", (80, 50), (10, 20, 30)).save(tmp_path / "meadow.png")
    assert photograph_config(0, source, SIZES, world) != before


# Answers


def expected(text: str, objects: list[dict]) -> str:
    "The answer, read from the geometry: an oracle that shares nothing with the code but the words."
    names = Counter(item["name"] for item in objects)
    kinds = Counter(kind for item in objects for kind in item["kinds"])
    at = {CORNERS[item["row"], item["column"]]: item for item in objects}
    only = {name: next(item for item in objects if item["name"] == name) for name in names}
    if found := re.fullmatch(r"How many (.+?) (?:are there|can you see|are in the picture)\?", text):
        if found[1] == "things":
            return str(len(objects))
        of_kind = [kind for kind, entry in OBJECT_KINDS.items() if entry.plural == found[1]]
        of_name = [name.split("/")[-1] for name in DRAWN if plural_of(name.split("/")[-1]) == found[1]]
        return str(kinds[of_kind[0]] if of_kind else names[of_name[0]])
    for kind, entry in OBJECT_KINDS.items():
        if text in entry.questions:
            return "yes" if kinds[kind] else "no"
    if found := re.fullmatch(r"(?:Is there|Can you see|Does the picture show) an? (.+)\?", text):
        return "yes" if names[found[1]] else "no"
    if found := re.fullmatch(r"What kind of thing .* at the (.+)\?", text):
        return at[found[1]]["kinds"][-1]
    if found := re.fullmatch(r"What .* at the (.+)\?", text):
        return at[found[1]]["name"]
    if text in ("What is this?", "What does the picture show?", "What can you see?"):
        assert len(objects) == 1
        return objects[0]["name"]
    if found := re.fullmatch(r"(?:Is|Where is) the (\w+) (.+) the (\w+)\?", text):
        one, other = only[found[1]], only[found[3]]
        assert names[found[1]] == names[found[3]] == 1
        side = {-1: "left", 0: "", 1: "right"}[np.sign(one["column"] - other["column"])]
        height = {-1: "above", 0: "", 1: "below"}[np.sign(one["row"] - other["row"])]
        if "left" in found[2]:
            return side
        if "above" in found[2]:
            return height
        assert not (side and height)
        return side or height
    found = re.fullmatch(r"(?:Where|In which corner|In which part of the picture) is the (\w+)\?", text)
    assert names[found[1]] == 1
    return CORNERS[only[found[1]]["row"], only[found[1]]["column"]]


@pytest.mark.parametrize("part", ["train", "validation", "test", "unseen"])
def test_every_answer_is_true(folder, part):
    objects = {line["image"]: line["objects"] for line in geometry(folder, part)}
    said = turns(folder, part)
    assert [(text, answer) for _, text, answer, _ in said] == [
        (text, expected(text, objects[image])) for image, text, _, _ in said
    ]
    assert all(form_of(text)[0] for _, text, _, _ in said)


def test_captions_name_every_object(folder, source):
    lines = {line["image"]: line["objects"] for line in geometry(folder, "captions")}
    forms = Counter()
    for image, prompt, caption, category in turns(folder, "captions"):
        assert category == "caption"
        objects = sorted(lines[image], key=lambda item: (item["row"], item["column"]))
        if "where" in prompt:
            corners = [CORNERS[item["row"], item["column"]] for item in objects]
            assert re.findall(r"at the (\w+ \w+)", caption) == corners
            assert re.findall(r"an? (\w+) at", caption) == [item["name"] for item in objects]
        else:
            number = {1: "an?", 2: "two", 3: "three", 4: "four"}
            for name, count in Counter(item["name"] for item in objects).items():
                assert re.search(rf"\b{number[count]} {name if count == 1 else plural_of(name)}\b", caption)
        forms["where" in prompt] += 1
    assert min(forms[True], forms[False]) >= 5


def test_answers_are_balanced(folder):
    table = commonest_answers(folder / "train.jsonl").set_index("category")
    assert set(table.index) == {"count", "where", "relation", "existence", "kind", "name"}
    assert table.share["existence"] <= 0.51 and table.by_form["existence"] <= 0.51
    assert table.share["where"] <= 0.27 and table.share["relation"] <= 0.29
    assert table.share["count"] <= 0.3 and table.by_form["count"] <= 0.4
    assert table.share["kind"] <= 0.3 and table.share["name"] <= 0.15
    assert 0.38 <= table.by_form["relation"] <= 0.46  # 2 answers in two thirds of the questions, else 4


def test_yes_and_no_do_not_depend_on_the_name(source):
    from aligned_mllm.worlds.collage_questions import EvenAnswers, collage_questions

    even = EvenAnswers(0)
    counts: dict[str, Counter] = {}
    for seed in range(600):
        collage = sample_collage(seed, source)
        for question in even.choose(collage_questions(collage, source, seed), {"existence": 1}):
            counts.setdefault(question.names[0], Counter())[question.answer] += 1
    guessed = sum(max(answers.values()) for answers in counts.values())
    assert guessed / 600 < 0.54


def test_whole_photographs_are_counted_as_photographs(tmp_path):
    from aligned_mllm.worlds.collage_questions import collage_questions

    for number, name in enumerate(("dog", "cat", "owl", "car", "bus")):
        (tmp_path / name).mkdir()
        for index in range(5):
            Image.new("RGB", (60, 40), (40 * number, 90, 90)).save(tmp_path / name / f"{index}.jpg")
    source = read_photographs(tmp_path)
    texts = set()
    for seed in range(30):
        collage = sample_collage(seed, source)
        texts |= {each.text for each in collage_questions(collage, source, seed) if each.category == "count"}
        if len({item.name for item in collage.objects}) == 1 and len(collage.objects) == 3:
            caption = collage_caption(collage, "short")
            assert caption == f"three photographs of {with_article(collage.objects[0].name)}"
    assert all("photographs" in text for text in texts) and "How many photographs show a dog?" in texts


# The data folder


def test_parts_share_no_composition_and_unseen_has_names_of_its_own(folder):
    compositions, names = {}, {}
    for part in PARTS:
        lines = [line["objects"] for line in geometry(folder, part)]
        compositions[part] = {
            tuple(sorted((item["row"], item["column"], item["name"]) for item in objects))
            for objects in lines
        }
        assert len(compositions[part]) == len(lines) == getattr(SIZES, part)
        names[part] = {item["name"] for objects in lines for item in objects}
    learnt = compositions["train"] | compositions["captions"]
    assert not learnt & compositions["validation"] and not learnt & compositions["test"]
    assert not compositions["validation"] & compositions["test"]
    config = json.loads((folder / "photographs.json").read_text(encoding="utf-8"))
    assert names["unseen"] == set(config["unseen_names"]) and len(names["unseen"]) == 5
    for part in PARTS:
        own = set(config["unseen_names"] if part == "unseen" else config["names"])
        foreign = (set(config["names"]) | set(config["unseen_names"])) - own
        said = " ".join(f"{text} {answer}" for _, text, answer, _ in turns(folder, part))
        assert names[part] <= own
        forbidden = {form for name in foreign for form in (name, plural_of(name))}
        assert not forbidden & set(re.findall(r"\w+", said))


def test_names_of_one_word_are_held_out_together():
    names = ["green apple", "red apple", "apple", *"saw axe pear plum lime lemon nail".split()]
    for seed in range(20):
        seen, unseen = held_out_names(names, 0.4, 2, seed)
        assert sorted(seen + unseen) == sorted(names) and 2 <= len(unseen) <= 4
        assert not [1 for one in seen for other in unseen if same_word(one, other)]


def test_the_same_seed_gives_the_same_bytes(source, folder, tmp_path):
    again = write_photographs(tmp_path / "again", source, 3, SIZES)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in files)
    other = write_photographs(tmp_path / "other", source, 4, SIZES)
    assert (folder / "train.jsonl").read_bytes() != (other / "train.jsonl").read_bytes()


def test_a_folder_is_replaced_only_by_its_own_kind(source, tmp_path):
    few = PhotographSizes(train=5, captions=0, validation=0, test=0, unseen=0)
    target = write_photographs(tmp_path / "data", source, 0, few)
    assert not (target / "unseen.jsonl").exists()
    config = json.loads((target / "photographs.json").read_text(encoding="utf-8"))
    assert config == photograph_config(0, source, few) and config["unseen_names"] == []
    write_photographs(target, source, 1, few)
    assert json.loads((target / "photographs.json").read_text(encoding="utf-8"))["seed"] == 1
    with pytest.raises(InputError, match="holds other files"):
        write_photographs(target / "images", source, 0, few)


def test_numbers_of_questions_are_as_wanted(source, tmp_path):
    sizes = PhotographSizes(30, 0, 0, 10, 0, per_scene=(2, 0, 1, 0, 0, 3))
    target = write_photographs(tmp_path / "data", source, 0, sizes)
    counts = Counter((image, category) for image, _, _, category in turns(target, "train"))
    assert {category for _, category in counts} == {"count", "relation", "name"}
    assert max(counts.values()) == 3 and all(counts[image, "count"] == 2 for image, _ in counts)
    counts = Counter((image, category) for image, _, _, category in turns(target, "test"))
    assert set(counts.values()) == {1}


def test_a_split_is_a_function_of_the_composition(source):
    collages = collages_of("validation", 20, 0, source)
    assert {split_of_collage(each) for each in collages} == {"validation"}
    with pytest.raises(InputError, match="split 'captions'"):
        collages_of("captions", 1, 0, source)
