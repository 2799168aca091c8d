"""The curves and the summary of a run's log."""

import io

import numpy as np
import pytest
from PIL import Image

from tsdsr_jax.training.summary import Curve, first_and_last, in_steps, plot_curves, summary_table


def rows(count: int) -> list[dict]:
    return [{"step": step, "loss": 10.0 / (1 + step), "gap": None} for step in range(count)]


@pytest.mark.parametrize("count", [1, 10, 200])
def test_curves_are_drawn(tmp_path, count):
    curves = [
        Curve("loss", ("loss",)),
        Curve("absent", ("absent", "gap")),
        Curve("log", ("loss",), log_scale=True),
    ]
    plot_curves(rows(count), curves, tmp_path / "curves.png", r"a title of $\foo$")
    picture = np.asarray(Image.open(io.BytesIO((tmp_path / "curves.png").read_bytes())).convert("RGB"))
    assert picture.shape[1] > 800 and (np.abs(picture.astype(int) - [31, 119, 180]).max(-1) < 30).sum() > 20


def test_without_values_there_are_no_curves(tmp_path):
    plot_curves([], [Curve("loss", ("loss",))], tmp_path / "curves.png", "title")
    assert not (tmp_path / "curves.png").exists()


def test_the_summary_compares_beginning_and_end():
    summary = first_and_last(rows(100), ["loss", "absent", "gap"])
    assert list(summary) == ["loss"]
    assert summary["loss"]["first"] == pytest.approx(np.mean([10 / (1 + s) for s in range(10)]))
    assert summary["loss"]["last"] == pytest.approx(np.mean([10 / (1 + s) for s in range(90, 100)]))
    assert "loss" in summary_table(summary) and summary_table({})


def test_time_in_steps_leaves_out_earlier_runs_and_validations():
    rows = [
        {"step": 10, "images_per_s": 1.0, "waiting_s": 5.0},
        {"step": 11, "images_per_s": 2.0, "waiting_s": 0.5},
        {"step": 12, "images_per_s": 4.0},
        {"step": 12, "validation_psnr": 30.0},
    ]
    assert in_steps(rows, 10, 8, 12.0).startswith("6 of 12 s went into steps (50%), 0 of them into waiting")
