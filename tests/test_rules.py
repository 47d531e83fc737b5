"What must hold for the repository itself: export, order, notebook craft, names."

import ast
import functools
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
)
LIBRARY = [path for path in NOTEBOOKS if ROOT / "nbs" / "lib" in path.parents]
MODULES = [
    path
    for path in sorted((ROOT / "aligned_mllm").rglob("*.py"))
    if path.name not in ("__init__.py", "_modidx.py")
]
COMMANDS = Path(sys.executable).parent


@functools.cache
def notebook(path: Path) -> nbformat.NotebookNode:
    "A notebook, read once for all rules."
    return nbformat.read(path, 4)


def cells(path: Path, kind: str = "code") -> list[str]:
    return [cell.source for cell in notebook(path).cells if cell.cell_type == kind]


@functools.cache
def module_of(path: Path) -> str:
    return next(
        line.split()[-1]
        for source in cells(path)
        for line in source.splitlines()
        if line.startswith("#| default_exp")
    )


def exported(path: Path) -> list[str]:
    return [source for source in cells(path) if re.search(r"^#\|\s*exporti?\b", source, re.M)]


def public_names(source: str) -> list[str]:
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def imported_modules(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aligned_mllm"):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("aligned_mllm")}
    return {name.removeprefix("aligned_mllm").lstrip(".") for name in found}


def python(source: str) -> str:
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())


