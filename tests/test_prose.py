"""The prose of the library is plain English in the field's own terms: a table of odd phrases and of words
that have a standard term, searched in all markdown, docstrings, comments, messages and names, in the README
and in the tests.
`python tests/test_prose.py [FILE ...]` lists what it finds."""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
)
TESTS = sorted(path for path in (ROOT / "tests").glob("*.py") if path.name != Path(__file__).name)
FILES = [ROOT / "README.md", *NOTEBOOKS, *TESTS]

THING = (
    "(?:arm|assertion|audit|cell|class|column|config|control|curve|error|experiment|figure|file|folder|forecast|"
    "function|grid|index|interval|layer|library|line|log|loss|mask|measure|message|method|model|name|notebook|"
    "number|objective|package|page|paper|plan|probe|processor|projector|recipe|report|row|run|score|sentence|"
    "setting|table|teacher|term|test|title|tower|tutorial|CKNNA|CKA|CLIP|DINOv2)s?"
)
BE = "(?:is|are|was|were)"
VERB = "came|comes|stands|remains|follows|goes|lies|has|have|had|trains"  # of "what ...", beside BE
BEFORE = "of|from|for|by|with|in|on|beside|behind|before|after|all|and|over|than|everything"  # "... what is"
MORE = "longer|more|less|better|worse|higher|lower|larger|smaller|different|other|one|way|reason|evidence"
SIDE = "in|on|at|beside|behind|before|after|under|above|below|between|there|here|for itself"
OLD = (
    "therein thereof thereby hereby herein wherein whereof whence thence hither thither whilst lest nought "
    "anew aloud betimes henceforth hitherto forthwith aught ere heretofore"
).split()
PHRASES = {  # what to write instead: regular expressions, without regard to case
    "'If you have X, ...' or 'users who ...'": [
        r"^who\b(?!.*\?)",
        r"\bwhoever\b",
        r"[,;:] who (?:has|wants|needs|reads|knows)\b",
    ],
    "name the thing instead of 'what is ...'": [
        rf"^what (?!{BE} (?:above|below|left|right|where|it)\b)"  # questions of the drawn scenes
        rf"(?:{BE}|{VERB}|does)\b(?!.*\?| in\b| missing\b)",
        rf"\b(?:{BEFORE}) what (?:{BE}(?! in\b| drawn\b)|{VERB}|trained|counts|can)\b",
        r"\bwhat came\b(?! in)",
        r"\bwhat goes\b",
    ],
    "'does not have' or 'does not exist'": [r"\b(?:has|have|had) not(?:[.,;:)]|$)"],
    "'is not a ...'": [rf"(?<!there )\b{BE} no (?!{MORE})\w"],
    "'cannot be compared'": [r"\bdo(?:es)? not compare(?:[.,;:]|$)"],
    "'depended on'": [r"\b(?:hang|hangs|hung|hanging) on\b"],
    "'continue', 'resume', 'wrap' or 'follow'": [
        r"\b(?:go|goes|went|going) on\b(?! (?:record|to|the))",
        r"\bwith the same words\b",
    ],
    "'if there is none'": [r"\bInputError where\b", rf"\bwhere there {BE} (?:none|no)\b"],
    "'still', 'anyway', 'nevertheless'": [r"\ball the same\b"],
    "'in one row', 'stacked', 'one by one'": [r"\bone (?:after|behind|beside|above|below) the other\b"],
    "agreement of number": [r"\bits (?:grid|box|label|layer|seed|teacher|weight) are\b"],
    "things do not speak: 'shows', 'reports', 'estimates', 'documents'": [
        rf"\b{THING} (?:(?:then|also|itself|only|never|not|does not|do not) )?"
        r"(?:tells?|says?|told|said|speaks?)\b(?! otherwise)",
        rf"\b(?:{BE}|be|been) (?:told|asked (?:of|for))\b",
        r"\b(?:it|which|that) (?:tells|says) (?:so|why|which|what|for|how|where|them|us)\b",
        r"\basked of\b",
        r"\bsaid (?:of|to be|by)\b",
        r"\btold (?:as|by|in|of|to|beside|with)\b",
        r"\bas .{1,40} tells\b",
    ],
    "'checksum'": [r"\bseal(?:s|ed|ing)?\b"],
    "'estimate', 'dry run' or 'smoke test'": [r"\b(?:rehears(?:al|als|e|ed)|forecasts?|previews?)\b"],
    "'examined', 'used', 'read' or 'attended to'": [
        r"\blook(?:s|ed|ing)? at\b",
        r"\bat every look\b",
        r"\blooked for\b",
    ],
    "'decide' or 'finish'": [r"\bsettl(?:e|es|ed|ing)\b"],
    "'with a chat template', 'normalized' ...": [r"\b(?:un)?dressed\b"],
    "'fix', 'correct', 'repair'": [r"\bmend(?:s|ed|ing)?\b"],
    "'is in', 'is next to', 'precedes', 'follows'": [
        rf"\b(?:stand|stands|stood|standing) (?:{SIDE})\b",
        r"\b(?:lie|lies) (?:beside|below|there|here|in CODE)\b",
        r"\bas (?:it|they) stands?\b",
    ],
    "a current word": [
        rf"\b(?:{'|'.join(OLD)})\b",
        r"\b(?:too dear|in vain|gone? astray|of the same make|of its kind)\b",
        r"\b(?:asks?|told|tells|for|of) nobody\b",
        r"\bnobody wrote\b",
    ],
}
PHRASES = {advice: [re.compile(each, re.I) for each in patterns] for advice, patterns in PHRASES.items()}

