"How the code reads, as numbers: short lines, one thing a line, short modules, lessons that show their names."

import ast
import re
from itertools import chain

import pytest
from test_rules import LIBRARY, MODULES, ROOT, cells, exported, public_names

SOURCES = {path: path.read_text(encoding="utf-8") for path in MODULES}


def lessons(path) -> list[str]:
    "The visible cells of a notebook that are not exported."
    hidden = r"^#\|\s*(exporti?|hide|default_exp)\b"
    return [source for source in cells(path) if not re.search(hidden, source, re.M)]


def test_lines_are_short():
    lines = list(chain.from_iterable(source.splitlines() for source in SOURCES.values()))
    assert sum(len(line) > 120 for line in lines) <= 0.01 * len(lines)


def test_one_value_is_bound_in_one_assignment():
    every = [node for source in SOURCES.values() for node in ast.walk(ast.parse(source))]
    nodes = [node for node in every if isinstance(node, ast.Assign)]
    pairs = [(node.targets[0], node.value) for node in nodes]
    several = [pair for pair in pairs if all(isinstance(side, ast.Tuple) for side in pair)]
    assert len(several) <= 0.04 * len(nodes)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "aligned_mllm")))
def test_a_module_is_read_at_one_sitting(path):
    assert len(SOURCES[path].splitlines()) <= 400


def test_lessons_are_not_plumbing():
    visible = [source for path in LIBRARY for source in lessons(path)]
    plumbing = [source for source in visible if re.search(r"^\s*except\b", source, re.M)]
    assert len(plumbing) <= 0.05 * len(visible)


def test_lessons_show_what_they_define():
    names = {(path, name) for path in LIBRARY for source in exported(path) for name in public_names(source)}
    shown = {(path, name) for path, name in names if re.search(rf"\b{name}\b", "\n".join(lessons(path)))}
    assert len(shown) >= 0.9 * len(names), sorted(f"{path.stem}.{name}" for path, name in names - shown)


def test_a_public_name_has_one_meaning():
    "Every command has its `main`, and every table of recipes its BOOK."
    homes = {}
    for path in LIBRARY:
        for name in {name for source in exported(path) for name in public_names(source)} - {"main", "BOOK"}:
            homes.setdefault(name, []).append(path.stem)
    assert {name: pages for name, pages in homes.items() if len(pages) > 1} == {}