@pytest.fixture(scope="module")
def fresh_export(tmp_path_factory) -> Path:
    "A copy of the notebooks, exported and cleaned again."
    folder = tmp_path_factory.mktemp("export")
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("nbs", "aligned_mllm"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    for path in (folder / "aligned_mllm").rglob("*.py"):
        path.unlink()
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([COMMANDS / command], cwd=folder, check=True, capture_output=True)
    return folder


def test_an_export_changes_nothing(fresh_export):
    here = {path.relative_to(ROOT): path.read_bytes() for path in (ROOT / "aligned_mllm").rglob("*.py")}
    there = {
        path.relative_to(fresh_export): path.read_bytes()
        for path in (fresh_export / "aligned_mllm").rglob("*.py")
    }
    assert set(here) == set(there), "a module has no notebook, or a notebook no module"
    assert [str(path) for path in here if here[path] != there[path]] == []


def test_notebooks_are_clean(fresh_export):
    assert [
        str(path.relative_to(ROOT))
        for path in NOTEBOOKS
        if path.read_bytes() != (fresh_export / path.relative_to(ROOT)).read_bytes()
    ] == []


def test_a_changed_notebook_would_be_noticed(fresh_export, tmp_path):
    shutil.copytree(fresh_export, tmp_path / "copy")
    target = tmp_path / "copy" / "nbs" / "lib" / LIBRARY[0].name
    notebook = nbformat.read(target, 4)
    next(cell for cell in notebook.cells if cell.source.startswith("#| export")).source += "\n# changed"
    nbformat.write(notebook, target)
    subprocess.run([COMMANDS / "nbdev_export"], cwd=tmp_path / "copy", check=True, capture_output=True)
    assert (tmp_path / "copy" / "aligned_mllm" / "core.py").read_bytes() != (
        fresh_export / "aligned_mllm" / "core.py"
    ).read_bytes()


# Which rooms (top-level modules and packages) a room may import, in the order in which data flows. A lesson
# may also import `worlds` and `models`: small images and models to try things on.
ALLOWED = {
    "core": "",
    "__init__": "",
    "data": "core",
    "models": "core data",
    "worlds": "core data models",
    "teachers": "core data models",
    "objectives": "core data models teachers",
    "evals": "core data models",
    "training": "core data models worlds teachers objectives evals",
    "figures": "core evals",
    "analysis": "core data models teachers evals figures",
    "reporting": "core data models teachers evals figures analysis",
    "experiments": "core data models worlds teachers objectives training evals figures analysis reporting",
    "apps": "core data models worlds teachers evals figures analysis",
    "train": "core training experiments",
    "reproduce": "core data teachers training evals reporting experiments",
    "cli": "core training experiments analysis reporting train",
    "site": "core",
}


def room_of(module: str) -> str:
    return module.split(".")[0]


def used_modules(source: str, modules: set[str]) -> set[str]:
    return {name for name in imported_modules(python(source)) if name in modules}


@pytest.mark.parametrize("path", LIBRARY, ids=module_of)
def test_notebook_and_module_share_their_name(path):
    folder = path.parent.relative_to(ROOT / "nbs" / "lib")
    number, name = path.stem.split("_", 1)
    assert number.isdigit() and module_of(path) == ".".join([*folder.parts, name])
    title = cells(path, "markdown")[0].replace("\\_", "_")  # Markdown would take __init__ for bold
    assert title.startswith(f"# {module_of(path)}\n")


def test_rooms_are_few_and_each_has_its_row():
    rooms = {room_of(module_of(path)) for path in LIBRARY}
    assert rooms == set(ALLOWED) and len(rooms) <= 20
    order = list(ALLOWED)
    upward = {
        room: above
        for room, row in ALLOWED.items()
        if (above := [other for other in row.split() if order.index(other) >= order.index(room)])
    }
    assert upward == {}


@pytest.mark.parametrize("path", LIBRARY, ids=module_of)
def test_imports_point_downhill(path):
    numbers = {module_of(other): int(other.stem.split("_")[0]) for other in LIBRARY}
    mine = module_of(path)
    allowed = {room_of(mine), *ALLOWED[room_of(mine)].split()}
    library = {name for source in exported(path) for name in used_modules(source, set(numbers))}
    assert {name for name in library if room_of(name) not in allowed} == set()
    every = {name for source in cells(path) for name in used_modules(source, set(numbers))} - {mine}
    assert {name for name in every if room_of(name) not in allowed | {"worlds", "models"}} == set()
    same = {name for name in every if room_of(name) == room_of(mine) and "." in name}
    assert {name for name in same if numbers[name] >= numbers[mine]} == set()


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_one_short_definition_a_cell(path):
    for source in exported(path):
        names = public_names(source)
        if "__main__" in source or not names:
            continue
        assert len(names) == 1 or re.match(r"#\| export\s*\n[A-Z_, ]+ =", source), (
            f"{path.name} defines {names} in one cell"
        )
        table = re.search(r"^[A-Z_]+(: .*)? = [\[{(]", source, re.M)  # a table of facts is read row by row
        limit = 140 if re.search(r"^class ", source, re.M) else 100 if table else 60
        lines = len(source.splitlines())
        assert lines <= limit, f"{path.name}: {names[0]} has {lines} lines"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_every_public_name_is_used_on_its_page(path):
    definitions = {name: source for source in exported(path) for name in public_names(source)}
    for name, home in definitions.items():
        others = [
            source
            for source in cells(path)
            if source is not home and not re.match(r"#\|\s*(hide|exporti)", source)
        ]
        assert any(re.search(rf"\b{name}\b", source) for source in others), f"{path.name} never uses {name}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_every_public_name_is_documented(path):
    for source in exported(path):
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_read_well(path):
    text = path.read_text(encoding="utf-8")
    all_cells = notebook(path).cells
    assert path.stat().st_size <= 300_000, f"{path.name} has {path.stat().st_size} bytes"
    prose = sum(cell.cell_type == "markdown" for cell in all_cells)
    assert prose >= len(all_cells) / 5, f"{path.name}: {prose} of {len(all_cells)} cells are prose"
    assert not re.search(r"import \*", "\n".join(cells(path))), "star import"
    assert not re.search(r"[\"' (](/work|/root|/home|/tmp/|/Users)", text), (
        f"{path.name} holds a path of one machine"
    )
    assert not any(
        output.output_type == "error"
        for cell in all_cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_nothing_is_loaded_by_pickle_or_remote_code(path):
    source = path.read_text(encoding="utf-8")
    assert "torch.load(" not in source and "pickle" not in source
    assert not re.search(r"trust_remote_code\s*=\s*True", source)


def test_code_is_in_order():
    """Short lines, no undefined or unused name, no file in an encoding that depends on the machine. nbdev
    writes __all__ itself, in longer lines."""
    files = [*MODULES, *sorted((ROOT / "tests").glob("*.py"))]
    options = ["--output-format", "concise", "--line-length", "110"]
    options += ["--select", "E,F", "--ignore", "E402"]
    encoding = ["--preview", "--config", "lint.explicit-preview-rules=true", "--extend-select", "PLW1514"]
    options += encoding
    found = subprocess.run([COMMANDS / "ruff", "check", *options, *files], capture_output=True, text=True)
    faults = re.findall(r"^(.+?):(\d+):\d+: (.+)", found.stdout, re.M)
    lines = {name: Path(name).read_text(encoding="utf-8").splitlines() for name, _, _ in faults}
    written = [f"{name}:{row}: {fault}" for name, row, fault in faults if not in_all(lines[name], int(row))]
    assert written == []


def in_all(lines: list[str], row: int) -> bool:
    "Whether a line, counted from 1, belongs to the list __all__ at the top of a module."
    cell = [number for number, line in enumerate(lines, 1) if line.startswith("# %%")][:2]
    return len(cell) == 2 and lines[cell[0] - 1] == "# %% auto #0" and cell[0] < row < cell[1]


def test_top_level_is_as_designed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in tracked.stdout.splitlines()}
    plain = {
        "settings.ini",
        "README.md",
        "nbs",
        "aligned_mllm",
        "data",
        "tests",
        "setup.py",
        "Makefile",
        "constraints.txt",
        "LICENSE",
    }
    assert {name for name in top if not name.startswith(".")} <= plain


def test_constraints_are_exact_and_cover_what_is_asked():
    pins = [
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line
    ]
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    kinds = ("requirements", "data_requirements", "dev_requirements")
    asked = " ".join(parser["DEFAULT"][kind] for kind in kinds).split()
    assert {re.split(r"[<>=\[]", name)[0].lower() for name in asked} <= set(pins)
    assert all(
        "==" in line and "+" not in line and "@" not in line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_failing_case_was_shown(path):
    "A cell that shows an error on purpose has printed it."
    silent = [
        cell.source[:80]
        for cell in notebook(path).cells
        if cell.cell_type == "code"
        and re.search(r"except InputError|with refusal\(", cell.source)
        and not re.search(r"^#\|\s*(export|hide|slow|eval)", cell.source, re.M)
        and not cell.outputs
    ]
    assert not silent
