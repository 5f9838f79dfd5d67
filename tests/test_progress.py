import io
import sys

import pytest

from imu_ray import progress
from imu_ray.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_one_line_every_ten_seconds(clock, capsys):
    with Progress("scores", 10, "shards") as bar:
        clock[0] += 20
        bar.advance(0, note="waiting")
        for _ in range(3):
            clock[0] += 4
            bar.advance(samples=100, note="so far")
    standing, moving = capsys.readouterr().err.splitlines()
    assert standing == "scores: 0 of 10 shards, waiting, time left unknown"
    assert moving == "scores: 3 of 10 shards, 9 samples/s, so far, 75 s left"


def test_a_quiet_one_says_nothing(clock, capsys):
    with Progress("scores", 10, "shards", quiet=True) as bar:
        clock[0] += 60
        bar.advance()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("place", ["a terminal", "a notebook"])
def test_where_someone_looks_there_is_a_bar(place, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: place == "a terminal"
    monkeypatch.setattr(sys, "stderr", terminal)
    if place == "a notebook":
        monkeypatch.setitem(sys.modules, "ipykernel", None)
    with Progress("scores", 2, "shards") as bar:
        bar.advance(samples=7)
    assert "scores" in terminal.getvalue()


def test_under_a_log_the_line_is_an_event(clock, capsys, caplog):
    caplog.set_level("INFO", "imu_ray")
    with Progress("scores", 10, "shards") as bar:
        clock[0] += 20
        bar.advance(5, samples=100)
    assert capsys.readouterr().err == ""
    (record,) = caplog.records
    assert (record.event, record.fields["done"], record.fields["seconds_left"]) == ("progress", 5, 20)