# Names that nobody would guess, with what to call them.
NAMES = {
    "told": "description, text, report",
    "looked": "used, examined",
    "settle": "finish, decide, adapt",
    "seal": "checksum",
    "sealed": "checksum",
    "dressed": "formatted, with_template",
    "came": "found",
    "carry_out": "train, run",
    "words_of": "vocabulary, tokens_of",
    "one_each": "unique, first_of_each",
    "processed": "name what was done",
    "rehearse": "smoke_test",
    "rehearsal": "smoke_test",
    "forecast": "estimate",
    "preview": "dry_run",
}
# Good as a local variable, not as a name that others call or set.
PUBLIC_NAMES = {"below": "lower, path_inside", "others": "partners, rest", "asked": "requested, questions"}


def sentences(text: str) -> list[str]:
    "The sentences of a text, without code, formulas, addresses and markup of tables."
    text = re.sub(r"^```.*?^```|^( {4}|\t).*$|\$\$.*?\$\$", " ", text, flags=re.S | re.M)
    text = re.sub(r"`[^`\n]*`", "CODE", text)
    text = re.sub(r"\$[^$\n]+\$", "FORMULA", text)
    text = re.sub(r"\]\([^)]*\)|https?://\S+|<[^>\n]+>|[\[\]*#>]+", " ", text)
    parts = re.split(r"(?<=[.!?:;])\s+|\s*\|\s*|\n\s*\n|\n\s*-\s", text)
    return [joined for part in parts if (joined := " ".join(part.split()))]


def odd(text: str) -> list[tuple[str, str]]:
    "The odd sentences of a text, each with advice."
    return [
        (sentence, advice)
        for sentence in sentences(text)
        for advice, patterns in PHRASES.items()
        if any(pattern.search(sentence) for pattern in patterns)
    ]


def plain(source: str) -> str:
    "The code of a cell without magics and directives."
    lines = source.splitlines()
    return "\n".join("" if line.lstrip().startswith(("%", "!", "#|")) else line for line in lines)


def texts(source: str) -> list[str]:
    "Strings of several words (docstrings, messages, labels) and comments of a cell of code."
    source = plain(source)
    found = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count(" ") >= 2
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return found + [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]


def odd_names(source: str) -> list[tuple[str, str]]:
    "Odd names in code, each with advice."
    tree = ast.parse(plain(source))
    found = set()
    for node in ast.walk(tree):
        every = {
            ast.FunctionDef: "name",
            ast.ClassDef: "name",
            ast.arg: "arg",
            ast.keyword: "arg",
            ast.Attribute: "attr",
            ast.Name: "id",
        }
        name = getattr(node, every[type(node)]) if type(node) in every else None
        if name in NAMES:
            found.add((name, NAMES[name]))
        if name in PUBLIC_NAMES and not isinstance(node, ast.Name):
            found.add((name, PUBLIC_NAMES[name]))
    return sorted(found)


