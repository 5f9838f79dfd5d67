"""The metrics of a run: what is written is read again, and the schema that ships is one."""

import json
import sys

import pytest
from jsonschema import Draft202012Validator

from imu_ray.cli import main
from imu_ray.errors import NonFiniteError
from imu_ray.run.directory import RunDirectory
from imu_ray.run.metrics import SCHEMA, metrics_schema, read_metrics, write_metrics


def test_metrics_name_their_schema_and_are_read_without_it(tmp_path):
    run, figures = RunDirectory(tmp_path / "run"), {"after": {"forget": {"accuracy": 0.5}}}
    assert read_metrics(run) == {}
    write_metrics(run, figures)
    assert read_metrics(run) == figures
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == {"$schema": SCHEMA, **figures}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_figure_that_is_no_number_is_refused_by_name(value, tmp_path):
    with pytest.raises(NonFiniteError, match=rf"the figure after.forget.loss is {value}, 1 such"):
        write_metrics(RunDirectory(tmp_path / "run"), {"after": {"forget": {"loss": value, "accuracy": 0.5}}})
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_the_schema_is_one_and_is_printed(monkeypatch, capsys):
    schema = metrics_schema()
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == SCHEMA
    monkeypatch.setattr(sys, "argv", ["imu-ray", "metrics"])
    assert main("schema") == 0
    assert json.loads(capsys.readouterr().out) == schema


def test_the_metrics_of_an_ascend_hold_nothing_and_fit_the_schema():
    fits = Draft202012Validator(metrics_schema()).is_valid
    assert fits({"$schema": SCHEMA})
    assert not fits({})
    assert not fits({"$schema": "urn:imu-ray:metrics:2"})
    assert not fits({"$schema": SCHEMA, "more": {}})
