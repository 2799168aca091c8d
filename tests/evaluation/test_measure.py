"""Pairs files by name, and measures those that can be measured."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

import oracle_metrics
from tsdsr_jax.errors import UserError
from tsdsr_jax.evaluation import pyiqa_metrics, registry
from tsdsr_jax.evaluation.measure import FilePair, find_pairs, measure
from tsdsr_jax.evaluation.registry import Metric, Sources, load_metrics
from tsdsr_jax.images.profiles import profile_of_chunks
from tsdsr_jax.models.lpips import LPIPS
from tsdsr_jax.weights.lpips_files import save_lpips


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng()


def write(path: Path, image: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return image


def random_image(generator: np.random.Generator, height: int = 20, width: int = 24) -> np.ndarray:
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def measure_here(pairs, metrics, max_pixels=10**6, **options):
    return measure(pairs, metrics, jax.devices()[0], max_pixels, **options)


def test_pairs_by_name_not_by_position(tmp_path: Path, generator):
    for name in ("b.png", "c.png", "deep/a.x2.png"):
        write(tmp_path / "sr" / name, random_image(generator))
    for name in ("a.png", "c.bmp", "deep/a.x2.png"):
        write(tmp_path / "hr" / name, random_image(generator))
    pairs, problems = find_pairs(tmp_path / "sr", tmp_path / "hr")
    assert pairs == [
        FilePair("c", tmp_path / "sr/c.png", tmp_path / "hr/c.bmp"),
        FilePair("deep/a.x2", tmp_path / "sr/deep/a.x2.png", tmp_path / "hr/deep/a.x2.png"),
    ]
    assert problems == [
        f"{tmp_path / 'hr/a.png'}: no file of this name in {tmp_path / 'sr'}",
        f"{tmp_path / 'sr/b.png'}: no file of this name in {tmp_path / 'hr'}",
    ]
    alone, problems = find_pairs(tmp_path / "sr", None)
    assert [pair.name for pair in alone] == ["b", "c", "deep/a.x2"] and not problems


def test_unicode_forms_of_a_name_are_one_name(tmp_path: Path, generator):
    write(tmp_path / "sr" / "Cafe\u0301.png", random_image(generator))
    write(tmp_path / "hr" / "Caf\u00e9.png", random_image(generator))
    (tmp_path / "sr" / "b.heic").touch()
    pairs, problems = find_pairs(tmp_path / "sr", tmp_path / "hr")
    assert [pair.name for pair in pairs] == ["Caf\u00e9"]
    assert len(problems) == 1 and "b.heic" in problems[0]


def test_two_files_of_one_name(tmp_path: Path, generator):
    for name in ("a.png", "a.jpg", "b.png"):
        write(tmp_path / name, random_image(generator))
    pairs, problems = find_pairs(tmp_path, None)
    assert [pair.name for pair in pairs] == ["b"]
    assert len(problems) == 1 and "several files with one name" in problems[0]
    assert str(tmp_path / "a.jpg") in problems[0] and str(tmp_path / "a.png") in problems[0]


def test_no_pairs(tmp_path: Path, generator):
    write(tmp_path / "sr/a.png", random_image(generator))
    write(tmp_path / "hr/b.png", random_image(generator))
    with pytest.raises(UserError, match=r"in both \(for example a.png and b.png\)"):
        find_pairs(tmp_path / "sr", tmp_path / "hr")
    with pytest.raises(UserError, match="is a file"):
        find_pairs(tmp_path / "sr/a.png", tmp_path / "hr")
    with pytest.raises(UserError, match="no such folder"):
        find_pairs(tmp_path / "sr", tmp_path / "none")


def test_values_of_many_sizes(tmp_path: Path, generator):
    """More sizes than compiled shapes, both orientations, and batches that are not full."""
    expected = {}
    for index in range(23):
        height, width = generator.integers(12, 60, 2)
        hr = write(tmp_path / f"hr/{index}.png", random_image(generator, height, width))
        noise = generator.integers(-9, 10, hr.shape)
        sr = write(tmp_path / f"sr/{index}.png", np.clip(hr + noise, 0, 255).astype(np.uint8))
        expected[str(index)] = oracle_metrics.psnr(sr, hr), oracle_metrics.ssim(sr, hr)
    metrics, missing = load_metrics(("ssim", "psnr"), Sources(references=True))
    assert not missing
    pairs, _ = find_pairs(tmp_path / "sr", tmp_path / "hr")
    done = []
    measured = measure_here(pairs, metrics, on_done=done.append)
    assert not measured.problems and sum(done) == 23
    assert [pair.name for pair in measured.pairs] == sorted(expected)
    for name, (psnr, ssim) in expected.items():
        assert measured.values[name] == pytest.approx({"psnr": psnr, "ssim": ssim}, abs=1e-4)


def test_batches_that_are_not_full(tmp_path: Path, generator, monkeypatch):
    monkeypatch.setattr("tsdsr_jax.evaluation.measure._BATCH_PIXELS", 3 * 20 * 24)
    for index in range(7):
        write(tmp_path / f"{index}.png", random_image(generator))
    metrics, _ = load_metrics(("psnr",), Sources(references=True))
    pairs = [FilePair(str(i), tmp_path / f"{i}.png", tmp_path / f"{(i + 1) % 7}.png") for i in range(7)]
    measured = measure_here(pairs, metrics)
    for pair in pairs:
        images = (np.asarray(Image.open(path)) for path in (pair.result, pair.reference))
        assert measured.values[pair.name]["psnr"] == pytest.approx(oracle_metrics.psnr(*images), abs=1e-4)


def test_what_cannot_be_measured_is_named_and_left_out(tmp_path: Path, generator):
    good = write(tmp_path / "hr/good.png", random_image(generator))
    write(tmp_path / "sr/good.png", 255 - good)
    for name in ("size", "empty", "torn", "text"):
        image = write(tmp_path / f"hr/{name}.png", random_image(generator))
        write(tmp_path / f"sr/{name}.png", image)
    write(tmp_path / "sr/size.png", random_image(generator, 20, 25))
    (tmp_path / "sr/empty.png").write_bytes(b"")
    torn = (tmp_path / "sr/torn.png").read_bytes()
    (tmp_path / "sr/torn.png").write_bytes(torn[: len(torn) // 2])
    (tmp_path / "hr/text.png").write_text("no image")
    metrics, _ = load_metrics(("psnr",), Sources(references=True))
    pairs, problems = find_pairs(tmp_path / "sr", tmp_path / "hr")
    assert not problems
    done = []
    measured = measure_here(pairs, metrics, on_done=done.append)
    assert [pair.name for pair in measured.pairs] == ["good"] and list(measured.values) == ["good"]
    assert measured.of("psnr") == [pytest.approx(oracle_metrics.psnr(255 - good, good), abs=1e-4)]
    assert sum(done) == 5
    lines = sorted(measured.problems)
    assert len(lines) == 4
    assert lines[0].startswith(f"{tmp_path / 'hr/text.png'}: not a readable")
    assert lines[1].startswith(f"{tmp_path / 'sr/empty.png'}: is empty")
    size, reference = tmp_path / "sr/size.png", tmp_path / "hr/size.png"
    assert lines[2] == f"{size}: 25×20 pixels, but {reference} has 24×20; not measured"
    assert lines[3].startswith(f"{tmp_path / 'sr/torn.png'}: the image is damaged or cut short")


def test_pictures_above_the_limit_are_left_out(tmp_path: Path, generator):
    for name, size in {"a": (20, 20), "b": (20, 21)}.items():
        write(tmp_path / f"{name}.png", random_image(generator, *size))
    pairs, _ = find_pairs(tmp_path, tmp_path)
    metrics, _ = load_metrics(("psnr",), Sources(references=True))
    measured = measure_here(pairs, metrics, max_pixels=400)
    assert [pair.name for pair in measured.pairs] == ["a"]
    assert len(measured.problems) == 1 and "b.png" in measured.problems[0]


def test_odd_names_and_files(tmp_path: Path, generator):
    """Names that are not UTF-8 or contain newlines; a pipe does not block, and a broken link is named."""
    names = ["täst", "line\nend", os.fsdecode(b"odd\xff")]
    for name in tuple(names):
        try:
            write(tmp_path / f"{name}.png", random_image(generator))
        except OSError as error:
            if error.errno != errno.EILSEQ:  # a file system whose names are UTF-8
                raise
            names.remove(name)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    pairs, _ = find_pairs(tmp_path, None)
    assert {pair.name for pair in pairs} >= {"täst", "line\\nend", "gone"}
    assert all(pair.name.isprintable() for pair in pairs) and "pipe" not in {pair.name for pair in pairs}
    measured = measure_here(pairs, [constant("x", 1.0)])
    assert len(measured.pairs) == len(names)
    assert len(measured.problems) == 1 and "gone.png: does not exist" in measured.problems[0]


def test_niqe_needs_two_blocks(tmp_path: Path, generator):
    root = generator.normal(size=(36, 36)) / 6
    np.savez(tmp_path / "model.npz", mu_pris_param=np.zeros(36), cov_pris_param=root @ root.T + np.eye(36))
    for name, size in {"a": (96, 191), "b": (192, 96), "c": (96, 192)}.items():
        write(tmp_path / f"images/{name}.png", random_image(generator, *size))
    pairs, _ = find_pairs(tmp_path / "images", None)
    (metric,), _ = load_metrics(("niqe",), Sources(False, niqe_params=tmp_path / "model.npz"))
    assert metric.better == "lower" and not metric.needs_reference
    measured = measure_here(pairs, [metric])
    assert {name for name, values in measured.values.items() if values} == {"b", "c"}
    assert "no NIQE (191×96 pixels are too few; at least 192×96 are needed)" in measured.problems[0]


def test_no_memory_costs_the_pictures_not_the_run(tmp_path: Path, generator):
    write(tmp_path / "a.png", random_image(generator))
    pairs, _ = find_pairs(tmp_path, None)

    def exhausted(*_):
        raise MemoryError

    metrics = [
        Metric("x", None, False, "test", lambda batch: exhausted),
        Metric("y", None, False, "test", exhausted),
        constant("z", 1.0),
    ]
    measured = measure_here(pairs, metrics)
    assert measured.values == {"a": {"z": 1.0}}
    assert len(measured.problems) == 2 and all("out of memory" in line for line in measured.problems)
    with pytest.raises(ZeroDivisionError):  # a bug is no reason
        measure_here(pairs, [Metric("x", None, False, "test", lambda batch: lambda: 1 / 0)])


def test_too_small_for_one_metric(tmp_path: Path, generator):
    write(tmp_path / "a.png", random_image(generator, 10, 40))
    write(tmp_path / "b.png", random_image(generator, 11, 40))
    pairs = [FilePair(name, tmp_path / f"{name}.png", tmp_path / f"{name}.png") for name in "ab"]
    metrics, _ = load_metrics(("psnr", "ssim"), Sources(references=True))
    measured = measure_here(pairs, metrics)
    assert list(measured.values["a"]) == ["psnr"] and list(measured.values["b"]) == ["psnr", "ssim"]
    assert measured.problems == [
        f"{tmp_path / 'a.png'}: no SSIM (40×10 pixels are too few; at least 11×11 are needed)"
    ]
    alone = measure_here(pairs[:1], metrics)
    assert alone.missing == {"ssim": "no picture could be measured"}


def constant(name: str, value: float | str) -> Metric:
    return Metric(name, "higher", False, "test", lambda batch: lambda: [value] * batch.count)


def test_values_that_are_none(tmp_path: Path, generator):
    write(tmp_path / "a.png", random_image(generator))
    pairs, _ = find_pairs(tmp_path, None)
    measured = measure_here(
        pairs, [constant("x", float("inf")), constant("y", "as it is"), constant("z", 3.0)]
    )
    assert measured.values == {"a": {"z": 3.0}}
    assert measured.problems == [
        f"{tmp_path / 'a.png'}: no X (inf)",
        f"{tmp_path / 'a.png'}: no Y (as it is)",
    ]


def test_metrics_of_whole_folders(tmp_path: Path, generator):
    for name in ("sr/a.png", "sr/b.png", "hr/a.png", "hr/b.png"):
        write(tmp_path / name, random_image(generator))
    (tmp_path / "sr/b.png").write_bytes(b"")
    pairs, _ = find_pairs(tmp_path / "sr", tmp_path / "hr")

    def names(results, references):
        assert results == [tmp_path / "sr/a.png"] and references == [tmp_path / "hr/a.png"]
        return 4.5

    def fails(results, references):
        raise RuntimeError("no network\nand more")

    metrics = [
        Metric("fid", "lower", True, "test", over_folders=names),
        Metric("fid2", "lower", True, "test", over_folders=fails),
        Metric("fid3", "lower", True, "test", over_folders=lambda *_: float("nan")),
    ]
    measured = measure_here(pairs, metrics)
    assert measured.of_folder == {"fid": 4.5}
    assert measured.missing == {
        "fid2": "failed on these files (no network)",
        "fid3": "is nan for these files",
    }


def test_metrics_that_are_missing(monkeypatch):
    monkeypatch.setattr(registry.pyiqa_metrics, "is_installed", lambda: False)
    metrics, missing = load_metrics(("psnr", "niqe", "lpips", "musiq", "psnr"), Sources(references=False))
    assert not metrics and list(missing) == ["psnr", "niqe", "lpips", "musiq"]
    assert missing["psnr"] == "compares with a reference: needs --gt_imgs"
    assert "--niqe_params" in missing["niqe"] and "--lpips_weights" in missing["lpips"]
    assert missing["musiq"] == "needs pyiqa: pip install 'tsdsr_jax[metrics]'"
    _, missing = load_metrics(("pnsr",), Sources(references=True))
    assert missing["pnsr"].endswith("did you mean psnr?")


def test_lpips_sees_each_picture_in_its_own_size(tmp_path: Path, generator):
    model = LPIPS("alex")
    params = model.init(jax.random.key(3), *np.zeros((2, 1, 32, 32, 3)))["params"]
    save_lpips(tmp_path / "alex.safetensors", "alex", params)
    expected = {}
    for name, (height, width) in {"a": (40, 50), "b": (45, 44), "c": (40, 50)}.items():
        pair = [
            write(tmp_path / f"{folder}/{name}.png", random_image(generator, height, width))
            for folder in "xy"
        ]
        unit = (image[None].astype(np.float32) / 127.5 - 1 for image in pair)
        expected[name] = float(model.apply({"params": params}, *unit)[0])
    write(tmp_path / "x/d.png", write(tmp_path / "y/d.png", random_image(generator, 30, 80)))
    metrics, missing = load_metrics(("lpips",), Sources(True, lpips_weights=tmp_path / "alex.safetensors"))
    assert not missing and metrics[0].better == "lower"
    pairs, _ = find_pairs(tmp_path / "x", tmp_path / "y")
    measured = measure_here(pairs, metrics)
    assert {name: values["lpips"] for name, values in measured.values.items() if values} == pytest.approx(
        expected, rel=1e-4
    )
    assert len(measured.problems) == 1 and "no LPIPS (80×30 pixels are too few" in measured.problems[0]


# Answers as pyiqa does (0.1.13 and 0.1.16: `create_metric`, `list_models`, tensors (B, 3, H, W) in [0, 1], folders for FID).
STAND_IN = """
import os

