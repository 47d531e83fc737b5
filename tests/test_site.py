"""The documentation as it was built: every link leads somewhere, nothing comes from outside, every public
name has its place, and in a browser figures react, the search finds, and light and dark both show.
Screenshots are kept in _proc/screenshots."""

import ast
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "_proc" / "screenshots"
MODULES = sorted(
    path for path in (ROOT / "aligned_mllm").rglob("*.py") if path.name not in ("__init__.py", "_modidx.py")
)
TUTORIALS = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))
FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def tracked() -> str:
    return subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def site() -> Path:
    "The site, brought up to date: seconds after `make docs`, minutes otherwise."
    if not importlib.util.find_spec("myst_nb"):
        pytest.skip("NOT TESTED: the documentation needs sphinx and myst-nb, of the extra 'dev'")
    before = tracked()
    made = subprocess.run(
        [sys.executable, "-m", "aligned_mllm.site.build"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert made.returncode == 0, made.stderr[-3000:]
    assert tracked() == before, "building the documentation changed files of the repository"
    return ROOT / "_docs"


class Page(HTMLParser):
    "Names, addresses that are loaded or linked, and the words of the article of a page."

    def __init__(self, path: Path):
        super().__init__()
        self.ids = set()
        self.links = []
        self.loaded = []
        self.words = []
        self.open = []  # each with whether it lies in the article, and whether it is left out there
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        self.loaded += [values[name] for name in ("src", "data", "poster", "srcset") if values.get(name)]
        if (
            tag == "link"
            and values.get("href")
            and values.get("rel") not in ("index", "search", "next", "prev", "canonical")
        ):
            self.loaded.append(values["href"])
        if tag not in ("img", "br", "hr", "meta", "link", "input", "source", "col"):
            _, article, left_out = self.open[-1] if self.open else ("", False, False)
            article |= tag in ("article", "h1")
            left_out |= tag in ("script", "style", "button") or "headerlink" in (values.get("class") or "")
            self.open.append((tag, article, left_out))

    def handle_endtag(self, tag):
        if self.open and self.open[-1][0] == tag:
            self.open.pop()
        elif tag in [name for name, *_ in self.open]:
            while self.open.pop()[0] != tag:
                pass

    def handle_data(self, data):
        if self.open and self.open[-1][1:] == (True, False):
            self.words += data.split()


@functools.cache
def page(path: Path) -> Page:
    return Page(path)


def broken_links(folder: Path) -> list[str]:
    "Links and anchors of the pages below a folder that lead nowhere."
    found = []
    exists = functools.cache(Path.is_file)
    for path in sorted(folder.rglob("*.html")):
        for address in [*page(path).links, *page(path).loaded]:
            parts = urlparse(address)
            if parts.scheme or parts.netloc:
                continue
            target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            if not exists(target):
                found.append(f"{path.relative_to(folder)}: {address}")
            elif (
                parts.fragment
                and target.suffix == ".html"
                and unquote(parts.fragment) not in page(target).ids
            ):
                found.append(f"{path.relative_to(folder)}: {address} (no such place)")
    return found


def from_outside(folder: Path) -> list[str]:
    "What pages and style sheets of a folder would fetch from elsewhere."
    found = [
        f"{path.name}: {address}"
        for path in folder.rglob("*.html")
        for address in page(path).loaded
        if urlparse(address).netloc
    ]
    for path in folder.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        found += [
            f"{path.name}: {address}"
            for address in re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""", text)
            if urlparse(address).netloc
        ]
    return found


def public_names(path: Path) -> list[str]:
    "__all__ of a module."
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


# the files


def test_every_link_leads_somewhere(site):
    assert broken_links(site) == []


def test_nothing_is_loaded_from_outside(site):
    assert from_outside(site) == []


def test_faults_of_a_site_would_be_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top">a</h1><a href="b.html">b</a><a href="#top">c</a><a href="#bottom">d</a><a href="https://e.example">e</a>'
    )
    assert (
        broken_links(tmp_path) == ["a.html: b.html", "a.html: #bottom (no such place)"]
        and from_outside(tmp_path) == []
    )
    (tmp_path / "c.html").write_text(
        '<script src="https://cdn.example/x.js"></script><link rel="stylesheet" href="//fonts.example/y.css">'
    )
    (tmp_path / "d.css").write_text(
        "@import 'https://fonts.example/z.css'; a { background: url(data:image/png;base64,AA) }"
    )
    assert len(from_outside(tmp_path)) == 3


def test_the_front_page_is_the_readme(site, tmp_path):
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark").enable("table").render((ROOT / "README.md").read_text(encoding="utf-8"))
    (tmp_path / "readme.html").write_text(f"<article>{html}</article>", encoding="utf-8")
    expected = Page(tmp_path / "readme.html").words
    found = page(site / "index.html").words
    assert found[: len(expected)] == expected and len(found) == len(expected)


def test_names_in_the_table_of_places_lead_to_pages_and_plain_words_nowhere(site):
    html = (site / "index.html").read_text(encoding="utf-8")
    names = ("main_job", "inside", "first_hour", "methods", "ask", "compare")
    leads = {
        name: re.findall(rf'href="([^"]*)"><code[^>]*><span class="pre">{name}</span></code></a>', html)
        for name in names
    }
    assert {name: {*found} for name, found in leads.items()} == {
        "main_job": {"runs/main_job.html"},
        "inside": {"runs/inside.html"},
        "first_hour": {"tutorials/first_hour.html"},
        "methods": {"explanations/methods.html"},
        "ask": set(),
        "compare": set(),
    }
    assert not re.findall(r'href="lib/[^"]*#[^"]*"><code', html)


def test_every_path_that_the_readme_names_exists():
    paths = {*re.findall(r"\bnbs/[\w./]*\w", (ROOT / "README.md").read_text(encoding="utf-8"))}
    assert len(paths) > 10 and [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_public_name_has_its_place(site, path):
    name = path.relative_to(ROOT / "aligned_mllm").with_suffix("").as_posix().replace("/", ".")
    source = page(site / "lib" / f"{name}.html")
    assert [
        each for each in public_names(path) if each.lower() not in source.ids or each not in source.words
    ] == []


def test_the_readme_describes_every_room_of_the_library_in_order():
    from test_rules import ALLOWED

    from aligned_mllm.site.pages import ROOMS

    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Where things are")[1].split("\n\n")[2]
    rooms = re.findall(r"^\| `(\w+)` \| .+ \|$", table, re.M)
    assert rooms == list(ALLOWED) and [room for room in ROOMS if room in ALLOWED] == rooms


def side_bar(site: Path) -> list[tuple[str, list[str]]]:
    "Captions of the side bar of the front page, each with the pages below it."
    html = (site / "index.html").read_text(encoding="utf-8")
    bar = html[html.index('class="sidebar-tree"') :].split("</div>")[0]
    groups = re.findall(r'class="caption-text">([^<]*)</span></p>(.*?</ul>)', bar, re.S)
    return [(caption, re.findall(r'href="([^"#]+)\.html"', pages)) for caption, pages in groups]


def test_side_bar_has_the_rooms_of_the_library_in_order_and_their_pages_by_number(site):
    from test_rules import ALLOWED, LIBRARY, module_of

    expected = [
        (room, [f"lib/{name}" for name in map(module_of, LIBRARY) if name.split(".")[0] == room])
        for room in ALLOWED
    ]
    found = side_bar(site)
    assert [caption for caption, _ in found][:2] == ["Tutorials", "Explanations"] and found[-1][0] == "Runs"
    assert found[2:-1] == expected


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_every_tutorial_was_executed(site, path):
    (executed,) = (ROOT / "_proc" / "executed").glob(f"{path.stem}-*.ipynb")
    before, after = (nbformat.read(each, 4).cells for each in (path, executed))
    assert [cell.source for cell in before] == [cell.source for cell in after]
    cells = [
        cell
        for cell in after
        if cell.cell_type == "code" and "skip-execution" not in cell.metadata.get("tags", [])
    ]
    assert cells and all(cell.execution_count for cell in cells)
    shown = [
        output.data["text/plain"].split()[0]
        for cell in cells
        for output in cell.outputs
        if not cell.source.startswith("#| hide")
        and output.output_type == "execute_result"
        and not {"text/html", "image/png", "application/vnd.plotly.v1+json"} & {*output.data}
    ]
    assert {*shown} <= {*page(site / "tutorials" / f"{path.stem}.html").words}


def test_measured_numbers_of_the_paper_index_are_those_of_the_run(site):
    import pandas as pd

    scores = pd.read_csv(ROOT / "nbs" / "runs" / "main_job" / "scores.csv")
    means = scores.groupby(["arm", "seed"]).accuracy.mean().unstack("seed")
    text = " ".join(page(site / "explanations" / "paper_index.html").words)
    for arm, baseline in (("viral", "plain"), ("other_image", "plain"), ("viral", "other_image")):
        assert f"{100 * (means.loc[arm] - means.loc[baseline]).mean():+.1f} (" in text
    cells = text.split("measured here")
    assert "VIRAL − control" in text and len(cells) > 10


def test_what_is_no_repository_and_what_is_no_site_are_left_alone(tmp_path, capsys, monkeypatch):
    from aligned_mllm.site.build import main

    monkeypatch.chdir(ROOT)
    assert main(["--root", str(tmp_path)]) == 2 and "no notebooks" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["--output", str(tmp_path)]) == 2 and "not an earlier site" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


# in the browser


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        "Nothing."


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="NOT TESTED in a browser: playwright is missing"
    )
    with sync_api.sync_playwright() as play:
        try:
            found = play.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
        except sync_api.Error as error:
            first = str(error).splitlines()[0]
            pytest.skip(f"NOT TESTED in a browser: Chromium does not start ({first}); see 'make browser'")
        yield found
        found.close()


@pytest.fixture(scope="module")
def context(browser):
    "What all tabs share: the memory of the browser."
    return browser.new_context(reduced_motion="reduce")


@pytest.fixture(scope="module")
def faults() -> list[str]:
    "Requests to elsewhere, requests that failed, and errors of the console."
    return []


@pytest.fixture(scope="module")
def tabs() -> dict:
    "Tabs that stay open for the next test of their page, by its name."
    return {}


@pytest.fixture
def opened(context, address, faults, tabs):
    "Opens pages; fails at the end for faults of any tab."

    def open_page(name: str, scheme: str = "light", width: int = 1280, base: str = address):
        tab = context.new_page()
        adjust(tab, scheme, width)

        def check(request):
            if not request.url.startswith((base, "data:", "blob:")):
                faults.append(f"{name} asks for {request.url}")

        def listen(message):
            if message.type == "error":
                faults.append(f"{name}: {message.text}")

        tab.on("request", check)
        tab.on("requestfailed", lambda request: faults.append(f"{name}: {request.url} failed"))
        tab.on("console", listen)
        tab.on("pageerror", lambda error: faults.append(f"{name}: {error}"))
        tab.goto(urljoin(base, name), wait_until="networkidle")
        return tab

    yield open_page
    for tab in context.pages:
        if tab not in tabs.values():
            tab.close()
    found = [*faults]
    faults.clear()
    assert found == []


@pytest.fixture
def seen(opened, tabs):
    "Shows pages to tests that only look: a page is loaded once for all its widths and themes."

    def show(name: str, scheme: str = "light", width: int = 1280):
        if name not in tabs:
            tabs[name] = opened(name, scheme, width)
        adjust(tabs[name], scheme, width)
        return tabs[name]

    return show


def adjust(tab, scheme: str, width: int) -> None:
    "Theme and width of a tab; figures are drawn again at the next frame."
    tab.bring_to_front()
    tab.emulate_media(color_scheme=scheme)
    if tab.viewport_size != {"width": width, "height": 900}:
        tab.set_viewport_size({"width": width, "height": 900})
    tab.evaluate(FRAMES)


def keep(tab, name: str, **options):
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=SHOTS / f"{name}.png", **options)


def brightness(tab, selector: str, of: str = "color") -> float:
    "0 (black) to 255 of a computed colour."
    place = tab if selector == ":scope" else tab.locator(selector).first
    numbers = re.findall(r"[\d.]+", place.evaluate(f"node => getComputedStyle(node)['{of}']"))
    return sum(map(float, numbers[:3])) / 3


@pytest.mark.parametrize("scheme", ["dark", "light"])  # loaded dark, and changed to light
@pytest.mark.parametrize(
    "name",
    [
        "index",
        "tutorials/new_objective",
        "explanations/methods",
        "explanations/paper_index",
        "lib/analysis.cka",
        "runs/main_job",
    ],
)
def test_pages_show_in_light_and_dark_and_on_a_telephone(seen, name, scheme):
    tab = seen(f"{name}.html", scheme)
    ground = brightness(tab, "body", "backgroundColor")
    text = brightness(tab, "article p")
    assert abs(ground - text) > 120 and (ground > 128) == (scheme == "light")
    for figure in tab.locator(".plotly-figure").all():
        figure.scroll_into_view_if_needed()
        figure.locator(".main-svg").first.wait_for()
        for letters in figure.locator("svg :is(.gtitle, .xtitle, .legendtext)").all()[:1]:
            assert abs(ground - brightness(letters, ":scope", "fill")) > 80
    keep(tab, f"{name.replace('/', '_')}_{scheme}", full_page=True)
    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    keep(tab, f"{name.replace('/', '_')}_{scheme}_narrow")


def test_figures_react(opened):
    tab = opened("runs/main_job.html")
    figure = tab.locator(".plotly-figure").first
    figure.scroll_into_view_if_needed()
    figure.locator(".legendtoggle").first.wait_for()
    visible = (
        "node => node.querySelector('.drawn').data.filter(trace => trace.visible === 'legendonly').length"
    )
    assert figure.evaluate(visible) == 0
    figure.locator(".legendtoggle").first.click()
    tab.wait_for_function(
        "document.querySelector('.plotly-figure .drawn').data.some(trace => trace.visible === 'legendonly')"
    )
    assert figure.evaluate(visible) >= 1
    drawn = figure.evaluate("node => node.querySelector('.drawn').data[0].y.length")
    stored = json.loads(figure.locator("script").inner_text() or figure.locator("script").text_content())
    assert drawn == len(stored["data"][0]["y"])


@pytest.mark.parametrize("name", ["index", "lib/site.build", "tutorials/own_model", "explanations/shapes"])
def test_no_code_is_cut_off(seen, name):
    tab = seen(f"{name}.html", width=1300)
    cut_off = "node => node.scrollWidth > node.clientWidth + 1"
    cut = f"nodes => nodes.filter({cut_off}).map(node => node.textContent.slice(0, 80))"
    assert tab.locator("article pre").count() > 2 and tab.locator("article pre").evaluate_all(cut) == []
    assert "\n\n\n\n" not in tab.locator("article .highlight pre").first.text_content()
    keep(tab, f"{name.replace('/', '_')}_code", full_page=name == "index")


@pytest.mark.parametrize("width", [1300, 1000])
@pytest.mark.parametrize(
    "name", ["tutorials/first_hour", "explanations/methods", "lib/analysis.entropy", "lib/analysis.pca"]
)
def test_titles_of_figures_are_not_cut_off(seen, name, width):
    tab = seen(f"{name}.html", width=width)
    for figure in tab.locator(".plotly-figure").all():
        figure.scroll_into_view_if_needed()
        title = figure.locator("svg .gtitle").first
        title.wait_for()
        text = title.bounding_box()
        room = figure.locator(".main-svg").first.bounding_box()
        assert (
            room["x"] <= text["x"]
            and text["x"] + text["width"] <= room["x"] + room["width"] + 1
            and text["y"] >= room["y"]
        )
        keep(figure, f"{name.replace('/', '_')}_figure_{width}")


def test_the_switch_of_the_theme_takes_figures_along(opened):
    tab = opened("runs/main_job.html")
    figure = tab.locator(".plotly-figure").first
    figure.locator("svg .gtitle").first.wait_for()
    light = brightness(figure, "svg .gtitle", "fill")
    for _ in range(3):
        tab.locator(".theme-toggle-content .theme-toggle").click()
        if tab.evaluate("document.body.dataset.theme") == "dark":
            break
    tab.evaluate("localStorage.clear()")  # the next tab is as its own test wants it
    tab.wait_for_timeout(500)
    assert brightness(figure, "svg .gtitle", "fill") > light + 80


@pytest.mark.parametrize("how", ["served", "as files"])
def test_the_search_finds_a_name(opened, site, how):
    base = {} if how == "served" else {"base": f"file://{site}/"}
    tab = opened("index.html", **base)
    tab.locator(".sidebar-search").fill("cknna_by_layer")
    tab.keyboard.press("Enter")
    result = tab.locator("#search-results a", has_text="analysis.cknna_layers > cknna_by_layer").first
    result.wait_for()
    keep(tab, f"search_{how.replace(' ', '_')}")
    result.click()
    tab.locator(":is(h2, h3)", has_text="cknna_by_layer").wait_for()
    assert urlparse(tab.url).path.endswith("/lib/analysis.cknna_layers.html")


def test_formulas_are_drawn_in_the_font_for_them(seen):
    tab = seen("explanations/methods.html")
    assert tab.evaluate("document.fonts.load('16px \"STIX Two Math\"').then(found => found.length)") == 1
    sizes = tab.locator("math[display=block]").evaluate_all(
        "nodes => nodes.map(node => node.getBoundingClientRect()).map(box => [box.width, box.height])"
    )
    assert len(sizes) >= 4 and all(width > 60 and height > 15 for width, height in sizes)
    fraction = tab.locator("math[display=block] mfrac").first.bounding_box()
    assert fraction["height"] > 25


def test_the_source_of_a_definition_unfolds(opened):
    tab = opened("lib/objectives.alignment.html")
    source = tab.locator("details.hide").first
    assert not source.locator("pre").is_visible()
    source.locator("summary").click()
    assert "def minus_cosine" in source.locator("pre").inner_text()
    keep(tab, "source_unfolded")
