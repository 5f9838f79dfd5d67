"""The never-trained control of a run is the same call on unseen rows, and is taken up where it was stopped."""

import numpy as np
import pytest
import torch
from figures import check_metrics
from fingerprints import fitted, textures
from samples import Pairs

from imu_ray import UnlearnConfig, audit, unlearn
from imu_ray.audits.control import draw_control
from imu_ray.run.directory import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def part(samples, rows):
    return Pairs(samples.inputs[rows], samples.labels[rows])


@pytest.fixture(scope="module")
def known():
    """A model that was fitted to its rows, and the sets of a request: 40 of them, others, and unseen ones."""
    train, test = textures(400, 1), textures(200, 2)
    return fitted(train), part(train, slice(40)), {"test": test, "retain": part(train, slice(40, None))}


def settings(recipe="samples", **changes):
    more = {key.replace("__", "."): value for key, value in changes.items()}
    fixed = {"audit.control": True, "audit.recovery": [], "influence.block_rows": 16, "resources.workers": 2}
    return UnlearnConfig.from_recipe(recipe).with_overrides({**fixed, **more})


def lost(before, after, samples, rows):
    """Accuracy lost and loss risen for each of so many rows, written out."""

    def figures(model):
        with torch.no_grad():
            outputs = model(samples.inputs)
        losses = torch.nn.functional.cross_entropy(outputs.double(), samples.labels)
        return float((outputs.argmax(1) == samples.labels).double().mean()), float(losses)

    (right, loss), (right_after, loss_after) = figures(before), figures(after)
    return (right - right_after) / rows, (loss_after - loss) / rows


def test_the_control_is_the_same_call_on_as_many_unseen_rows(known, tmp_path):
    model, forget, sets = known
    config = settings(ascent__stop__targets={"forget.loss": 0.5})
    result = unlearn(model, forget, evaluation=sets, config=config, run_dir=tmp_path / "run")
    check_metrics(result.run_dir, *sets, "forget")
    control = result.metrics["control"]
    assert control["metric"] == "forget.loss"
    assert (control["members"]["rows"], control["others"]["rows"]) == (40, 40)
    went = {side: control[side]["after"] - control[side]["before"] for side in ("members", "others")}
    assert went["others"] == pytest.approx(went["members"], abs=0.011)  # either may end 0.005 past its target
    assert result.record.data_access["test"] == ["curvature", "control", "measured"]
    assert not (tmp_path / "run" / "state").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What it costs beside rows never trained on" in page
    assert "40 of the set test" in page

    marks = draw_control(forget.labels.numpy(), sets["test"].labels.numpy(), 0)
    rest = {**sets, "test": part(sets["test"], np.flatnonzero(~marks))}
    aimed = settings(ascent__stop__targets={"forget.loss": control["target"]["threshold"]}, audit__control=False)
    drawn = part(sets["test"], np.flatnonzero(marks))
    other = unlearn(model, drawn, evaluation=rest, config=aimed, run_dir=tmp_path / "other")
    for side, each, rows in (("members", result.model, 40), ("others", other.model, 40)):
        assert control[side]["paid"].keys() == {"test", "retain"}
        for name, found in control[side]["paid"].items():
            accuracy, loss = lost(model, each, rest[name], rows)
            assert found["samples"] == len(rest[name])
            assert found["accuracy"]["mean"] == pytest.approx(accuracy, abs=2 / 160 / rows)  # a row on the edge
            assert found["loss"]["mean"] == pytest.approx(loss, rel=1e-3, abs=1e-7)

    alone = config.with_overrides({"resources.workers": 1, "influence.blocks_per_shard": 1})
    again = unlearn(model, forget, evaluation=sets, config=alone, run_dir=tmp_path / "alone")
    assert again.metrics["control"] == control