def list_models():
    return ["shift", "bright", "fid", "broken"]

def create_metric(name):
    print("a line that does not belong on standard output")
    if name == "broken":
        raise OSError("no weights here\\nand more")
    return Model(name)

class Model:
    def __init__(self, name):
        self.metric_name = name
        self.metric_mode = "FR" if name == "shift" else "NR"
        self.lower_better = name != "bright"

    def __call__(self, result, reference=None):
        if self.metric_name == "fid":
            return len(os.listdir(result)) + len(os.listdir(reference)) / 10
        assert result.shape[:2] == (1, 3) and 0 <= result.min() and result.max() <= 1
        if result.shape[2] < 12:
            raise AssertionError("too small for me")
        return (result - reference).mean() if self.metric_mode == "FR" else result.mean()
"""


def test_metrics_of_pyiqa(tmp_path: Path, generator, monkeypatch, capsys):
    pytest.importorskip("torch")
    (tmp_path / "pyiqa.py").write_text(STAND_IN)
    monkeypatch.delitem(sys.modules, "pyiqa", raising=False)
    # Removed afterwards, although an import adds it.
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    monkeypatch.delitem(sys.modules, "pyiqa")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pyiqa_metrics, "version", lambda package: "0.1.13")
    a = (
        write(tmp_path / "x/a.png", random_image(generator)),
        write(tmp_path / "y/a.png", random_image(generator)),
    )
    write(tmp_path / "x/b.png", write(tmp_path / "y/b.png", random_image(generator, 11, 40)))
    pairs, _ = find_pairs(tmp_path / "x", tmp_path / "y")
    metrics, missing = load_metrics(("shift", "bright", "fid", "broken", "other"), Sources(references=True))
    assert list(missing) == ["broken", "other"]
    assert (
        missing["broken"]
        == "pyiqa cannot load it (no weights here); its weights come from the Hugging Face Hub"
    )
    assert "no metric of this name" in missing["other"]
    assert [(m.name, m.better, m.needs_reference) for m in metrics] == [
        ("shift", "lower", True),
        ("bright", "higher", False),
        ("fid", "lower", True),
    ]
    measured = measure_here(pairs, metrics)
    result, reference = (image.astype(float) / 255 for image in a)
    assert measured.values["a"] == pytest.approx(
        {"shift": (result - reference).mean(), "bright": result.mean()}, abs=1e-5
    )
    assert measured.values["b"] == {}
    assert measured.problems == [
        f"{tmp_path / 'x/b.png'}: no {m} (too small for me)" for m in ("SHIFT", "BRIGHT")
    ]
    assert measured.of_folder["fid"] == pytest.approx(2.2)
    assert capsys.readouterr().out == ""
    # Without references, only metrics without reference remain.
    metrics, missing = load_metrics(("shift", "bright", "fid"), Sources(references=False))
    assert [metric.name for metric in metrics] == ["bright"] and list(missing) == ["shift", "fid"]


# ---- colors and transparency ---------------------------------------------------------------------


def measured_pair(tmp_path: Path, result: Image.Image, reference: Image.Image, **saved):
    result.save(tmp_path / "result.png", **saved)
    reference.save(tmp_path / "reference.png")
    metrics, _ = load_metrics(("psnr",), Sources(references=True))
    return measure_here([FilePair("a", tmp_path / "result.png", tmp_path / "reference.png")], metrics)


def smooth_image(size: int = 64) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return np.dstack([60 + x * 2, 40 + y * 2, 200 - x - y]).astype(np.uint8)


def wide_gamut(name: str) -> bytes:
    chunks = {
        "P3": {b"cICP": bytes((12, 13, 0, 1))},
        "ProPhoto": {
            b"gAMA": (55556).to_bytes(4, "big"),
            b"cHRM": np.array([34567, 35850, 73470, 26530, 15960, 84040, 3660, 10], ">u4").tobytes(),
        },
    }[name]
    profile = profile_of_chunks(chunks, gray=False)
    assert profile
    return profile


@pytest.mark.parametrize("name", ["P3", "ProPhoto"])
def test_pictures_are_compared_in_srgb(tmp_path: Path, name: str):
    """The same picture in another color space differs by no more than its eight bits' rounding."""
    reference, profile = Image.fromarray(smooth_image()), wide_gamut(name)
    wide = ImageCms.profileToProfile(reference, ImageCms.createProfile("sRGB"), io.BytesIO(profile))
    wide = Image.fromarray(np.asarray(wide))  # without the profile that Pillow has noted
    (ignored,) = measured_pair(tmp_path, wide, reference).of("psnr")
    (value,) = measured_pair(tmp_path, wide, reference, icc_profile=profile).of("psnr")
    assert ignored < 45 and value > 57


