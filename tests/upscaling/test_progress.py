"""The command line's progress: tiles in the bar, and times without compilation."""

import io
import sys
import time
from types import SimpleNamespace

import pytest
from test_compile_watch import begin, end

from tsdsr_jax.compile_watch import CompileWatch
from tsdsr_jax.upscaling import batch_run
from tsdsr_jax.upscaling.planning import Settings
from tsdsr_jax.upscaling.progress import PhotoBar, duration
from tsdsr_jax.upscaling.tiling import cut_batch


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


@pytest.mark.parametrize(("side", "tiles"), [(128, 1), (512, 9)])
def test_only_photographs_of_many_tiles_make_the_device_wait(side, tiles):
    """A batch counts by its largest photograph, not by all of its tiles."""
    settings = Settings(1, process_size=128, latent_tile=32)
    small, large = (settings.plan((size, size)) for size in (128, side))
    slots = [SimpleNamespace(plan=plan) for plan in (small, small, large)]
    assert len(cut_batch([large], settings)) == tiles
    for progress_from in (0, tiles, tiles + 1):
        run = SimpleNamespace(settings=settings, progress=print, progress_from=progress_from)
        expected = print if tiles >= progress_from else None
        assert batch_run._Run._progress_of(run, SimpleNamespace(slots=slots)) is expected