def findings(path: Path) -> list[str]:
    "Everything odd in a file: cell, sentence or name, and advice."
    if path.suffix == ".md":
        return [f"{sentence}  <- {advice}" for sentence, advice in odd(path.read_text(encoding="utf-8"))]
    if path.suffix == ".py":
        source = path.read_text(encoding="utf-8")
        hits = [hit for part in texts(source) for hit in odd(part)]
        names = [hit for hit in odd_names(source) if hit[0] in NAMES]
        return [f"{text}  <- {advice}" for text, advice in [*hits, *names]]
    found = []
    for cell in nbformat.read(path, 4).cells:
        parts = [cell.source] if cell.cell_type == "markdown" else texts(cell.source)
        hits = [hit for part in parts for hit in odd(part)]
        hits += odd_names(cell.source) if cell.cell_type == "code" else []
        found += [f"[{cell.get('id', '')}] {text}  <- {advice}" for text, advice in hits]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_plain(path):
    found = findings(path)
    assert not found, "\n".join(["", *found])


def page_names(path: Path) -> list[str]:
    "Names of pages and notebooks in backticks: `lib/data.records`, `nbs/runs/inside.ipynb`."
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, 4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    return re.findall(r"`(?:nbs/)?((?:lib|tutorials|explanations|runs)/[a-z][\w./]*\w)`", text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_that_the_prose_names_exist(path):
    from aligned_mllm.site.pages import find_pages, page_name, room_of

    known = find_pages(ROOT / "nbs")
    rooms = {f"lib/{room_of(name)}" for name in known if name.startswith("lib/")}
    named = [name for name in page_names(path) if not name.startswith("runs/scenes")]
    missing = [name for name in named if page_name(name) not in known and name not in rooms]
    assert [name for name in missing if not (ROOT / name).exists()] == []
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, 4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        links = re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text)
        assert [link for link in links if not (path.parent / link.split("#")[0]).exists()] == []


BAD = [
    "Who has NLVR can name it.",
    "A layer that the model has not, is refused.",
    "The teacher and its grid are shown.",
    "Values of different kinds do not compare.",
    "What is lost is what hung on the order.",
    "Started again with the same words it goes on.",
    "The forecast tells the memory.",
    "The plan says how the teacher meets the student.",
    "This is asked of finished runs.",
    "The teacher is sealed by a checksum.",
    "It was chosen before any scene was looked at.",
    "A control is no replication of it.",
    "The numbers stand beside each other.",
    "Nobody wrote it.",
    "Raises InputError where there is none.",
]
GOOD = [
    "If you have a copy of NLVR, set NLVR_FOLDER to its folder.",
    "Values of different kinds cannot be compared.",
    "There is no layer 9 in this model.",
    "Run the same command again, and the training resumes.",
    "what is above red circle",
    "What does the teacher see in a padded patch?",
    "The checksum is computed before the first step and verified after the last.",
]


@pytest.mark.parametrize("sentence", BAD)
def test_an_odd_sentence_is_found(sentence):
    assert odd(sentence)


@pytest.mark.parametrize("sentence", GOOD)
def test_a_plain_sentence_is_left_alone(sentence):
    assert odd(sentence) == []


def test_messages_comments_and_names_are_searched():
    source = "\n".join(
        [
            "def told(below):",
            '    "Who has it can name it."',
            '    raise ValueError("the forecast tells this")  # is sealed',
        ]
    )
    assert len([hit for text in texts(source) for hit in odd(text)]) >= 3
    assert [name for name, _ in odd_names(source)] == ["below", "told"]
    assert odd("Code such as `looked at` and $looked at$ is left alone.") == []


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else FILES:
        for line in findings(path.resolve()):
            print(f"{path.resolve().relative_to(ROOT)}: {line}")
