"Times to a target, against counting by hand."

import json

import pandas as pd
import pytest

from aligned_mllm.analysis.convergence import (
    convergence_figure,
    convergence_table,
    read_run_curves,
    times_to_target,
)
from aligned_mllm.core import InputError


def run_folder(folder, seed: int, values: dict[int, float], seconds: float | None = 60):
    folder.mkdir(parents=True)
    rows = [
        line
        for step, value in values.items()
        for line in (f"{step},accuracy,{value}", f"{step},loss,{1 - value}")
    ]
    (folder / "curves.csv").write_text("step,name,value\n" + "\n".join(rows) + "\n")
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    if seconds is not None:
        (folder / "done.json").write_text(json.dumps({"seconds": seconds, "steps": max(values)}))
    return folder


@pytest.fixture
def folders(tmp_path):
    made = {
        "plain": [{10: 0.2, 20: 0.5, 30: 0.8}, {10: 0.2, 20: 0.3, 30: 0.6}],
        "viral": [{10: 0.5, 20: 0.4, 30: 0.9}, {10: 0.3, 20: 0.6, 30: 0.8}],
    }
    return [
        run_folder(tmp_path / f"seed{seed}" / arm, seed, values)
        for arm, runs in made.items()
        for seed, values in enumerate(runs)
    ]


def test_the_first_evaluation_at_the_target_counts(folders):
    curves = read_run_curves(folders)
    times = times_to_target(curves, 0.5).set_index(["model", "seed"])
    assert times.steps.to_dict() == {("plain", 0): 20, ("plain", 1): 30, ("viral", 0): 10, ("viral", 1): 20}
    assert times.seconds.tolist() == [40, 60, 20, 40]
    assert times_to_target(curves, 0.5, "loss", falling=True).steps.tolist() == [20, 30, 10, 20]
    table = convergence_table(folders, 0.5, baseline="plain").set_index("model")
    assert table.steps.to_dict() == {"plain": 25, "viral": 15} and table.saved_steps.to_dict() == {
        "plain": 0,
        "viral": 10,
    }
    assert (
        abs(table.steps_high["plain"] - (25 + 12.7062047 * 5)) < 1e-3
    )  # t quantile with 1 degree of freedom, standard error 5
    assert table.saved_steps_low["viral"] == table.saved_steps_high["viral"] == 10
    assert len(convergence_figure(curves, target=0.5, unit="seconds").data) == 4


def test_a_kind_that_does_not_always_get_there_has_no_mean(folders):
    table = convergence_table(folders, 0.7).set_index("model")
    assert (
        table.reached.to_dict() == {"plain": 1, "viral": 2}
        and pd.isna(table.steps["plain"])
        and table.steps["viral"] == 30
    )
    assert pd.isna(convergence_table(folders, 0.7, baseline="plain").set_index("model").saved_steps["viral"])


def test_what_is_refused_and_what_is_not_yet_known(folders, tmp_path):
    going = run_folder(tmp_path / "seed2" / "plain", 2, {10: 0.9}, None)
    assert read_run_curves([going]).seconds.isna().all() and convergence_table([going], 0.5).steps[0] == 10
    for wrong, message in (
        ([], "0 run folders"),
        ([tmp_path], "no curves.csv"),
        ([folders[0]] * 2, "two runs called plain"),
    ):
        with pytest.raises(InputError, match=message):
            read_run_curves(wrong)
    with pytest.raises(InputError, match="no curve 'x'"):
        convergence_table(folders, 0.5, name="x")
    with pytest.raises(InputError, match="baseline 'x'"):
        convergence_table(folders, 0.5, baseline="x")
    assert set(read_run_curves(folders[:2], ["a", "b"]).model) == {"a", "b"}
