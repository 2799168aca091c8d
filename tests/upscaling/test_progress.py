"""The command line's progress: tiles in the bar, and times without compilation."""

import io
import sys
import time

import pytest
from test_compile_watch import begin, end

from tsdsr_jax.compile_watch import CompileWatch
from tsdsr_jax.upscaling.progress import PhotoBar, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_stages_of_a_photograph(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with CompileWatch() as watch:
        bar = PhotoBar(2, watch)
        bar.stages("encode", 0, 1)
        bar.stages("tiles", 0, 12)
        assert "encoding" in terminal.getvalue() and "tile 1 of 12" in terminal.getvalue()
        for done in range(1, 12):
            bar.stages("tiles", done, 12)
        assert terminal.getvalue().count("tile ") < 5  # not each of them is drawn
        bar.update()
        bar.close()
    last = terminal.getvalue().rstrip().rpartition("\r")[2]
    assert "1/2" in last and "tile" not in last


def test_without_a_terminal_the_device_need_not_wait():
    with CompileWatch() as watch:
        bar = PhotoBar(2, watch)
        assert bar.stages is None
        bar.close()


def test_compilation_is_no_part_of_the_times(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with CompileWatch() as watch:
        bar = PhotoBar(2, watch)
        begin()
        time.sleep(0.3)
        end()
        assert bar.seconds < 0.2
        bar.update()
        assert bar.bar.format_dict["elapsed"] < 0.2
        bar.close()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0341, "0.034 s"), (8.12, "8.1 s"), (99.9, "99.9 s"), (99.99, "1:40 min"), (3723, "1:02:03 h")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
