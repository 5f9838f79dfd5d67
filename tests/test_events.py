"""The log: one line per event, and nothing of a sample in it."""

import json
import logging

import pytest
from architectures import named
from samples import image_table, paper

from imu_ray import unlearn
from imu_ray.events import event, log_events


def test_a_text_line_names_the_event_and_its_figures(restored_log, capsys):
    log_events("text")
    event("features made", set="forget", seconds=0.123456, reason="two\nlines")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("INFO features made: set=forget seconds=0.1235 reason=two lines")


def test_a_json_line_is_one_object(restored_log, capsys):
    log_events("json")
    event("run failed", level=logging.WARNING, reason="two\nlines")
    logging.getLogger("another").warning("said %s", "so")
    ours, other = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (ours["event"], ours["level"], ours["reason"]) == ("run failed", "warning", "two\nlines")
    assert (other["event"], other["message"]) == ("message", "said so")


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_run_logs_each_stage_and_no_sample(ray_cluster, restored_log, capsys, tmp_path, style):
    log_events(style)
    table = image_table(20)
    settings = paper(forget_set__image_mode="L", ascent__stop__max_epochs=1)
    unlearn(named("fc"), table, config=settings, run_dir=tmp_path / "run")
    log = capsys.readouterr().err
    stages = ("features made", "features done", "scores done", "ascent ended", "audit done")
    assert all(said in log for said in ("run begun", *stages, "run complete"))
    assert not [sample_id for sample_id in table["id"].to_pylist() if sample_id in log]
