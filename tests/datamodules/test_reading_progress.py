"""What a long reading job prints where the output goes to a file: at most a line each tenth, with the time left."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

import datamodules.progress
from datamodules.progress import ReadingProgress


@pytest.fixture
def clock(monkeypatch):
    """The clock that progress reads: `clock.now` is set by the test."""
    fake = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(datamodules.progress, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def read(clock, seconds: float, **console) -> str:
    out = io.StringIO()
    with ReadingProgress("reading", 100 * 2**20, Console(file=out, width=120, **console)) as meter:
        for _ in range(200):
            clock.now += seconds / 200
            meter(2**19)
    return out.getvalue()


def test_a_line_each_tenth_with_the_time_left(clock):
    lines = read(clock, 400.0).splitlines()
    # the first once five seconds have passed, the others at the tenths
    assert lines[0] == "reading: 2/100 MiB, 6 s gone, 394 s left"
    assert lines[5] == "reading: 50/100 MiB, 200 s gone, 200 s left"
    assert lines[-1] == "reading: 100/100 MiB, 400 s gone, 0 s left"
    assert len(lines) == 11


def test_a_short_job_prints_nothing(clock):
    assert read(clock, 4.0) == ""


def test_a_terminal_shows_a_bar(clock):
    assert "left" in read(clock, 4.0, force_terminal=True)
