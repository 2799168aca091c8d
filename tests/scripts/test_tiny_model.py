"""bench/tiny_model.py, which makes the table of docs/tiny.md."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import photos
import tiny_checkpoint as tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # which it imports from

from bench import structure, tiny_model
from tsdsr_jax.errors import UserError
from tsdsr_jax.weights.bundled import FOLDER


def save_pairs(root: Path, sides: tuple[int, ...]) -> tuple[Path, Path]:
    """`root/lr` and `root/hr`, four times as large."""
    for index, side in enumerate(sides):
        large = Image.fromarray(tiny.synthetic_photo(4 * side, 4 * side, index))
        tiny_model.save(np.asarray(large), root / "hr" / f"{index}.png")
        tiny_model.save(
            np.asarray(large.resize((side, side), Image.Resampling.BOX)), root / "lr" / f"{index}.png"
        )
    return root / "lr", root / "hr"


def psnr(results: Path, hr: Path) -> float:
    """PSNR of BT.601 luma in 219 levels, computed independently."""
    values = []
    for path in sorted(hr.iterdir()):
        ours, theirs = (
            np.asarray(Image.open(folder / path.name), np.float64) @ [65.481, 128.553, 24.966] / 255
            for folder in (results, hr)
        )
        values.append(10 * np.log10(255**2 / np.square(ours - theirs).mean()))
    return statistics.fmean(values)


def test_models_are_found_by_name_and_seed(tmp_path):
    for name in (
        "model-dasm-0",
        "model-mse-1",
        "model-mse-0",
        "model-other-2",
        "model-tsd-10",
        "merged-mse-0",
        "base",
    ):
        (tmp_path / name).mkdir()
    found = tiny_model.find_models(tmp_path)
    assert {name: [folder.name for folder in folders] for name, folders in found.items()} == {
        "mse": ["model-mse-0", "model-mse-1"], "tsd": ["model-tsd-10"], "dasm": ["model-dasm-0"],
        "other": ["model-other-2"],
    }  # fmt: skip
    assert list(found) == ["mse", "tsd", "dasm", "other"]
    with pytest.raises(UserError, match="no folder called model-NAME-SEED"):
        tiny_model.find_models(tmp_path / "base")


def test_the_control_has_the_students_psnr(tmp_path, capsys):
    lr, hr = save_pairs(tmp_path, (32, 40))
    bicubic = psnr(tiny_model.each(lr, tmp_path / "bicubic", tiny_model.enlarged), hr)
    below = tiny_model.control(lr, hr, tmp_path / "below", bicubic - 1.5)
    assert psnr(below, hr) == pytest.approx(bicubic - 1.5, abs=0.05)
    assert "not below" not in capsys.readouterr().out
    above = tiny_model.control(lr, hr, tmp_path / "above", bicubic + 0.1)
    assert "the control is bicubic itself" in capsys.readouterr().out
    assert psnr(above, hr) == pytest.approx(bicubic, abs=0.05)


def test_photographs_without_pairs_are_degraded_alike_each_time(tmp_path):
    tiny_model.save(tiny.synthetic_photo(70, 100, 3), tmp_path / "photos" / "a.png")
    made = []
    for name in ("one", "two"):
        options = tiny_model.Options(
            runs=tmp_path, hr_dir=tmp_path / "photos", niqe_params=tmp_path, output_dir=tmp_path / name
        )
        lr, hr = tiny_model.pairs_of(options)
        made.append([np.asarray(Image.open(folder / "a.png")) for folder in (lr, hr)])
        with pytest.raises(UserError, match="already exists"):
            tiny_model.pairs_of(options)
    assert made[0][0].shape == (16, 24, 3) and made[0][1].shape == (64, 96, 3)
    assert all(np.array_equal(*each) for each in zip(*made, strict=True))


def test_pairs_that_do_not_fit_are_refused(tmp_path):
    lr, hr = save_pairs(tmp_path, (16,))
    tiny_model.save(tiny.synthetic_photo(60, 64, 0), hr / "0.png")
    options = tiny_model.Options(
        runs=tmp_path, lr_dir=lr, hr_dir=hr, niqe_params=tmp_path, output_dir=tmp_path / "out"
    )
    with pytest.raises(UserError, match=r"hr/0\.png: expected four times .*lr/0\.png"):
        tiny_model.pairs_of(options)


@pytest.mark.slow
def test_the_table(tmp_path, monkeypatch, capsys):
    """Measures the bundled model under two names; passed on 2 busy cores in 38 s, 2026-11-26."""
    parameters = photos.data_folder() / "niqe_pris_params.npz"
    lr, hr = save_pairs(tmp_path, (48, 56))
    for name in ("model-mse-0", "model-mse-1", "model-dasm-0"):
        (tmp_path / "runs" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "runs" / name).symlink_to(FOLDER)
    flags = ["--runs", tmp_path / "runs", "--lr_dir", lr, "--hr_dir", hr, "--niqe_params", parameters]
    flags += ["--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["bench/tiny_model.py", *map(str, flags)])
    tiny_model.main()
    rows = {row["name"]: row["values"] for row in json.loads((tmp_path / "out" / "table.json").read_text())}
    assert list(rows) == [
        "bicubic", "autoencoder alone (ceiling)", "bicubic + blurred noise (control)", "student, mse", "student, dasm",
    ]  # fmt: skip
    assert len(set(rows["student, mse"]["psnr"])) == 1 == len(rows["bicubic"]["psnr"])
    for name, folder in (("bicubic", "bicubic"), ("student, dasm", "model-dasm-0")):
        assert rows[name]["psnr"][0] == pytest.approx(psnr(tmp_path / "out" / folder, hr), abs=0.01)
    printed = capsys.readouterr().out
    assert f"{rows['bicubic']['niqe'][0]:.3f}" in printed and "± 0.000" in printed


def test_structure_is_told_from_sharpening_and_noise():
    """A grid in flat areas shows in its energy alone, and equal pictures have the best values."""
    original = structure.luminance(tiny.synthetic_photo(128, 192, 3))
    assert structure.vif(original, original) == pytest.approx(1) and structure.gmsd(original, original) == 0
    noisy = original + np.random.default_rng(0).normal(0, 8, original.shape).astype(np.float32)
    assert structure.vif(noisy, original) < 0.9 and structure.gmsd(noisy, original) > 0.01
    grid = original + 2 * (np.arange(192) % 8 == 0).astype(np.float32)
    with_grid, without = structure.grid_energy(grid, original)
    # A column of 2 in 8 has a variance of 4 · 1/8 · 7/8.
    assert with_grid - without == pytest.approx(0.4375, rel=0.3)
    other, _ = structure.grid_energy(original + 2 * (np.arange(192) % 7 == 0).astype(np.float32), original)
    assert other - without < 0.1
