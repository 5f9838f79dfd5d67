import pytest

from imu_ray.audits.verdict import verdict

ATTACK = {"balanced_accuracy": 0.51, "band": [0.47, 0.53]}


def metrics(forget=0.8, test=0.82, attack=ATTACK, recovery=None, **more):
    before = {"forget": {"accuracy": 0.95}, "test": {"accuracy": 0.82}}
    after = {"forget": {"accuracy": forget}, "test": {"accuracy": test}, "membership": attack, **more}
    found = {"probe": {"accuracy": 0.81}} if recovery is None else recovery
    return {"before": before, "after": after, "recovery": {"after": found} if found else {}}


@pytest.mark.parametrize("status", ["not_reached", "stopped_by_guard"])
def test_a_run_that_did_not_reach_its_target_is_not_reached_whatever_was_measured(status):
    found = verdict(status, "the loss is 0.3", metrics())
    assert (found.word, found.reason) == ("not_reached", "the loss is 0.3")


@pytest.mark.parametrize(("status", "why"), [("already_met", "before the first step"), ("epochs_done", "no target")])
def test_where_nothing_was_asked_or_done_nothing_can_be_said(status, why):
    found = verdict(status, "", metrics())
    assert found.word == "inconclusive"
    assert why in found.reason


def test_what_no_measure_tells_is_forgotten_as_measured_and_what_is_left_open_is_named():
    found = verdict("reached", "the loss is 0.5", metrics())
    assert (found.word, found.reason) == ("forgotten_as_measured", "the loss is 0.5")
    assert [each.partition(" ")[0] for each in found.checked] == ["membership", "recovery"]
    assert any("retrained" in each for each in found.not_checked)
    assert any("imu-ray ensemble" in each for each in found.not_checked)


def test_beside_unseen_rows_that_are_rows_to_forget_nothing_is_told():
    assert verdict("reached", "", metrics(), overlap=0.01).word == "forgotten_as_measured"
    found = verdict("reached", "", metrics(), overlap=0.25)
    assert (found.word, found.reason[:27]) == ("inconclusive", "25.0 % of the rows of test,")
    assert (
        verdict("reached", "", metrics(attack={**ATTACK, "balanced_accuracy": 0.9}), overlap=0.25).word == "contained"
    )


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"attack": {**ATTACK, "balanced_accuracy": 0.531}}, "membership by loss is right 53.1 %"),
        ({"forget": 0.01, "recovery": {"probe": {"accuracy": 0.868}}}, "a new head: 86.8 % right, of the model itself 1.0 %"),
        ({"attack": {**ATTACK, "attacks": {"entropy": {"balanced_accuracy": 0.6, "band": [0.4, 0.55]}}}}, "entropy is right"),
        ({"recovery": {"quantise": {"8": {"accuracy": 0.8}, "4": {"accuracy": 0.95}}}}, "rounding to 4 bit: 95.0 %"),
        ({"forget": 0.6, "forget_fresh_views": {"accuracy": 0.701}}, "fresh views: 70.1 % right, the rows themselves 60.0 %"),
    ],
)  # fmt: skip
def test_a_measure_that_tells_the_rows_says_contained(changed, why):
    found = verdict("reached", "", metrics(**changed))
    assert found.word == "contained"
    assert why in found.reason
    assert why not in " ".join(found.checked)


def views(accuracy, samples, **per_class):
    return {
        "accuracy": accuracy,
        "samples": samples,
        "per_class": {
            label: dict(zip(("samples", "accuracy"), each, strict=True)) for label, each in per_class.items()
        },
    }


@pytest.mark.parametrize(("rows", "word"), [(10, "forgotten_as_measured"), (100, "contained")])
def test_views_of_a_row_are_no_rows_of_their_own(rows, word):
    figures = metrics(forget_fresh_views=views(0.95, 8 * rows))
    figures["after"]["forget"]["samples"] = rows
    assert verdict("reached", "", figures).word == word


def test_fresh_views_are_compared_with_those_of_unseen_rows_of_the_same_labels():
    # Label a has 30 views of rows to forget and b has 10; c is no label of theirs.
    mine, unseen = views(0.725, 40, a=(30, 0.7), b=(10, 0.8)), views(0.5, 300, a=(100, 0.5), b=(100, 0.7), c=(100, 0.3))
    figures = metrics(forget=0.8, forget_fresh_views=mine, test_fresh_views=unseen)
    figures["before"]["test_fresh_views"] = unseen
    figures["after"]["forget"]["samples"] = 20
    found = verdict("reached", "", figures)
    assert "fresh views: 72.5 % right, those of unseen rows of the same labels 55.0 %" in found.checked  # of 20 rows
    figures["after"]["forget"]["samples"] = 40
    assert verdict("reached", "", figures).word == "contained"
    figures["retrained"] = {"forget_fresh_views": views(0.7, 40)}
    found = verdict("reached", "", figures)
    assert "fresh views: 72.5 % right, those of the retrained model 70.0 %" in found.checked
    assert not any("unseen rows" in each for each in found.checked + found.not_checked)