def test_hidden_colors_are_not_measured(tmp_path: Path):
    colors, alpha = smooth_image(), np.zeros((64, 64), np.uint8)
    alpha[8:40, 8:50] = 255
    rubbish = np.where(alpha[..., None] > 0, colors, 255 - colors)
    pair = [Image.fromarray(np.dstack([one, alpha])) for one in (colors, rubbish)]
    measured = measured_pair(tmp_path, *pair)
    assert measured.of("psnr") == [pytest.approx(80)], "what equal pictures have"
    assert measured.problems == []
    assert measured.notes == [
        f"{tmp_path / 'result.png'}: measured over white, because they or their references are transparent"
    ]


def test_a_picture_with_transparency_is_compared_with_one_on_white(tmp_path: Path):
    colors, alpha = smooth_image(), np.full((64, 64), 128, np.uint8)
    white = (colors.astype(int) * 128 + 255 * 127 + 127) // 255
    result = Image.fromarray(np.dstack([colors, alpha]))
    (value,) = measured_pair(tmp_path, result, Image.fromarray(white.astype(np.uint8))).of("psnr")
    assert value > 60


def test_an_opaque_alpha_is_worth_no_note(tmp_path: Path):
    image = Image.fromarray(smooth_image()).convert("RGBA")
    assert measured_pair(tmp_path, image, image).notes == []


