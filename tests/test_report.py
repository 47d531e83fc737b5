"""The finding in its situations, and a page whose numbers are those of the tables, that escapes text and
fetches nothing."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from aligned_mllm.core import InputError, load_json, save_json
from aligned_mllm.evals.statistics import interval, mean_over_categories, paired
from aligned_mllm.experiments.arms import ARMS, MAJORITY, arm_facts
from aligned_mllm.reporting.experiment_report import print_summary, report, summary_table
from aligned_mllm.reporting.finding import contrasts_table, finding, register_looks

NOISE = [0.004, -0.003, 0.001, -0.002]
PLAN = {
    "recipe": "toy",
    "seeds": [0, 1, 2, 3],
    "arms": ["plain", "viral", "other_image"],
    "lines": ["blind", "majority"],
    "facts": {
        arm.name: arm_facts(arm)
        for arm in [*(ARMS[name] for name in ("plain", "viral", "other_image", "blind")), MAJORITY]
    },
    "command": "run it",
    "settings": {"steps": 7},
    "environment": {
        "commit": "abc123",
        "versions": {"torch": "2.0"},
        "python": "3.11",
        "machine": "m",
        "threads": 1,
    },
    "layers": 2,
    "aligned_layer": 1,
}
HOSTILE = '<script>alert("x")</script><img src="http://evil.example/a.png">'


def table(gains, seeds=4, categories=("count", "where")):
    """Scores: plain at 50 %, every other arm at 50 % + its gain (points), with a little noise of its own
    per seed."""
    rows = []
    for number, (arm, gain) in enumerate({"plain": 0, **gains}.items()):
        for seed in range(seeds):
            for category in categories:
                accuracy = 0.5 + gain / 100 + seed / 100 + np.roll(NOISE, number)[seed] * (number > 0)
                rows.append((seed, arm, category, int(round(1000 * accuracy)), 1000, accuracy))
    return pd.DataFrame(rows, columns=["seed", "arm", "category", "correct", "total", "accuracy"])


def points(scores, arm, baseline):
    differences = paired(scores, arm, baseline)
    return [100 * value for value in interval(differences.difference[differences.category == "mean"])]


def shown(value):
    return f"{value:+.1f}".replace("-", "−")


# the finding


def test_control_gains_as_much():
    scores = table({"viral": 6, "other_image": 8})
    text = finding(scores, PLAN)
    mean, low, high = points(scores, "viral", "plain")
    assert (
        f"adds {mean:.1f} points" in text
        and f"{shown(low)} to {shown(high)} over 4 seeds, which excludes zero" in text
    )
    high = points(scores, "viral", "other_image")[2]
    assert ("the gain does not come from what the teacher saw in this image" in text) == (high <= 0)
    assert high <= 0 or f"at most {high:.1f} of the {mean:.1f} points" in text
    assert (
        shown(points(scores, "viral", "other_image")[0]) in text
        and shown(points(scores, "other_image", "plain")[0]) in text
    )


def test_control_within_noise_of_viral():
    scores = table({"viral": 6.05, "other_image": 6})
    low, high = points(scores, "viral", "other_image")[1:]
    assert low < 0 < high
    assert "is not shown" in finding(scores, PLAN) and "does not come" not in finding(scores, PLAN)


def test_a_control_that_gains_something_does_not_settle_a_wide_interval():
    "VIRAL gains 8.2 points, the control 3.1; their difference of 5.9 has an interval that includes zero."
    rows = {"plain": (0.50, 0.50, 0.50), "viral": (0.58, 0.62, 0.57), "other_image": (0.53, 0.532, 0.531)}
    scores = pd.DataFrame(
        [(seed, arm, "where", value) for arm, values in rows.items() for seed, value in enumerate(values)],
        columns=["seed", "arm", "category", "accuracy"],
    )
    text = finding(scores, PLAN)
    assert "does not come" not in text and "at most" not in text and "3 seeds cannot tell" in text


def test_viral_beats_the_control():
    scores = table({"viral": 6, "other_image": 1})
    text = finding(scores, PLAN)
    assert "VIRAL beats the control" in text and "does not come" not in text
    assert shown(points(scores, "viral", "other_image")[0]) in text


def test_no_gain():
    text = finding(table({"viral": 0, "other_image": 0}), PLAN)
    assert "no gain" in text and "includes zero" in text and "come from" not in text


def test_harm():
    text = finding(table({"viral": -5, "other_image": 0}), PLAN)
    assert "takes 5.0 points from plain" in text and "excludes zero" in text and "adds" not in text


def test_one_seed_gives_no_interval():
    text = finding(table({"viral": 6, "other_image": 8}, seeds=1), PLAN)
    assert (
        "gives no interval" in text
        and "95 %" not in text
        and "nan" not in text
        and "does not come" not in text
    )


def test_single_types_are_named():
    scores = table({"viral": 0, "other_image": 0})
    scores.loc[(scores.arm == "viral") & (scores.category == "where"), "accuracy"] += 0.2
    text = finding(scores, PLAN)
    assert "clear on where (+20.0)" in text and "count (" not in text


def test_missing_arms():
    scores = table({"viral": 6, "other_image": 8})
    assert "No control was run" in finding(scores[scores.arm != "other_image"], PLAN)
    assert "nothing can be said about VIRAL" in finding(scores[scores.arm != "viral"], PLAN)
    only = finding(scores, {**PLAN, "arms": ["plain"]})
    assert "nothing can be said about a gain" in only and "51.5 %" in only


def test_the_sentences_are_made_for_any_method_baseline_and_control():
    "The same numbers under other names: no method is known to the report."
    names = {"plain": "base", "viral": "depth", "other_image": "shuffled"}
    facts = {
        names[name]: {**PLAN["facts"][name], "name": names[name], "label": names[name]} for name in names
    }
    facts["depth"]["baseline"] = "base"
    facts["shuffled"] |= {"control_of": "depth", "how": "whose maps were shuffled", "shows": "the maps"}
    facts["shuffled"]["baseline"] = "base"
    plan = {**PLAN, "arms": list(facts), "facts": facts}
    scores = table({"viral": 6, "other_image": 1})
    scores = scores.assign(arm=scores.arm.map(names))
    register_looks(plan)
    text = finding(scores, plan)
    assert "depth adds" in text and "to base training" in text and "whose maps were shuffled" in text
    assert "depth beats the control, and by this much the gain comes from the maps" in text
    assert "VIRAL" not in text and "teacher" not in text
    assert contrasts_table(scores, plan).loc["depth", "control"] == "shuffled"


# the page


class Reader(HTMLParser):
    "Collects the text of the tables, the visible text and all addresses of a page."

    def __init__(self):
        super().__init__()
        self.rows = []
        self.addresses = []
        self.scripts = 0
        self.text = []
        self.inside = []

    def handle_starttag(self, tag, attributes):
        self.inside.append(tag)
        self.scripts += tag == "script"
        self.addresses += [
            value
            for name, value in attributes
            if name in ("src", "href", "action", "data", "srcset", "poster")
        ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self.inside or "style" in self.inside:
            return
        self.text.append(data)
        if "td" in self.inside or "th" in self.inside:
            self.rows[-1][-1] += data


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def experiment(folder, scores=None, **files):
    "A small but complete experiment folder."
    (folder / "images").mkdir(parents=True)
    Image.fromarray(np.arange(300, dtype="uint8").reshape(10, 10, 3)).save(folder / "images" / "0.png")
    scores = (
        table({"viral": 6, "other_image": 8, "blind": -20, "majority": -25}) if scores is None else scores
    )
    scores.to_csv(folder / "scores.csv", index=False)
    pd.DataFrame(
        [
            (seed, arm, step, "accuracy", 0.4 + step / 1000)
            for seed in (0, 1)
            for arm in PLAN["arms"]
            for step in (0, 50, 100)
        ],
        columns=["seed", "arm", "step", "name", "value"],
    ).to_csv(folder / "curves.csv", index=False)
    pd.DataFrame(
        [
            (0, arm, layer, reference, 0.3, 0.01, 0.02)
            for arm in ("plain", "viral")
            for layer in range(3)
            for reference in ("encoder", "teacher")
        ],
        columns=["seed", "arm", "layer", "reference", "value", "null_low", "null_high"],
    ).to_csv(folder / "cknna.csv", index=False)
    pd.DataFrame(
        [
            (seed, arm, "instruction", 60 + 2 * seed, 500.0, 12345, 300.0)
            for seed in (0, 1)
            for arm in PLAN["arms"]
        ],
        columns=[
            "seed",
            "arm",
            "stage",
            "seconds",
            "samples_per_second",
            "trainable_parameters",
            "peak_memory_mib",
        ],
    ).to_csv(folder / "cost.csv", index=False)
    example = {
        "images": ["images/0.png"],
        "question": "<image>\ncount circle",
        "expected": "2",
        "category": "count",
        "answers": {"plain": "1", "viral": "2 ", "other_image": "2"},
    }
    save_json(files.get("examples", [example]), folder / "examples.json")
    save_json(files.get("unlearnt", []), folder / "unlearnt.json")
    save_json(files.get("plan", PLAN), folder / "plan.json")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return report(experiment(tmp_path_factory.mktemp("experiment") / "toy"))


def test_every_score_of_the_page_is_that_of_the_table(page):
    scores = pd.read_csv(page.parent / "scores.csv")
    rows = {row[0]: row[1:] for row in read(page).rows if len(row) == 4 and "±" in row[-1]}
    names = {
        "plain": "plain",
        "viral": "VIRAL",
        "other_image": "other image (control)",
        "blind": "blind (without images)",
        "majority": "commonest answer",
    }
    assert set(rows) == set(names.values())
    for arm, label in names.items():
        values = [
            scores.accuracy[(scores.arm == arm) & (scores.category == category)]
            for category in ("count", "where")
        ]
        values.append(mean_over_categories(scores).query("arm == @arm").accuracy)
        for cell, value in zip(rows[label], values):
            mean, _, high = interval(100 * value)
            assert cell == f"{mean:.1f} ± {high - mean:.1f}"


def test_every_point_of_the_figures_is_that_of_the_table(page):
    text = page.read_text(encoding="utf-8").split("</head>")[1]
    figures = re.findall(r'Plotly\.newPlot\(\s*"(\w+)",\s*(\[.*?\]),\s*(\{"template")', text, flags=re.S)
    traces = {name: [trace for trace in json.loads(data)] for name, data, _ in figures}
    assert set(traces) == {"scores", "differences", "curves", "cknna"}
    scores = pd.read_csv(page.parent / "scores.csv")
    viral = next(trace for trace in traces["scores"] if trace.get("name") == "VIRAL")
    means = [
        100 * scores[(scores.arm == "viral") & (scores.category == name)].accuracy.mean()
        for name in ("count", "where")
    ]
    assert viral["y"] == pytest.approx([*means, np.mean(means)], abs=0.006)
    gain = next(trace for trace in traces["differences"] if trace.get("name") == "VIRAL")
    mean, _, high = points(scores, "viral", "plain")
    assert gain["y"][-1] == pytest.approx(mean, abs=0.006)
    assert gain["error_y"]["array"][-1] == pytest.approx(high - mean, abs=0.006)


def test_cost_and_repetition(page):
    reader = read(page)
    cost = next(row for row in reader.rows if row[:2] == ["VIRAL", "instruction"])
    assert cost[2:] == ["2", "61", "1.00", "500", "12,345", "300"]
    facts = dict(row for row in reader.rows if len(row) == 2)
    assert facts["command"] == "run it" and facts["seeds"] == "0, 1, 2, 3" and facts["commit"] == "abc123"
    assert '"steps": 7' in "".join(reader.text)


def test_finding_and_examples_are_on_the_page(page):
    reader = read(page)
    text = "".join(reader.text)
    assert finding(pd.read_csv(page.parent / "scores.csv"), PLAN) in text
    marks = {row[0]: row[2] for row in reader.rows if len(row) == 3 and row[2][:1] in "✓✗"}
    assert marks == {"plain": "✗ wrong", "VIRAL": "✓ right", "other image (control)": "✓ right"}
    assert "count circle" in text and "<image>" not in text
    (image,) = [address for address in reader.addresses if address.startswith("data:image/png;base64,")]
    assert base64.b64decode(image.split(",")[1])[:4] == b"\x89PNG"


def test_nothing_is_fetched(page):
    reader = read(page)
    assert all(address.startswith("data:") for address in reader.addresses)
    text = page.read_text(encoding="utf-8")
    assert (
        "default-src 'none'" in text
        and "<link" not in text.split("</head>")[1]
        and "@import" not in text.split("<script>")[0]
    )
    assert len(text) < 8_000_000


def test_hostile_text_is_shown_and_not_run(tmp_path, page):
    scores = table({"viral": 6, "other_image": 8, HOSTILE: 1}, categories=("count", HOSTILE))
    example = {
        "images": ["images/0.png"],
        "question": HOSTILE,
        "expected": HOSTILE,
        "category": HOSTILE,
        "answers": {"plain": HOSTILE},
    }
    plan = {
        **PLAN,
        "recipe": HOSTILE,
        "arms": [*PLAN["arms"], HOSTILE, "not " + HOSTILE],
        "command": HOSTILE,
        "settings": {HOSTILE: HOSTILE},
        "environment": {"commit": HOSTILE, "versions": {HOSTILE: HOSTILE}},
        "limits": [HOSTILE],
    }
    path = report(experiment(tmp_path / "hostile", scores, examples=[example], unlearnt=[HOSTILE], plan=plan))
    reader = read(path)
    assert all(address.startswith("data:") for address in reader.addresses)
    assert reader.scripts == read(page).scripts
    assert "".join(reader.text).count(HOSTILE) >= 10
    own = path.read_text(encoding="utf-8").split("</head>")[1]
    assert HOSTILE not in own and "<script>alert" not in own
    drawn = re.sub(r'"legendgroup":"(\\.|[^"\\])*"', "", own)  # a key, drawn nowhere
    figures = drawn.replace("\\u003c", "<").replace("\\u003e", ">")
    assert "<script>alert" not in figures and "&lt;script&gt;alert" in figures


def test_unlearnt_and_unfinished_are_named(tmp_path):
    plan = {**PLAN, "arms": [*PLAN["arms"], "lora"]}
    folder = experiment(tmp_path / "half", unlearnt=["where"], plan=plan)
    for name in ("curves.csv", "cknna.csv", "cost.csv", "examples.json"):
        (folder / name).unlink()
    text = "".join(read(report(folder)).text)
    assert "Not learnt: on where" in text and "without scores so far: lora" in text
    for words in (
        "No accuracy curves",
        "CKNNA was not measured",
        "cost was not recorded",
        "No examples were stored",
    ):
        assert words in text


def test_one_seed_and_one_arm_make_a_page(tmp_path):
    scores = table({}, seeds=1)
    text = "".join(read(report(experiment(tmp_path / "one", scores, plan={**PLAN, "arms": ["plain"]}))).text)
    assert "nothing can be said about a gain" in text and "nan" not in text.lower()


def test_images_stay_inside_the_folder(tmp_path):
    example = {
        "images": ["../../secret.png"],
        "question": "q",
        "expected": "a",
        "category": "c",
        "answers": {},
    }
    folder = experiment(tmp_path / "outside", examples=[example])
    with pytest.raises(InputError, match="leads out of"):
        report(folder)
    assert not (folder / "report.html").exists()


def test_summaries(page, capsys):
    markdown = (page.parent / "summary.md").read_text(encoding="utf-8")
    scores = pd.read_csv(page.parent / "scores.csv")
    text = finding(scores, load_json(page.parent / "plan.json"))
    cells = summary_table(scores, ["plain", "viral"])
    assert text in markdown and f"| VIRAL | {' | '.join(cells.loc['viral'])} |" in markdown
    print_summary(page.parent)
    printed = capsys.readouterr().out
    assert text in " ".join(printed.split("\n\n")[0].split("\n")) and cells.loc["viral", "mean"] in printed


def test_no_scores(tmp_path):
    save_json(PLAN, tmp_path / "plan.json")
    with pytest.raises(InputError, match="scores.csv"):
        report(tmp_path)