def test_fresh_views_without_unseen_ones_of_their_labels_say_so():
    for more in ({}, {"test_fresh_views": views(0.5, 10, b=(10, 0.5))}):
        figures = metrics(forget_fresh_views=views(0.7, 10, a=(10, 0.7)), **more)
        figures["before"] |= more
        found = verdict("reached", "", figures)
        assert "fresh views beside those of unseen rows: the set test has none of the labels" in found.not_checked
    assert "fresh views of the rows (audit.views)" in verdict("reached", "", metrics()).not_checked


def test_recovery_is_compared_with_that_of_the_retrained_model_where_there_is_one():
    figures = metrics(forget=0.01, recovery={"probe": {"accuracy": 0.7}, "relearn": {"accuracy": [0.0, 0.5, 0.9]}})
    assert verdict("reached", "", figures).word == "contained"
    figures["recovery"]["reference"] = {"probe": {"accuracy": 0.68}, "relearn": {"accuracy": [0.0, 0.6, 0.85]}}
    figures["retrained"] = figures["after"]
    found = verdict("reached", "", figures)
    assert found.word == "forgotten_as_measured"
    assert "recovery by training all parameters: 90.0 % right, of the retrained model 85.0 %" in found.checked
    figures["recovery"]["reference"]["relearn"]["accuracy"][-1] = 0.79
    assert verdict("reached", "", figures).word == "contained"


def test_steps_without_a_retrained_model_say_nothing():
    found = verdict("reached", "", metrics(recovery={"relearn": {"accuracy": [0.1, 0.9]}}))
    assert found.word == "inconclusive"
    assert any("training all parameters: there is no retrained model" in each for each in found.not_checked)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"attack": {"skipped": "no test"}}, "membership could not be measured"),
        ({"recovery": {"skipped": {"probe": "one class"}}}, "recovery could not be measured"),
        ({"recovery": {}, "attack": {"skipped": "no test"}}, "membership and recovery could not be measured"),
        ({"test": 0.71}, "the accuracy on test fell by 11.0 points"),
        ({"test": 0.71, "forget": 0.0, "recovery": {"probe": {"accuracy": 0.9}}}, "fell by 11.0 points"),
    ],
)
def test_what_could_not_be_measured_or_is_broken_is_inconclusive(changed, why):
    found = verdict("reached", "", metrics(**changed))
    assert found.word == "inconclusive"
    assert why in found.reason


def test_a_reason_for_what_is_missing_is_passed_on():
    found = verdict("reached", "", metrics(recovery={"skipped": {"probe": "one class"}}))
    assert "recovery by a new head: one class" in found.not_checked


def test_a_difference_on_a_few_rows_is_noise():
    figures = metrics(forget=0.2, recovery={"probe": {"accuracy": 0.35, "rows": 10}})
    assert verdict("reached", "", figures).word == "forgotten_as_measured"
    figures["recovery"]["after"]["probe"]["rows"] = 1000
    assert verdict("reached", "", figures).word == "contained"


def test_classes_that_were_to_go_are_no_lost_utility():
    def of_classes(*accuracies):
        per_class = {str(label): {"samples": 10, "accuracy": each} for label, each in enumerate(accuracies)}
        return {"accuracy": sum(accuracies) / len(accuracies), "per_class": per_class}

    figures = metrics(forget=0.0, recovery={"probe": {"accuracy": 0.05}})
    figures["after"]["forget"] = of_classes(0.0)
    figures["before"]["test"], figures["after"]["test"] = of_classes(1.0, 0.9), of_classes(0.0, 0.9)
    assert verdict("reached", "", figures).word == "forgotten_as_measured"
    figures["after"]["test"] = of_classes(0.0, 0.79)
    assert "fell by 11.0 points" in verdict("reached", "", figures).reason


def test_a_test_that_broke_off_or_is_new_does_not_stop_the_record():
    recovery = {"relearn": {"steps": [], "ended": "no"}, "skipped": {"pruning": "never heard of"}}
    found = verdict("reached", "", metrics(recovery=recovery))
    assert "recovery by pruning: never heard of" in found.not_checked


@pytest.mark.parametrize(("after", "word"), [(0.55, "inconclusive"), (0.75, "forgotten_as_measured")])
def test_of_several_labels_the_f1_tells_a_broken_model(after, word):
    found = metrics()
    for side, f1 in (("before", 0.8), ("after", after)):
        found[side]["test"] = {"samples": 200, "label_accuracy": 0.97, "f1": f1, "per_class": {}}
    verdict_of = verdict("reached", "", found)
    assert verdict_of.word == word
    assert word != "inconclusive" or verdict_of.reason.startswith("the F1 on test fell by 25.0 points")


def test_attacks_that_were_not_made_are_named():
    attack = {**ATTACK, "unmeasured": {"modified_entropy": "there is no class"}}
    assert (
        "membership by modified entropy: there is no class"
        in verdict("reached", "", metrics(attack=attack)).not_checked
    )