def test_colors_that_cannot_be_compared_are_named_and_left_out(tmp_path: Path):
    hdr = PngInfo()
    hdr.add(b"cICP", bytes((9, 16, 0, 1)))
    image = Image.fromarray(smooth_image())
    measured = measured_pair(tmp_path, image, image, pnginfo=hdr)
    assert measured.pairs == []
    assert measured.problems == [
        f"{tmp_path / 'result.png'}: its colors are HDR (PQ or HLG), which sRGB cannot show; not measured"
    ]


def test_what_was_wrong_with_a_file_is_noted(tmp_path: Path):
    image = Image.fromarray(smooth_image())
    image.save(tmp_path / "a.jpg", quality=95)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-2])
    metrics, _ = load_metrics(("psnr",), Sources(references=True))
    measured = measure_here([FilePair("a", tmp_path / "a.jpg", tmp_path / "a.jpg")], metrics)
    assert measured.of("psnr") == [pytest.approx(80)] and measured.problems == []
    assert set(measured.notes) == {
        f"{tmp_path / 'a.jpg'}: its end marker is missing; its pixels are all there"
    }


def test_pyiqa_finds_files_as_they_are_shown(tmp_path: Path, generator):
    """It ignores profiles and transparency."""
    colors = write(tmp_path / "plain.png", random_image(generator))
    Image.fromarray(np.dstack([colors, np.zeros((20, 24), np.uint8)])).save(tmp_path / "hidden.png")
    seen = {}

    class Model:
        metric_name = "fid"

        def __call__(self, references, results):
            seen.update({file.name: np.asarray(Image.open(file)) for file in Path(results).iterdir()})
            assert Path(references, "000000.png").is_symlink()
            return 1.0

    plain, hidden = tmp_path / "plain.png", tmp_path / "hidden.png"
    assert pyiqa_metrics.PyIQA(Model()).of_folders([plain, hidden], [plain, plain]) == 1
    np.testing.assert_array_equal(seen["000000.png"], colors)
    assert (seen["000001.png"] == 255).all() and seen["000001.png"].shape == (20, 24, 3)
