"""Runs infer/evaluate.py as a user does."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import oracle_metrics
from commands import Command
from tsdsr_jax.commands import evaluate
from tsdsr_jax.errors import UserError
from tsdsr_jax.evaluation import pyiqa_metrics, report, tables


class Evaluate(Command):
    """`output` is the folder of the log."""

    def flags(self, output: Path, *more: str) -> Sequence[str]:
        usual = {"--inp_imgs": f"{self.root}/sr", "--gt_imgs": f"{self.root}/hr", "--log": str(output)}
        # Flags that take several values add up when they are repeated.
        return [*(part for flag in usual.items() if flag[0] not in more for part in flag), *more]


@pytest.fixture
def command(tmp_path: Path, monkeypatch, capsys) -> Evaluate:
    """Three references with the results of two methods; pyiqa counts as not installed."""
    monkeypatch.setattr(pyiqa_metrics, "is_installed", lambda: False)
    generator = np.random.default_rng()
    for name in ("a", "b", "c"):
        hr = generator.integers(30, 226, (24, 30, 3), dtype=np.uint8)
        for folder, strength in (("hr", 0), ("sr", 20), ("other", 9)):
            noise = generator.integers(-strength, strength + 1, hr.shape)
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray((hr + noise).astype(np.uint8)).save(tmp_path / folder / f"{name}.png")
    return Evaluate(evaluate.main, "infer/evaluate.py", tmp_path, monkeypatch, capsys)


def expected(root: Path, folder: str) -> dict[str, tuple[float, float]]:
    found = {}
    for path in sorted((root / folder).glob("*.png")):
        pair = [np.asarray(Image.open(file)) for file in (path, root / "hr" / path.name)]
        found[path.stem] = oracle_metrics.psnr(*pair), oracle_metrics.ssim(*pair)
    return found


def row(text: str, start: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(start))


def test_table_csv_and_json(command, tmp_path):
    printed = command.done(tmp_path / "log", "--metrics", "psnr", "ssim")
    figures = expected(tmp_path, "sr")
    means = np.mean(list(figures.values()), axis=0)
    assert printed.splitlines()[0].split() == ["PSNR", "↑", "SSIM", "↑", "images"]
    assert [float(cell) for cell in row(printed, "sr")[1:]] == pytest.approx([*means, 3], abs=1.1e-4)
    assert (tmp_path / "log/METRICS.txt").read_text() in printed
    with (tmp_path / "log/METRICS.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["method"], r["image"]) for r in rows] == [("sr", name) for name in "abc"]
    for line in rows:
        assert (float(line["psnr"]), float(line["ssim"])) == pytest.approx(figures[line["image"]], abs=1e-4)
    content = json.loads((tmp_path / "log/METRICS.json").read_text())
    psnr = content["methods"]["sr"]["metrics"]["psnr"]
    values = [value for value, _ in figures.values()]
    assert psnr["mean"] == pytest.approx(means[0], abs=1e-4)
    assert psnr["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-3)
    assert psnr["ci95"] is None  # three are too few
    assert psnr["images"] == 3 and content["metrics"]["psnr"]["computed_by"] == "tsdsr_jax"
    assert {"python", "jax", "tsdsr_jax"} <= content["versions"].keys()


def test_intervals_of_many(command, tmp_path):
    for index in range(12):
        for folder in ("sr", "hr"):
            shutil.copy(
                tmp_path / folder / f"{'abc'[index % 3]}.png", tmp_path / folder / f"more {index}.png"
            )
    command.done(tmp_path / "log", "--metrics", "PSNR,ssim")
    found = json.loads((tmp_path / "log/METRICS.json").read_text())["methods"]["sr"]["metrics"]
    for name in ("psnr", "ssim"):
        low, high = found[name]["ci95"]
        assert low < found[name]["mean"] < high and found[name]["images"] == 15


def test_values_that_are_missing(command, tmp_path):
    """They are empty in the CSV, the table shows how many there are, and methods are compared on the others."""
    for folder in ("sr", "hr", "other"):
        image = Image.open(tmp_path / folder / "a.png").crop((0, 0, 10, 10))
        image.save(tmp_path / folder / "small.png")
    (tmp_path / "other/b.png").unlink()
    both = ("--inp_imgs", f"{tmp_path}/sr", f"{tmp_path}/other", "--compare")
    outcome = command(tmp_path / "log", "--metrics", "psnr", "ssim", *both)
    assert outcome.status == 1 and "no SSIM (10×10 pixels are too few" in outcome.err
    assert row(outcome.out, "sr")[2:] == [row(outcome.out, "sr")[2], "(3)", "4"]
    with (tmp_path / "log/METRICS.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["ssim"] for r in rows if r["image"] == "small"] == ["", ""]
    compared = json.loads((tmp_path / "log/METRICS.json").read_text())["differences"]["methods"]["other"]
    assert compared["psnr"]["images"] == 3 and compared["ssim"]["images"] == 2


def test_folders_of_one_name_are_told_by_their_paths(command, tmp_path):
    shutil.copytree(tmp_path / "sr", tmp_path / "deep/sr")
    both = ("--inp_imgs", f"{tmp_path}/sr", f"{tmp_path}/deep/sr")
    printed = command.done(tmp_path / "log", "--metrics", "psnr", *both)
    assert f"\n{tmp_path.name}/sr " in printed and "\ndeep/sr " in printed


def test_names_that_are_no_text(command, tmp_path):
    try:
        for folder in ("sr", "hr"):
            shutil.copy(tmp_path / folder / "a.png", tmp_path / folder / os.fsdecode(b"odd\xff.png"))
    except OSError as error:
        if error.errno != errno.EILSEQ:
            raise
        pytest.skip("this file system refuses names that are not UTF-8")
    command.done(tmp_path / "log", "--metrics", "psnr", "--names", "a\nb")
    text = (tmp_path / "log/METRICS.csv").read_text()
    assert "odd\\xff" in text and "a\\nb" in text and len(text.splitlines()) == 5
    json.loads((tmp_path / "log/METRICS.json").read_text())


def test_a_log_that_cannot_be_written_is_told_before_the_work(command, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "measure_pictures", None)
    assert "is a file" in command.refused(tmp_path / "sr/a.png/log", "--metrics", "psnr")
    (tmp_path / "log/METRICS.json").mkdir(parents=True)
    assert "METRICS.json: is a folder" in command.refused(tmp_path / "log", "--overwrite")


def test_what_was_left_out_is_named_even_if_the_log_fails(command, tmp_path, monkeypatch):
    (tmp_path / "sr/a.png").write_bytes(b"")
    monkeypatch.setattr(tables, "as_csv", fails)
    outcome = command(tmp_path / "log", "--metrics", "psnr")
    assert outcome.status == 1 and "a.png: is empty" in outcome.err and "no space" in outcome.err
    assert not list((tmp_path / "log").glob("*"))


def fails(*_) -> str:
    raise UserError("no space")


def test_methods_compared(command, tmp_path):
    more = ("--inp_imgs", f"{tmp_path}/sr", f"{tmp_path}/other", "--names", "noisy", "better one")
    printed = command.done(tmp_path / "log", "--metrics", "psnr", "--compare", *more)
    first, second = expected(tmp_path, "sr"), expected(tmp_path, "other")
    changes = [second[name][0] - first[name][0] for name in first]
    line = next(x for x in printed.splitlines() if x.startswith("better one") and "PSNR" in x)
    shown = line.split("↑")[1].split()
    assert shown[0].startswith("+") and float(shown[0]) == pytest.approx(np.mean(changes), abs=2e-4)
    assert shown[-3:] == ["3", "0", "3"]  # better, worse, images
    found = json.loads((tmp_path / "log/METRICS.json").read_text())["differences"]
    assert found["to"] == "noisy"
    assert found["methods"]["better one"]["psnr"]["mean"] == pytest.approx(np.mean(changes), abs=1e-3)


def test_what_is_missing_is_said(command, tmp_path):
    """By default, metrics of the paper that cannot be computed do not fail the run."""
    printed = command.done(tmp_path / "log")
    assert "Not computed" in printed and "musiq" in printed and "pip install 'tsdsr_jax[metrics]'" in printed
    content = json.loads((tmp_path / "log/METRICS.json").read_text())
    assert set(content["not_computed"]) == {
        "lpips",
        "dists",
        "fid",
        "niqe",
        "musiq",
        "maniqa-pipal",
        "clipiqa",
    }
    # If asked for by name, they do.
    outcome = command(tmp_path / "log2", "--metrics", "psnr", "musiq")
    assert outcome.status == 1 and "musiq: needs pyiqa" in outcome.out
    assert "nothing to compute; musiq: needs pyiqa" in command.refused(
        tmp_path / "log3", "--metrics", "musiq"
    )
    assert not (tmp_path / "log3").exists()


def test_files_left_out_are_named_and_fail(command, tmp_path):
    (tmp_path / "sr/a.png").write_bytes(b"")
    (tmp_path / "sr/b.png").rename(tmp_path / "sr/bb.png")
    outcome = command(tmp_path / "log", "--metrics", "psnr")
    assert outcome.status == 1
    assert "\nsr/a.png: is empty" in outcome.err
    assert "\nsr/bb.png: no file of this name" in outcome.err
    assert "3 files or values are left out of the means" in outcome.err
    figures = expected_one(tmp_path, "c")
    assert [float(cell) for cell in row(outcome.out, "sr")[1:]] == pytest.approx([figures, 1], abs=1.1e-4)
    content = json.loads((tmp_path / "log/METRICS.json").read_text())
    assert len(content["methods"]["sr"]["not_measured"]) == 3


def expected_one(root: Path, name: str) -> float:
    return oracle_metrics.psnr(
        *(np.asarray(Image.open(root / folder / f"{name}.png")) for folder in ("sr", "hr"))
    )


def test_log_files_are_not_replaced(command, tmp_path):
    command.done(tmp_path / "log", "--metrics", "psnr")
    before = (tmp_path / "log/METRICS.csv").read_text()
    assert "METRICS.txt: exists" in command.refused(tmp_path / "log", "--metrics", "ssim")
    assert (tmp_path / "log/METRICS.csv").read_text() == before
    command.done(tmp_path / "log", "--metrics", "ssim", "--overwrite")
    command.done(tmp_path / "log", "--metrics", "ssim", "--log_name", "again")
    assert (tmp_path / "log/again.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--inp_imgs", "nowhere"), "nowhere: no such folder"),
        (("--inp_imgs", "{root}/sr/a.png"), "a.png: is a file; expected a folder"),
        (("--gt_imgs", "{root}/empty"), "no images in it"),
        (("--gt_imgs", "{root}/unpaired"), "no file has the same name in both"),
        (("--gt_imgs", "a", "b"), "--gt_imgs: 2 folders for 1 of --inp_imgs"),
        (("--names", "a", "b"), "--names: 2 names for 1 folders"),
        (("--names", "x", "x", "--inp_imgs", "a", "b"), "x: names several folders"),
        (("--compare",), "--compare: needs at least two folders"),
        (("--compare", "--inp_imgs", "a", "b", "--gt_imgs", "c", "d"), "give one folder of --gt_imgs"),
        (("--niqe_params", "{root}"), "is a folder"),
        (("--niqe_params", "{root}/sr/a.png"), "not a file of NIQE's parameters"),
        (("--lpips_weights", "{root}/sr/a.png"), "a.png"),
        (("--log", "{root}/sr/a.png"), "a.png is a file"),
        (("--log_name", "a/b"), "expected a file name"),
        (("--log_name", ".."), "expected a file name"),
        (("--inp_imgs", "x" * 300), "no such folder"),
        (("--lr_imgs", "{root}/sr"), "add --report"),
        (("--lr_imgs", "{root}/none", "--report", "{root}/page.html"), "no such folder"),
        (("--lpips_weights", "{root}/none"), "not found"),
        (("--max_pixels", "0"), "expected at least 1"),
        (("--device", "abacus"), "--device abacus"),
        (("--report", "{root}/sr/a.png"), "a.png"),
        (("--metrics",), "--metrics needs"),
    ],
)
def test_mistakes_are_one_line(command, tmp_path, flags, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unpaired").mkdir()
    shutil.copy(tmp_path / "hr/a.png", tmp_path / "unpaired/z.png")
    line = command.refused(tmp_path / "log", *(flag.format(root=tmp_path) for flag in flags))
    assert message in line and len(line.splitlines()) == 1
    assert not (tmp_path / "log").exists()


def test_report(command, tmp_path, monkeypatch):
    """Methods share an entry per picture: input, results, reference; every value and every gap is on the page."""
    written = {}
    monkeypatch.setattr(report, "write_report", lambda path, **page: written.update(page, path=path))
    (tmp_path / "other/c.png").write_bytes(b"")
    more = ("--inp_imgs", f"{tmp_path}/sr", f"{tmp_path}/other", "--lr_imgs", f"{tmp_path}/hr")
    outcome = command(
        tmp_path / "log", "--metrics", "psnr", "musiq", "--report", str(tmp_path / "page.html"), *more
    )
    assert outcome.status == 1 and written["path"] == Path("page.html")
    assert [entry.name for entry in written["entries"]] == ["a", "b", "c"]
    first = written["entries"][0]
    assert [(layer.title, layer.path) for layer in first.layers] == [
        ("input", Path("hr/a.png")),
        ("sr", Path("sr/a.png")),
        ("other", Path("other/a.png")),
        ("reference", Path("hr/a.png")),
    ]
    for name in ("sr", "other"):
        pair = [np.asarray(Image.open(tmp_path / folder / "a.png")) for folder in (name, "hr")]
        assert first.values[f"{name} · PSNR"] == pytest.approx(oracle_metrics.psnr(*pair), abs=1e-4)
    assert [column.name for column in written["columns"]] == ["sr · PSNR", "other · PSNR"]
    assert [row[0] for row in written["summary"].rows] == ["sr", "other"]
    assert any("musiq" in note for note in written["notes"])
    assert any("other/c.png: is empty" in note for note in written["notes"])


def test_report_of_different_references(command, tmp_path):
    """Two test sets, each with its own entries under its name, on a real page."""
    shutil.copytree(tmp_path / "hr", tmp_path / "hr2")
    more = (
        "--inp_imgs",
        f"{tmp_path}/sr",
        f"{tmp_path}/other",
        "--gt_imgs",
        f"{tmp_path}/hr",
        f"{tmp_path}/hr2",
    )
    page = tmp_path / "page.html"
    printed = command.done(tmp_path / "log", "--metrics", "psnr", "--report", str(page), *more)
    assert f"Look at {page.name}" in printed
    text = page.read_text()
    assert "other/a" in text and "sr/a" in text


# --- several processes ----------------------------------------------------------------------------


def test_parts_joined_are_the_whole(command, tmp_path):
    """Whoever comes last joins them, in any order; nothing else stays behind."""
    flags = ("--metrics", "psnr", "ssim", "--inp_imgs", f"{tmp_path}/sr", f"{tmp_path}/other", "--compare")
    whole = command.done(tmp_path / "whole", *flags)
    for index in (2, 0):
        said = command.done(tmp_path / "log", *flags, "--shard", f"{index}/3")
        assert said == f"part {index} of 3 is measured; the process that comes last writes the tables\n"
    said = command.done(tmp_path / "log", *flags, "--shard", "1/3")
    assert said.partition("\nin ")[0] == whole.partition("\nin ")[0]
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "log").iterdir()} == names
    for name in ("METRICS.csv", "METRICS.txt"):
        assert (tmp_path / "log" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_part_of_other_pictures_is_not_joined(command, tmp_path):
    flags = ("--metrics", "psnr")
    command.done(tmp_path / "log", *flags, "--shard", "0/2")
    Image.fromarray(np.zeros((24, 30, 3), np.uint8)).save(tmp_path / "sr" / "a.png")
    assert "comes last" in command.done(tmp_path / "log", *flags, "--shard", "1/2")
    assert "images" in command.done(tmp_path / "log", *flags, "--shard", "0/2")


def test_more_parts_than_pictures_and_what_cannot_be_measured(command, tmp_path):
    (tmp_path / "sr" / "b.png").write_bytes(b"no picture")
    flags = ("--metrics", "psnr")
    whole = command.refused(tmp_path / "whole", *flags)
    for index in range(4):
        command.done(tmp_path / "log", *flags, "--shard", f"{index}/5")
    said = command.refused(tmp_path / "log", *flags, "--shard", "4/5")
    assert said.replace(f"{tmp_path}/", "") == whole.replace(f"{tmp_path}/", "") and "b.png" in said


def test_parts_need_a_folder(command, tmp_path):
    said = command.typed(
        "infer/evaluate.py", "--inp_imgs", f"{tmp_path}/sr", "--gt_imgs", f"{tmp_path}/hr", "--shard", "0/2"
    )
    assert said.status == 1 and "--shard: needs --log" in said.err
