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
        for _ in range(5):
            clock[0] += 4
            bar.advance(samples=100, note="so far")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["scores: 3 of 10 shards, 25 samples/s, so far, 28 s left"]


def test_a_quiet_one_says_nothing(clock, capsys):
    with Progress("scores", 10, "shards", quiet=True) as bar:
        clock[0] += 60
        bar.advance()
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("scores", 2, "shards") as bar:
        bar.advance(samples=7)
        bar.advance(samples=7)
    assert "scores" in terminal.getvalue()
    assert "2/2" in terminal.getvalue() or "0/2" in terminal.getvalue()


def test_work_that_stands_still_says_so(clock, capsys):
    with Progress("scores", 10, "shards") as bar:
        clock[0] += 20
        bar.advance(0, note="waiting")
    assert capsys.readouterr().err == "scores: 0 of 10 shards, waiting, time left unknown\n"


def test_under_a_log_the_line_is_an_event(clock, capsys, caplog):
    caplog.set_level("INFO", "imu_ray")
    with Progress("scores", 10, "shards") as bar:
        clock[0] += 20
        bar.advance(5, samples=100)
    assert capsys.readouterr().err == ""
    assert [(record.event, record.fields["done"], record.fields["seconds_left"]) for record in caplog.records] == [
        ("progress", 5, 20)
    ]


def test_in_a_notebook_there_is_a_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    with Progress("scores", 2, "shards") as bar:
        assert bar.bar is not None