def test_unseen_rows_that_are_the_forgotten_ones_cost_as_much(known, tmp_path):
    model, forget, sets = known
    twice = Pairs(torch.cat([forget.inputs] * 2), torch.cat([forget.labels] * 2))
    config = settings(ascent__stop__targets={"forget.loss": 0.5}, ascent__preconditioner="none", seed=3)
    marks = draw_control(forget.labels.numpy(), twice.labels.numpy(), 3)
    # Each row is there twice, once among those that are drawn.
    order = np.argsort(~marks, kind="stable")
    places = np.empty(80, int)
    for label in range(4):
        of_label = np.flatnonzero(forget.labels.numpy() == label)
        for half in (order[:40], order[40:]):
            places[half[twice.labels.numpy()[half] == label]] = of_label
    evaluation = {"test": part(forget, places), "retain": sets["retain"]}
    first = evaluation["test"].inputs.flatten(1)[:, 0]
    first.copy_(torch.nextafter(first, first + 1))  # a set of nothing but rows to forget is refused
    assert (evaluation["test"].labels == twice.labels).all()
    found = unlearn(model, forget, evaluation=evaluation, config=config, run_dir=tmp_path / "run").metrics["control"]
    members, others = found["members"], found["others"]
    assert (others["before"], others["after"]) == pytest.approx((members["before"], members["after"]), abs=1e-5)
    for name, price in others["paid"].items():
        for key in ("accuracy", "loss"):
            assert price[key] == pytest.approx(members["paid"][name][key], abs=1e-6)


def test_a_control_that_was_stopped_goes_on_to_the_same_figures(known, tmp_path, monkeypatch):
    model, forget, sets = known
    config = settings(
        ascent__update="iterative", ascent__objective="row_mask", ascent__preconditioner="none",
        ascent__learning_rate=0.02, ascent__stop__every_steps=1, ascent__stop__targets={"forget.loss": 0.3},
        ascent__max_change={"forget.loss": 0.1}, ascent__stop__max_epochs=100,
    )  # fmt: skip
    whole = unlearn(model, forget, evaluation=sets, config=config, run_dir=tmp_path / "whole")
    assert "members" in whole.metrics["control"]
    saved, save, load = [], RunDirectory.save_state, RunDirectory.load_state

    def broken(self, state):
        save(self, state)
        if "control" in str(self.location):
            saved.append(state.step)
            if len(saved) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "save_state", broken)
    with pytest.raises(KeyboardInterrupt):
        unlearn(model, forget, evaluation=sets, config=config, run_dir=tmp_path / "run")
    taken_up = []

    def watched(self):
        state = load(self)
        if "control" in str(self.location) and state is not None:
            taken_up.append(state.step)
        return state

    monkeypatch.setattr(RunDirectory, "load_state", watched)
    result = unlearn(model, forget, evaluation=sets, config=config, run_dir=tmp_path / "run")
    assert taken_up == [saved[1]]
    assert result.metrics["control"] == whole.metrics["control"]
    assert not (tmp_path / "run" / "state" / "control").exists()


def test_views_are_pushed_of_the_control_too(known, tmp_path):
    model, forget, sets = known
    config = settings(
        "views", ascent__view_transform="fingerprints:shift", ascent__stop__targets={"forget_views.loss": 0.4}
    )
    found = unlearn(model, forget, evaluation=sets, config=config, run_dir=tmp_path / "run").metrics["control"]
    assert found["metric"] == "forget_views.loss"
    went = {side: found[side]["after"] - found[side]["before"] for side in ("members", "others")}
    assert went["others"] == pytest.approx(went["members"], abs=0.011)
    assert found["others"]["paid"].keys() == {"test", "retain"}


def test_a_run_that_shows_samples_has_a_control_too(known, tmp_path):
    model, forget, sets = known
    config = settings(ascent__stop__targets={"forget.loss": 0.5}, audit__samples=2)
    result = unlearn(model, forget, evaluation=sets, config=config, run_dir=tmp_path / "run")
    assert "members" in result.metrics["control"]
    assert result.record.samples_shown == 4


def test_where_there_are_no_rows_for_a_control_the_reason_stands_in_metrics_and_report(known, tmp_path):
    model, forget, sets = known
    config = settings(ascent__stop__targets={"forget.loss": 0.3})
    few = {"test": part(sets["test"], slice(20))}
    for name, evaluation, why in (
        ("none", None, "no evaluation['test'] with unseen rows"),
        ("few", few, "to spare of the labels"),
    ):
        result = unlearn(model, forget, evaluation=evaluation, config=config, run_dir=tmp_path / name)
        assert why in result.metrics["control"]["skipped"]
        assert "control" not in result.record.data_access.get("test", [])
        assert "Not measured: " in (tmp_path / name / "report.html").read_text()
    assert "an audit unlearns nothing" in audit(model, forget, config=config)["control"]["skipped"]
