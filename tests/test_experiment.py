"The main job from end to end, at its quick size, as a user runs it."

import os
import re
import shutil
import signal
import time

import pandas as pd
import pytest
import torch
from conftest import ENVIRONMENT, FORKS, into_file

from aligned_mllm.analysis.cknna import cknna
from aligned_mllm.analysis.features import picture_batch
from aligned_mllm.experiments import tables
from aligned_mllm.cli import main
from aligned_mllm.core import InputError, load_json
from aligned_mllm.data.collate import model_inputs
from aligned_mllm.evals import task
from aligned_mllm.evals.task import score_run
from aligned_mllm.experiments.arms import ARMS as REGISTERED
from aligned_mllm.experiments.arms import Arm, arm_from_text, register_arm
from aligned_mllm.experiments.jobs import Job, graph_of, run_jobs
from aligned_mllm.experiments.plan import Plan, joined_plan, prepare_data, quick_plan
from aligned_mllm.models.load import load_model
from aligned_mllm.models.taps import Taps
from aligned_mllm.teachers.vision import encoder_teacher, load_teacher

ARMS = ["plain", "viral", "other_image"]


def command_here(log, *words) -> None:
    "`aligned-mllm experiment --quick` in this process, which FORKS has started."
    os.environ.update(ENVIRONMENT)
    into_file(log)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    raise SystemExit(main(["experiment", "--quick", *map(str, words)]))


def started(log, *words):
    process = FORKS.Process(target=command_here, args=(log, *words))
    process.start()
    return process


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    "A quick experiment that was interrupted once, as by Ctrl-C, and gone on with."
    folder = tmp_path_factory.mktemp("quick") / "experiment"
    log = folder.parent / "interrupted.txt"
    process = started(log, "--output", folder)
    while not (folder / "seed0" / "stage1" / "done.json").exists():
        assert process.is_alive(), log.read_text()
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    process.join(300)
    assert process.exitcode == 130 and "Run the same command again" in log.read_text()
    process = started(folder.parent / "said.txt", "--output", folder)
    process.join(300)
    said = (folder.parent / "said.txt").read_text()
    assert process.exitcode == 0, said[-3000:]
    (folder / "said.txt").write_text(said)
    return folder


def test_the_loss_fell(quick):
    for name in ("stage1", *ARMS, "blind"):
        curves = pd.read_csv(quick / "seed0" / name / "curves.csv")
        text = curves[curves.name == "loss_text"].sort_values("step").value
        assert text.iloc[-1] < text.iloc[0], name
    aligned = (
        pd.read_csv(quick / "seed0" / "viral" / "curves.csv")
        .query("name == 'loss_viral'")
        .sort_values("step")
        .value
    )
    assert aligned.iloc[-1] < aligned.iloc[0] - 0.02


def test_the_report_holds_its_numbers(quick):
    page = (quick / "report.html").read_text(encoding="utf-8")
    said = (quick / "said.txt").read_text()
    scores = pd.read_csv(quick / "scores.csv")
    assert set(scores.arm) == {*ARMS, "blind", "majority"}
    for arm in ARMS:
        answers = pd.read_json(quick / "seed0" / arm / "answers.jsonl", lines=True, dtype=False)
        recount = answers.groupby("category").correct.mean()
        mine = scores[scores.arm == arm].set_index("category").accuracy
        assert (mine - recount[mine.index]).abs().max() < 1e-6
        overall = f"{100 * mine.mean():.1f}"
        assert overall in page and overall in said, (arm, overall)
    for name in ("curves", "cknna", "cost"):
        assert len(pd.read_csv(quick / f"{name}.csv")) > 0


def test_the_report_is_self_contained(quick):
    page = (quick / "report.html").read_text(encoding="utf-8")
    markup = re.sub(
        r"<script\b.*?</script>", "", page, flags=re.DOTALL
    )  # plotly's own source names addresses; the browser test sees what is fetched
    assert len(markup) < len(page) / 2 and not re.findall(r"""\b(?:src|href)=["'](?!data:|#)""", markup)
    assert page.count("data:image/png;base64,") >= 3


def test_arms_share_data_order_and_start(quick):
    configs = {arm: load_json(quick / "seed0" / arm / "config.json") for arm in ARMS}
    assert (
        len({(config["seed"], config["records_digest"], config["model"]) for config in configs.values()}) == 1
    )
    first = {
        arm: pd.read_csv(quick / "seed0" / arm / "curves.csv")
        .query("name == 'loss_text'")
        .sort_values("step")
        .value.iloc[0]
        for arm in ARMS
    }
    assert max(first.values()) - min(first.values()) < 0.2


def test_the_same_words_again_do_nothing_new(quick):
    before = {path: path.stat().st_mtime_ns for path in quick.rglob("done.json")}
    assert main(["experiment", "--quick", "--output", str(quick)]) == 0
    assert before == {
        path: path.stat().st_mtime_ns for path in quick.rglob("done.json")
    }


