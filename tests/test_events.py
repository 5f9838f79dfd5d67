"""The log: one line per event, and nothing of a sample in it."""

import json
import logging

import pytest
from architectures import named
from samples import image_table

from imu_ray import UnlearnConfig, unlearn
from imu_ray.events import event, log_events


def test_a_text_line_names_the_event_and_its_figures(restored_log, capsys):
    log_events("text")
    event("features made", set="forget", seconds=0.123456)
    assert capsys.readouterr().err.rstrip().endswith("INFO features made: set=forget seconds=0.1235")


def test_a_json_line_is_one_object(restored_log, capsys):
    log_events("json")
    event("run failed", level=logging.WARNING, reason="two\nlines")
    logging.getLogger("another").warning("said %s", "so")
    ours, other = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (ours["event"], ours["level"], ours["reason"]) == ("run failed", "warning", "two\nlines")
    assert (other["event"], other["message"]) == ("message", "said so")


def test_a_line_stays_one_line(restored_log, capsys):
    log_events("text")
    event("run failed", reason="two\nlines")
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_run_logs_each_stage_and_no_sample(ray_cluster, restored_log, capsys, tmp_path, style):
    log_events(style)
    table = image_table(20)
    settings = UnlearnConfig.from_recipe("paper").with_overrides(
        {"forget_set.image_mode": "L", "ascent.stop.max_epochs": 1}
    )
    unlearn(named("fc"), table, config=settings, run_dir=tmp_path / "run")
    log = capsys.readouterr().err
    for said in (
        "run begun",
        "features made",
        "features done",
        "scores done",
        "ascent ended",
        "audit done",
        "run complete",
    ):
        assert said in log
    assert not [sample_id for sample_id in table["id"].to_pylist() if sample_id in log]
