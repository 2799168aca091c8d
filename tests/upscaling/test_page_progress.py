"""The page's progress bar: where it stands, what it says, and how it moves."""

import time

import pytest

from tsdsr_jax.upscaling import page_progress
from tsdsr_jax.upscaling.page_progress import ProgressBar, StageTimes


def run_bar(times: StageTimes, new: bool, seconds: dict[str, float], monkeypatch) -> list[tuple[float, str]]:
    """What the bar shows if stages take so long."""
    now, shown = [0.0], []
    monkeypatch.setattr(page_progress.time, "monotonic", lambda: now[0])
    with ProgressBar(lambda share, desc: shown.append((round(share, 3), desc)), lambda: None, times) as bar:
        bar("start", 0, 1000)
        if new:
            bar("compile", 0, 1)
        for stage, done, total in (
            ("encode", 0, 1), ("tiles", 0, 2), ("tiles", 1, 2), ("tiles", 2, 2), ("decode", 0, 1), ("write", 0, 1),
        ):  # fmt: skip
            bar(stage, done, total)
            now[0] += seconds[stage] / total
    return shown


def test_words_at_the_bar(monkeypatch):
    times, seconds = StageTimes(), {"encode": 2.0, "tiles": 1.0, "decode": 6.0, "write": 0.5}
    assert run_bar(times, True, seconds, monkeypatch) == [
        (0, "Encoding, compiling for this size"),
        (0.33, "Tile 1 of 2, compiling for this size"),
        (0.415, "Tile 2 of 2"),
        (0.5, "Tile 2 of 2"),
        (0.5, "Decoding, compiling for this size"),
        (0.95, "Writing"),
    ]
    # What compiles says nothing about the next one.
    assert [share for share, _ in run_bar(times, False, seconds, monkeypatch)] == [
        0,
        0.33,
        0.415,
        0.5,
        0.5,
        0.95,
    ]
    # After one that did not compile, the bar is where the time is: 2, 1.5, 6 and 0.5 of 10 seconds.
    assert run_bar(times, False, seconds, monkeypatch) == [
        (0, "Encoding"),
        (0.2, "Tile 1 of 2"),
        (0.275, "Tile 2 of 2"),
        (0.35, "Tile 2 of 2"),
        (0.35, "Decoding"),
        (0.95, "Writing"),
    ]


def test_the_bar_moves_within_a_long_step(monkeypatch):
    monkeypatch.setattr(page_progress, "_TICK_SECONDS", 0.01)
    times, shown = StageTimes(), []
    times.learn({"encode": 0.01, "tiles": 0.01, "decode": 0.3, "write": 0.01}, pixels=500)
    assert times.expected("decode", 1000) == pytest.approx(0.6)
    with ProgressBar(lambda share, desc: shown.append((share, desc)), lambda: None, times) as bar:
        bar("start", 0, 1000)
        bar("decode", 0, 1)
        time.sleep(0.3)
    shares = [share for share, desc in shown]
    assert shares == sorted(shares) and len(shares) > 3
    start, end = times.span("decode")
    assert shares[0] == start and start + 0.3 * (end - start) < shares[-1] < end
