"A small copy of NLVR in its own layout, with random drawings and made-up sentences: tests and documentation."

import json
import random

from aligned_mllm.worlds.drawings import NLVR_COLOURS, Item, picture_of

NAMES = {word: name for name, word in NLVR_COLOURS.items()}


def stack(*colours):
    "A tower of blocks, from base to top."
    return tuple(Item("square", colour, 20, 40, 80 - 21 * height) for height, colour in enumerate(colours))


def random_box(chance, is_tower):
    "A tower, or one to four items that do not overlap."
    colours = chance.choices(list(NAMES), k=chance.randint(1, 4))
    cells = chance.sample([(x, y) for x in (0, 35, 70) for y in (1, 36, 70)], len(colours))
    sizes = chance.choices([10, 20, 30], k=len(colours))
    shapes = chance.choices(["square", "circle", "triangle"], k=len(colours))
    if is_tower:
        return stack(*colours)
    return tuple(Item(*each, x, y) for *each, (x, y) in zip(shapes, colours, sizes, cells))


def raw_line(sentence, truth, identifier, directory, structure):
    "One line of NLVR's files, decoded."
    boxes = [
        [{"type": i.shape, "color": NAMES[i.colour], "size": i.size, "x_loc": i.x, "y_loc": i.y} for i in box]
        for box in structure
    ]
    place = {"identifier": identifier, "directory": directory}
    return {"sentence": sentence, "label": "true" if truth else "false", **place, "structured_rep": boxes}


def write_small_nlvr(folder, split, sentences):
    "A split with four drawings for each sentence; two sentences share a directory, every second has towers."
    chance = random.Random(split)
    lines = []
    for number in range(4 * sentences):
        sentence, drawing = divmod(number, 4)
        structure = tuple(random_box(chance, sentence % 2 == 0) for _ in range(3))
        identifier = f"{sentence}-{drawing}"
        directory = str(sentence // 2)
        raw = raw_line(f"Made  up, “nr” {sentence}.", drawing < 2, identifier, directory, structure)
        lines.append(json.dumps(raw))
        place = folder / split / "images" / directory
        place.mkdir(parents=True, exist_ok=True)
        for order in range(6):
            picture_of(structure, order).convert("RGBA").save(place / f"{split}-{identifier}-{order}.png")
    (folder / split / f"{split}.json").write_text("\n".join(lines) + "\n")
