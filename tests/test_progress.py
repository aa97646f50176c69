"""A long job says how far it is where somebody looks, and is quiet elsewhere."""

import io

import pytest

from keras_kd import _progress
from keras_kd._progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def run(monkeypatch, clock, stream, **options):
    monkeypatch.setattr("sys.stdout", stream)
    with Progress(**options) as progress:
        for _ in range(60):
            clock(1.0)
            progress.advance(10)
    return stream.getvalue()


def test_a_terminal_sees_one_line_rewritten_with_count_rate_and_time_left(monkeypatch, clock):
    text = run(monkeypatch, clock, Terminal(), total=600, title="Recording")
    assert text.count("\n") == 1
    assert text.count("\r") == 61
    assert "\rRecording: 300/600 samples, 10/s, 30 s left" in text
    assert text.rstrip().endswith("Recording: 600 samples, 10/s, 1 min 00 s")


def test_a_log_gets_a_line_every_ten_seconds_at_most_and_a_last_one(monkeypatch, clock):
    lines = run(monkeypatch, clock, io.StringIO(), total=600, what="images").splitlines()
    assert len(lines) == 7
    assert lines[0] == "100/600 images, 10/s, 50 s left"
    assert lines[-1] == "600 images, 10/s, 1 min 00 s"


def test_an_unknown_total_gives_count_and_rate(monkeypatch, clock):
    assert "\r300 samples, 10/s" in run(monkeypatch, clock, Terminal())


def test_verbose_0_is_silent(monkeypatch, clock):
    assert run(monkeypatch, clock, Terminal(), total=600, verbose=0) == ""


def test_a_notebook_is_treated_as_a_terminal(monkeypatch, clock):
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    assert "\r" in run(monkeypatch, clock, stream, total=600)


def test_a_job_that_did_nothing_prints_nothing(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    with Progress(5):
        pass
    assert stream.getvalue() == ""


def test_an_iterator_counts_what_it_yields(monkeypatch):
    progress = Progress(6, verbose=0)
    assert list(progress.over([[1, 2], [3], [4, 5, 6]], size=len)) == [[1, 2], [3], [4, 5, 6]]
    assert progress.done == 6


@pytest.mark.parametrize(("seconds", "text"), [(0.25, "0.2 s"), (59.4, "59 s"), (61, "1 min 01 s"), (3600 * 5 + 120, "5 h 02 min")])
def test_durations_are_readable(seconds, text):
    assert _progress._duration(seconds) == text


@pytest.mark.parametrize("verbose", ["loud", 3, None])
def test_an_unknown_verbosity_is_refused(verbose):
    with pytest.raises(ValueError, match="`verbose` must be"):
        Progress(1, verbose=verbose)


def test_by_itself_a_job_of_less_than_a_second_shows_nothing(monkeypatch, clock):
    for verbose, seconds, lines in (("auto", 0.9, 0), ("auto", 1.1, 1), (1, 0.0, 1)):
        stream = io.StringIO()
        monkeypatch.setattr("sys.stdout", stream)
        with Progress(2, verbose=verbose) as progress:
            clock(seconds)
            progress.advance(2)
        assert len(stream.getvalue().splitlines()) == lines
