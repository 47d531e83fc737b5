"What an arm may be called, and how the command line describes one."

import pytest

from aligned_mllm.core import InputError, save_json
from aligned_mllm.experiments.arms import ARMS, Arm, arm_from_text, register_arm
from aligned_mllm.experiments.plan import Plan, joined_plan, plan_record


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "-x", "a b", "stage1", "stage1_viral"])
def test_a_name_that_would_leave_or_share_a_folder_is_refused(name):
    with pytest.raises(InputError, match="a name"):
        Arm(name, "label")


@pytest.mark.parametrize("name", ["majority", "viral"])
def test_names_that_tables_use_already_are_refused(name):
    before = dict(ARMS)
    with pytest.raises(InputError, match="a second arm"):
        register_arm(Arm(name, "mine"))
    assert ARMS == before


def test_what_starts_from_a_baseline_is_compared_with_it():
    for baseline in ("plain", "plain_600"):
        arm = arm_from_text(f"slow:like={baseline},learning_rate=1e-3")
        assert arm.baseline == baseline and arm.stage2 == {**ARMS[baseline].stage2, "learning_rate": 1e-3}
    assert arm_from_text("slow:like=plain,learning_rate=1e-3,baseline=").baseline == ""


def test_commas_in_phrases_and_nested_brackets_belong_to_the_value():
    arm = arm_from_text("deep:like=viral,label=deep, two layers,viral.layers=[4, 5],description=One, two.")
    assert (arm.label, arm.description) == ("deep, two layers", "One, two.")
    assert arm.stage2 == {**ARMS["viral"].stage2, "viral.layers": [4, 5]}


def test_what_an_arm_starts_from_keeps_its_own_settings():
    before = {name: (dict(arm.stage1), dict(arm.stage2)) for name, arm in ARMS.items()}
    arm_from_text("deep:like=viral,viral.layers=[4],stage1.learning_rate=1e-3")
    assert before == {name: (arm.stage1, arm.stage2) for name, arm in ARMS.items()}


@pytest.fixture
def stored(tmp_path):
    "A folder with the plan of an experiment on one arm of its own, which is then forgotten."
    register_arm(arm_from_text("deep:like=viral,viral.layers=[4]"))
    save_json(plan_record(Plan(arms=("plain", "deep")), "a command"), tmp_path / "plan.json")
    ARMS.pop("deep")
    yield tmp_path
    ARMS.pop("deep", None)


def test_a_stored_arm_is_known_again(stored):
    assert joined_plan(Plan(), stored).arms == ("plain", "deep", "viral", "other_image")
    assert ARMS["deep"].stage2["viral.layers"] == [4]


def test_a_stored_arm_may_get_another_label_but_no_other_settings(stored):
    register_arm(arm_from_text("deep:like=viral,viral.layers=[4],label=a deep layer"))
    joined_plan(Plan(), stored)
    assert ARMS["deep"].label == "a deep layer"
    ARMS.pop("deep")
    register_arm(arm_from_text("deep:like=viral,viral.layers=[5]"))
    with pytest.raises(InputError, match="a second arm 'deep'"):
        joined_plan(Plan(), stored)


def test_a_folder_from_before_arms_were_stored_is_resumed(tmp_path):
    record = plan_record(Plan(), "a command")
    save_json({key: value for key, value in record.items() if key != "facts"}, tmp_path / "plan.json")
    assert joined_plan(Plan(seeds=4), tmp_path) == Plan(seeds=4)