def test_another_plan_in_the_same_folder_is_refused(quick, capsys):
    assert main(["experiment", "--quick", "--output", str(quick), "--set", "viral.weight=2.0"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_failing_run_names_its_log(small_data, tmp_path):
    with pytest.raises(InputError, match=r"layer.*log\.txt"):
        run_jobs([Job(tmp_path / "run", "scenes_viral", small_data, {"viral.layers": [9]})], workers=1)


def test_a_setting_that_cannot_be_is_said_before_anything_is_trained(tmp_path, capsys):
    assert main(["experiment", "--quick", "--output", str(tmp_path / "x"), "--set", "viral.layers=[9]"]) == 2
    assert (
        "layer" in capsys.readouterr().err
        and not list((tmp_path / "x").glob("seed*/*/log.txt"))
        and not (tmp_path / "x" / "plan.json").exists()
    )


@pytest.mark.parametrize("setting", ["viral.target=image", "with_images=true", "seed=5", "model=elsewhere"])
def test_settings_cannot_undo_an_arm(tmp_path, setting, capsys):
    assert main(["experiment", "--quick", "--output", str(tmp_path / "x"), "--set", setting]) == 2
    assert setting.split("=")[0] in capsys.readouterr().err


def test_alignment_settings_reach_only_arms_that_align(tmp_path):
    jobs = {
        job.output.name: job.settings
        for job in graph_of(Plan(settings={"viral.weight": 1.0}, seeds=1), tmp_path).jobs
    }
    assert jobs["viral"]["viral.weight"] == jobs["other_image"]["viral.weight"] == 1.0
    assert "viral.weight" not in jobs["plain"] and "viral.weight" not in jobs["blind"]


def test_data_of_another_plan_is_refused(tmp_path):
    prepare_data(quick_plan(), tmp_path, 0)
    with pytest.raises(InputError, match="another plan"):
        prepare_data(Plan(), tmp_path, 0)


def test_a_folder_keeps_all_arms_it_was_asked_for(quick):
    assert joined_plan(quick_plan(arms=("plain", "encoder")), quick).arms == (*ARMS, "encoder")


def test_scores_are_of_the_records_that_were_asked(quick, tmp_path, capsys):
    run = shutil.copytree(quick / "seed0" / "plain", tmp_path / "run")
    data = quick / "data" / "seed0"
    test = score_run(run, data)
    assert task.main(["--run", str(run), "--data", str(data), "--records", "validation.jsonl"]) == 0
    validation = score_run(run, data, "validation.jsonl")
    assert capsys.readouterr().out == f"{validation.round(3).to_string(index=False)}\n"
    assert test.total.sum() > validation.total.sum() and score_run(run, data).equals(test)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data", "somewhere"], "nlvr"),
        (["--arms", "plain,virral"], "viral"),
        (["--seeds", "0"], "at least 1"),
        (["--recipe", "nlvr"], "--data"),
        (["--recipe", "nlvr", "--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_one_message(tmp_path, words, message, capsys):
    assert main(["experiment", "--quick", "--output", str(tmp_path / "x"), *words]) == 2
    assert message in capsys.readouterr().err


def test_the_report_in_a_browser(quick):
    "Every figure is drawn, nothing is fetched, nothing is written to the console."
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as context:
        if browser is None and not os.path.exists(context.chromium.executable_path):
            pytest.skip("no Chromium: the report was not tested in a browser")
        page = context.chromium.launch(
            executable_path=browser, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        ).new_page()
        said = []
        asked = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((quick / "report.html").as_uri())
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
        figures = page.locator(".js-plotly-plot").count()
        assert figures >= 4 and page.locator(".js-plotly-plot .main-svg").count() >= figures
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
            "wider than the window"
        )
        assert said == [] and all(url.startswith(("file:", "data:", "blob:")) for url in asked)


def test_cknna_opens_pictures_once_a_seed_and_equals_the_formula(quick, tmp_path, monkeypatch):
    folder = shutil.copytree(quick, tmp_path / "copy")
    opened = []
    files = {path: path.read_bytes() for path in folder.glob("seed0/*/cknna_*.csv")}
    open_image = tables.open_image
    monkeypatch.setattr(tables, "open_image", lambda *words: opened.append(open_image(*words)) or opened[-1])
    for path in files:
        path.unlink()
    found = tables.read_cknna(quick_plan(), folder)
    assert len(opened) == 40
    assert len(files) == 3 and all(path.read_bytes() == before for path, before in files.items())
    pd.testing.assert_frame_equal(found.reset_index(drop=True), pd.read_csv(folder / "cknna.csv"))
    model, processor = load_model(folder / "seed0" / "viral" / "model")
    batch = picture_batch(processor, opened)
    with torch.inference_mode(), Taps(model, [3]) as taps:
        model(**model_inputs(batch))
    states = taps.states(3, batch["visual_mask"])
    references = {"encoder": encoder_teacher(model, processor), "teacher": load_teacher("dense")}
    rows = found.query("arm == 'viral' and layer == 3").set_index("reference")
    for name, teacher in references.items():
        grids = teacher.features(teacher.pixels(opened))
        assert rows.value[name] == pytest.approx(cknna(states, grids.flatten(0, 1), 10), abs=1e-4)


def test_curves_are_those_of_the_plan(quick):
    curves = tables.read_curves(quick_plan(), quick)
    assert list(dict.fromkeys(curves.arm)) == [*ARMS, "blind"] and set(curves.seed) == {0}
    assert sorted(curves.value) == sorted(pd.read_csv(quick / "curves.csv").value)


@pytest.fixture
def own_arms():
    "Arms of a test, forgotten after it."
    before = set(REGISTERED)
    yield
    for name in set(REGISTERED) - before:
        REGISTERED.pop(name)


def test_equal_stages_are_shared_and_run_once(tmp_path, own_arms):
    register_arm(Arm("warm", "warm", stage1={"learning_rate": 1e-3}))
    register_arm(
        Arm("warm_viral", "warm VIRAL", stage1={"learning_rate": 1e-3}, stage2=REGISTERED["viral"].stage2)
    )
    register_arm(Arm("twin", "twin", stage2=REGISTERED["viral"].stage2))
    graph = graph_of(Plan(arms=("plain", "viral", "warm", "warm_viral", "twin"), seeds=2), tmp_path)
    folders = [str(job.output.relative_to(tmp_path)) for job in graph.jobs]
    names = ["stage1", "plain", "viral", "stage1_warm", "warm", "warm_viral", "blind"]
    assert folders == [f"seed{seed}/{name}" for seed in (0, 1) for name in names]
    assert graph.folders[0, "twin"] == graph.folders[0, "viral"]
    starts = {job.output.name: job.after.name for job in graph.jobs if job.after}
    assert starts["viral"] == "stage1" and starts["warm_viral"] == "stage1_warm"


SHORT = """
from dataclasses import dataclass

from aligned_mllm.experiments.arms import Arm, register_arm
from aligned_mllm.objectives.base import Objective, Tap, Target, register, setting


@dataclass
class ShortSettings:
    weight: float = setting(0.01, "lambda")


@register
class Short(Objective):
    name = "short"
    Settings = ShortSettings
    taps = (Tap(2),)

    @classmethod
    def build(cls, settings, context):
        return cls(settings.weight)

    def targets(self, batches):
        return [Target(int(batch["visual_mask"].sum())) for batch in batches]

    def forward(self, states, target):
        return self.term(states[self.taps[0]].square().sum(), target.count)


register_arm(Arm("short", "short states", stage2={"short.weight": 0.001}))
"""


def test_arms_of_the_command_line_and_of_a_file(quick, tmp_path, capsys):
    """Added to a finished experiment: only they are trained, each run imports the file with its
    objective, and the report shows both. A later call must name the file again."""
    folder = shutil.copytree(quick, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("done.json")}
    file = tmp_path / "mine.py"
    file.write_text(SHORT)
    text = "deep:like=viral,viral.layers=[4,5],label=two deep layers"
    process = started(tmp_path / "said.txt", "--output", folder, "--arm", text, "--arms-file", file)
    process.join(300)
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == 0, said[-3000:]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert load_json(folder / "seed0" / "deep" / "objectives.json")["viral"]["layers"] == [4, 5]
    curves = pd.read_csv(folder / "curves.csv")
    assert set(curves[curves.name == "loss_short"].arm) == {"short"}
    page = (folder / "report.html").read_text(encoding="utf-8")
    for label in ("two deep layers", "short states"):
        assert label in page and label in said
    assert set(load_json(folder / "plan.json")["arms"]) == {*ARMS, "deep", "short"}
    assert main(["experiment", "--quick", "--output", str(folder)]) == 2
    assert f"add --arms-file {file}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("deep", "NAME:KEY=VALUE"),
        ("deep:viral.layer=[5]", "viral.layers"),
        ("deep:like=virral", "virral"),
        ("a b:viral.weight=1", "letters"),
        ("deep:like=viral,control_of=viral", "how"),
    ],
)
def test_an_arm_that_cannot_be_is_one_message(text, message):
    with pytest.raises(InputError, match=message):
        arm_from_text(text)


def test_commas_inside_brackets_belong_to_the_value():
    arm = arm_from_text("deep:like=other_image,viral.layers=[4,5],viral.hidden=64,stage1.learning_rate=1e-3")
    assert arm.stage2["viral.layers"] == [4, 5] and arm.stage2["viral.target"] == "other_image"
    assert arm.stage1 == {"learning_rate": 1e-3} and arm.baseline == "plain" and arm.control_of == ""
