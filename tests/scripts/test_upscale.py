"""The upscaling command as a user meets it: files, flags, mistakes and interruptions."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

import tiny_checkpoint as tiny
from tsdsr_jax import cli
from tsdsr_jax.commands import upscale
from tsdsr_jax.errors import UserError
from tsdsr_jax.upscaling.engine import Engine
from tsdsr_jax.upscaling.options import complete_options
from tsdsr_jax.upscaling.targets import find_jobs
from tsdsr_jax.weights.prompt_files import PromptEmbeds, save_prompt_embeds

pytestmark = pytest.mark.usefixtures("quick_compilation")

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = "infer/upscale.py"
RANK = 2
# Small pictures: 64 pixels are processed as they are, tiles span 64 pixels. One device, as most users have.
SMALL = [
    "--upscale", "2", "--process_size", "64", "--latent_tiled_size", "8", "--latent_tiled_overlap", "2",
    "--device", "cpu:0",
]  # fmt: skip
SQUARE, WIDE, TALL = (32, 32), (33, 52), (52, 33)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders sd3, lora and prompt that belong together. Not to be changed: copy them."""
    folder = tmp_path_factory.mktemp("models")
    tiny.save_everything(folder, RANK)
    return folder


load_engine, _kept = upscale.load_engine, {}


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads and compiles a network once for all tests that want it."""
    on_the_host = (
        "input_dir",
        "output_dir",
        "align_method",
        "seed",
        "format",
        "overwrite",
        "max_pixels",
        "shard",
        "upscale",
        "process_size",
        "latent",
    )
    defaults = {field.name: field.default for field in dataclasses.fields(upscale.Options)}

    def load_once(options: upscale.Options, devices: list, **_) -> Engine:
        key = dataclasses.replace(
            options, **{name: defaults[name] for name in on_the_host if name != "input_dir"}
        )
        key = dataclasses.replace(key, input_dir=Path())
        if key not in _kept:
            _kept[key] = load_engine(options, devices)
        return _kept[key]

    monkeypatch.setattr(upscale, "load_engine", load_once)


def flags(root: Path, source: Path, output: Path, *more: str) -> list[str]:
    return [
        "--pretrained_model_name_or_path", str(root / "sd3"), "--lora_dir", str(root / "lora"),
        "--embedding_dir", str(root / "prompt"), "--rank", str(RANK), "--rank_vae", str(RANK),
        "-i", str(source), "-o", str(output), *more,
    ]  # fmt: skip


@dataclasses.dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line that a mistake is answered with."""
        assert self.status != 0 and self.err.count("\n") == 1, self
        return self.err.rstrip("\n")


class Command:
    """Runs the command in this process."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
        self.root, self.monkeypatch, self.capsys = root, monkeypatch, capsys

    def __call__(self, source: Path, output: Path, *more: str) -> Outcome:
        """With the models of `root` and small sizes; later flags win."""
        return self.plain(*flags(self.root, source, output, *SMALL, *more))

    def plain(self, *arguments: str) -> Outcome:
        self.monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        self.capsys.readouterr()
        status = 0
        try:
            cli.run(upscale.main)
        except SystemExit as stopped:
            status = stopped.code
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(status, captured.out, captured.err)


@pytest.fixture
def command(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Command:
    return Command(root, monkeypatch, capsys)


def photo(size: tuple[int, int] = SQUARE, seed: int = 0) -> Image.Image:
    return Image.fromarray(tiny.synthetic_photo(*size, seed))


def save(folder: Path, **sizes: tuple[int, int]) -> Path:
    """PNGs by name."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, size) in enumerate(sizes.items()):
        photo(size, seed).save(folder / f"{name}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def subprocess_of(root: Path, cache: Path, source: Path, output: Path, *more: str) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen(
        [sys.executable, SCRIPT, *flags(root, source, output, *more)],
        cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# --- what it does -----------------------------------------------------------------------


def test_the_originals_command_line(root, cache, tmp_path):
    source = save(tmp_path / "in", one=(30, 20))
    process = subprocess_of(
        root, cache, source, tmp_path / "out", "--is_use_tile", "False", "--vae_decoder_tiled_size", "224",
        "--vae_encoder_tiled_size", "1024", "--latent_tiled_size", "64", "--latent_tiled_overlap", "8",
        "--device", "cpu", "--seed", "42", "--upscale", "4", "--process_size", "512", "--mixed_precision", "fp32",
        "--align_method", "wavelet",
    )  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Traceback" not in err and "1 upscaled" in out
    assert Image.open(tmp_path / "out/one.png").size == (80, 120)
    assert list(contents(tmp_path / "out")) == ["one.png"]


def test_the_tree_is_kept_and_every_kind_of_file_read(command, tmp_path):
    source = save(tmp_path / "in", plain=SQUARE)
    (source / "sub/deep er").mkdir(parents=True)
    (source / ".thumbnails").mkdir()
    photo().save(source / "sub/upper.JPG", quality=95)
    photo().save(source / "sub/deep er/é.webp")
    photo().save(source / "old.bmp")
    photo().save(source / "scan.tiff")
    photo(seed=1).save(source / ".hidden.png")
    photo(seed=1).save(source / ".thumbnails/x.png")
    (source / "notes.txt").write_text("no picture")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    photo(WIDE).save(source / "turned.jpg", exif=exif)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo().save(source / "profile.png", icc_profile=profile)
    with_alpha = photo()
    with_alpha.putalpha(Image.linear_gradient("L").resize((32, 32)))
    with_alpha.save(source / "alpha.png")
    photo().convert("L").save(source / "gray.png")
    values = np.asarray(photo().convert("L")).astype(np.uint16) * 257
    Image.fromarray(values).save(source / "deep16.png")

    outcome = command(source, tmp_path / "out")
    assert outcome.status == 0 and outcome.err == "", outcome
    assert "10 upscaled" in outcome.out
    expected = [
        "alpha.png", "deep16.png", "gray.png", "old.png", "plain.png", "profile.png", "scan.png",
        "sub/deep er/é.png", "sub/upper.png", "turned.png",
    ]  # fmt: skip
    assert sorted(contents(tmp_path / "out")) == expected
    results = {name: Image.open(tmp_path / "out" / name) for name in expected}
    for name, image in results.items():
        assert image.size == ((66, 104) if name == "turned.png" else (64, 64)), name
        mode = {"alpha.png": "RGBA", "gray.png": "L", "deep16.png": "L"}.get(name, "RGB")
        assert image.mode == mode and image.format == "PNG", name
    assert results["profile.png"].info["icc_profile"] == profile
    assert results["turned.png"].getexif().get(0x0112) in (None, 1)
    assert results["turned.png"].getexif()[0x010F] == "Maker"
    alpha = np.asarray(results["alpha.png"])[..., 3].astype(int)
    assert (np.diff(alpha.mean(1)) > 0).all()  # the gradient, enlarged
    # 8 and 16 bits of the same values are the same picture, but for noise that depends on the file's bytes.
    assert (
        abs(np.asarray(results["gray.png"], int).mean() - np.asarray(results["deep16.png"], int).mean()) < 3
    )


def test_single_files(command, tmp_path):
    source = save(tmp_path / "in", a=SQUARE, b=SQUARE, c=SQUARE)
    assert command(source / "b.png", tmp_path / "out").status == 0
    assert list(contents(tmp_path / "out")) == ["b.png"]
    # More of them, without a flag; and the page's names.
    done = command(source / "b.png", tmp_path / "more", str(source / "c.png"), "--scale_in_names")
    assert done.status == 0 and sorted(contents(tmp_path / "more")) == ["b_x2.png", "c_x2.png"]
    # To a file; its suffix is the format.
    assert command(source / "a.png", tmp_path / "new" / "result.jpeg").status == 0
    with Image.open(tmp_path / "new" / "result.jpeg") as image:
        assert image.format == "JPEG" and image.size == (64, 64)


def test_every_format_holds_the_same_picture(command, tmp_path):
    source = save(tmp_path / "in", a=SQUARE)
    pictures = {}
    for suffix, kind in {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "tiff": "TIFF", "bmp": "BMP"}.items():
        assert command(source, tmp_path / suffix, "--format", suffix).status == 0
        (file,) = (tmp_path / suffix).iterdir()
        image = Image.open(file)
        assert file.name == f"a.{suffix}" and image.format == kind
        pictures[suffix] = np.asarray(image.convert("RGB"), int)
    for suffix in ("webp", "tiff", "bmp"):
        np.testing.assert_array_equal(pictures[suffix], pictures["png"])
    assert 0 < np.abs(pictures["jpg"] - pictures["png"]).mean() < 8


@pytest.mark.parametrize(
    ("more", "size", "expected"),
    [
        (["--upscale", "2.5", "--process_size", "60"], (26, 27), (65, 68)),
        (["--upscale", "1"], (64, 64), (64, 64)),
        (["--upscale", "1"], (40, 40), (40, 40)),
        (["--mixed_precision", "fp16"], SQUARE, (64, 64)),
        (["--lora_dir", "none"], SQUARE, (64, 64)),
    ],
)
def test_factors_and_precisions(command, tmp_path, more, size, expected):
    outcome = command(save(tmp_path / "in", a=size), tmp_path / "out", *more)
    assert outcome.status == 0 and outcome.err == "", outcome
    image = Image.open(tmp_path / "out/a.png")
    assert (image.height, image.width) == expected
    assert np.asarray(image).std() > 10


def test_color_fixes_and_seeds_differ(command, tmp_path):
    source = save(tmp_path / "in", a=SQUARE)
    runs = [["--align_method", method] for method in ("wavelet", "adain", "nofix")]
    runs += [["--seed", "1"], ["--latent", "mode"], ["--lora_scale", "0.5"], []]
    files = []
    for index, more in enumerate(runs):
        assert command(source, tmp_path / str(index), *more).status == 0
        with Image.open(tmp_path / str(index) / "a.png") as image:
            files.append(image.tobytes())
    assert files[0] == files[-1]  # wavelet is the default
    assert len(set(files)) == len(files) - 1


def test_the_reports_title_is_no_path(command, tmp_path):
    report = tmp_path / "page.html"
    source = save(tmp_path / "deep" / "my photos", a=SQUARE)
    assert command(source, tmp_path / "deep" / "out", "--report", str(report)).status == 0
    assert "<title>my photos → out</title>" in report.read_text()
    assert str(tmp_path) not in report.read_text()


# --- what is there already ----------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Photographs that share batches and buckets in several ways."""
    return save(tmp_path / "in", a=SQUARE, b=WIDE, c=TALL, d=(36, 56), e=SQUARE, f=(20, 33))


def test_finished_files_are_skipped(command, tmp_path):
    source, output = save(tmp_path / "in", a=SQUARE, b=SQUARE), tmp_path / "out"
    last = command(source, output).out.splitlines()[-1]
    assert re.fullmatch(rf"2 upscaled into {output}; [\d.]+ s in all, [\d.]+ s an image", last)
    again = command(source, output)
    assert again.status == 0 and again.err == ""
    assert "0 upscaled" in again.out and "2 already existed (--overwrite" in again.out
    replaced = command(source, output, "--overwrite")
    assert replaced.status == 0 and "2 upscaled" in replaced.out
    assert Image.open(output / "a.png").size == (64, 64)


def test_results_of_other_settings_are_kept_and_named(command, tmp_path):
    """Noticed by their size and by what they say of themselves. An empty file is no result."""
    source, output = save(tmp_path / "in", a=SQUARE, b=SQUARE, c=SQUARE, d=SQUARE, e=SQUARE), tmp_path / "out"
    command(source, output)
    photo((64, 65)).save(output / "a.png")
    (output / "b.png").write_bytes(b"mine")
    (output / "c.png").write_bytes(b"")
    (output / "d.png").unlink()
    (output / "d.png").mkdir()
    before = contents(output)
    again = command(source, output, "--seed", "7")
    assert again.status == 1
    assert f"{output / 'a.png'} (65×64 pixels instead of 64×64)" in again.err
    assert f"{output / 'b.png'} (not a readable picture)" in again.err
    assert f"{output / 'e.png'} (--seed 42 instead of 7)" in again.err
    assert f"{output / 'd.png'}: is a folder, where the result of {source / 'd.png'} belongs" in again.err
    assert "1 upscaled" in again.out and "3 already existed, 3 of them with other settings" in again.out
    after = contents(output)
    assert Image.open(output / "c.png").size == (64, 64)
    assert {name for name in after if after[name] != before.get(name)} == {"c.png"}
    assert command(source / "a.png", output, "--overwrite").status == 0
    assert Image.open(output / "a.png").size == (64, 64)


def test_results_of_another_process_are_kept_and_counted(command, tmp_path, monkeypatch):
    source, output = save(tmp_path / "in", a=SQUARE, b=SQUARE), tmp_path / "out"
    output.mkdir()
    load = upscale.load_engine

    def while_another_finishes(*arguments, **more):
        (output / "a.png").write_bytes(b"theirs")
        return load(*arguments, **more)

    monkeypatch.setattr(upscale, "load_engine", while_another_finishes)
    done = command(source, output)
    assert done.status == 0
    assert done.out.splitlines()[-1].startswith(
        f"1 upscaled into {output}, 1 written by another process meanwhile; "
    )
    assert (output / "a.png").read_bytes() == b"theirs"


def test_a_result_older_than_its_photograph_is_pointed_out(command, tmp_path):
    source, output = save(tmp_path / "in", a=SQUARE, b=SQUARE), tmp_path / "out"
    command(source, output)
    assert "of them older" not in command(source, output).out
    later = (output / "a.png").stat().st_mtime + 60
    os.utime(source / "a.png", (later, later))
    assert "2 already existed, 1 of them older than their photographs (--over" in command(source, output).out


def test_lost_transparency_is_pointed_out(command, tmp_path):
    (tmp_path / "in").mkdir()
    with_alpha = photo()
    with_alpha.putalpha(128)
    with_alpha.save(tmp_path / "in" / "a.png")
    result = command(tmp_path / "in", tmp_path / "out", "--format", "jpg")
    assert result.status == 0
    assert [
        line
        for line in result.err.splitlines()
        if line.endswith("jpg cannot hold its transparency; the picture lies over white")
    ]


@pytest.mark.parametrize("devices", ["cpu:0", "cpu"])
def test_a_resumed_run_writes_what_was_missing(command, mixed, tmp_path, devices):
    if devices == "cpu":  # All eight, of which each batch fills some: fewer shapes will do.
        mixed = save(tmp_path / "few", a=WIDE, b=WIDE, c=TALL, d=WIDE, e=WIDE, f=TALL)
    output = tmp_path / "out"
    assert command(mixed, output, "--device", devices).status == 0
    whole = contents(output)
    kept = {name: (output / name).stat().st_mtime_ns for name in ("a.png", "d.png", "f.png")}
    for name in whole.keys() - kept.keys():
        (output / name).unlink()
    resumed = command(mixed, output, "--device", devices)
    assert resumed.status == 0 and "3 upscaled" in resumed.out and "3 already existed" in resumed.out
    assert contents(output) == whole
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept


def test_shards_together_are_the_whole(command, mixed, tmp_path):
    assert command(mixed, tmp_path / "whole").status == 0
    parts = []
    for part in ("0/2", "1/2"):
        assert command(mixed, tmp_path / part.replace("/", "of"), "--shard", part).status == 0
        parts.append(contents(tmp_path / part.replace("/", "of")))
    assert parts[0] and parts[1] and not parts[0].keys() & parts[1].keys()
    assert parts[0] | parts[1] == contents(tmp_path / "whole")


# --- names ------------------------------------------------------------------------------


def targets(source: Path, output: Path) -> dict[str, str]:
    return {
        job.source.relative_to(source).as_posix(): job.target.relative_to(output).as_posix()
        for job in find_jobs([source], output).jobs
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jpg", "b.png"], ["a.png", "b.png"]),
        (["a.jpg", "a.png", "b.bmp"], ["a_jpg.png", "a_png.png", "b.png"]),
        (["s/a.jpg", "a.png"], ["s/a.png", "a.png"]),
        # On some systems the two would be one file.
        (["A.jpg", "a.tif"], ["A_jpg.png", "a_tif.png"]),
        # The new name is taken as well.
        (["a.jpg", "a.png", "a_jpg.bmp"], ["a_jpg.png", "a_png.png", "a_jpg_bmp.png"]),
        (["a.b.jpg", "a.c.jpg"], ["a.b.png", "a.c.png"]),
    ],
)
def test_no_two_results_share_a_name(tmp_path, names, expected):
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    found = targets(tmp_path / "in", tmp_path / "out")
    assert found == dict(zip(names, expected, strict=True))
    assert len({target.casefold() for target in found.values()}) == len(names)


def test_colliding_names_are_all_written(command, tmp_path):
    source = save(tmp_path / "in", a=SQUARE, b=SQUARE)
    photo(seed=2).save(source / "a.bmp")
    assert command(source, tmp_path / "out").status == 0
    assert sorted(contents(tmp_path / "out")) == ["a_bmp.png", "a_png.png", "b.png"]


def test_output_inside_the_input(command, tmp_path):
    source = save(tmp_path / "in", a=SQUARE)
    first = command(source, source / "results")
    second = command(source, source / "results", "--overwrite")
    assert "1 upscaled" in first.out and "1 upscaled" in second.out
    assert sorted(contents(source)) == ["a.png", "results/a.png"]


def test_output_must_not_be_the_input(command, tmp_path, monkeypatch):
    source = save(tmp_path / "in", a=SQUARE)
    before = contents(source)
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(source)
    for output in (source, Path("."), tmp_path / "link"):
        assert "is also the output folder" in command(source, output).line
    assert contents(source) == before


def test_a_photograph_is_never_replaced_by_its_result(command, tmp_path):
    source = save(tmp_path / "in", a=SQUARE)
    photo().save(source / "b.jpg")
    before = contents(source)
    line = command(source / "a.png", source, "--overwrite").line
    assert str(source / "a.png") in line and "--output_dir" in line
    assert contents(source) == before
    assert targets_of_file(source / "b.jpg", source) == "b.png"  # beside it is fine


def targets_of_file(source: Path, output: Path) -> str:
    (job,) = find_jobs([source], output).jobs
    return job.target.name


def test_another_photograph_is_not_replaced_either(tmp_path):
    # The result of x/x/a.png, in the folder above, would be x/a.png.
    save(tmp_path / "x", a=SQUARE)
    save(tmp_path / "x" / "x", a=SQUARE, b=SQUARE)
    with pytest.raises(UserError, match="output_dir"):
        find_jobs([tmp_path / "x"], tmp_path)


def test_output_around_the_input(tmp_path):
    source = save(tmp_path / "lr", a=SQUARE)
    assert targets(source, tmp_path) == {"a.png": "a.png"}


# --- bad files ----------------------------------------------------------------------------


def test_bad_files_cost_no_other_its_result(command, tmp_path):
    source, output = save(tmp_path / "in", good=SQUARE, whole=SQUARE), tmp_path / "out"
    data = (source / "whole.png").read_bytes()
    (source / "whole.png").unlink()
    (source / "truncated.png").write_bytes(data[: len(data) // 2])
    (source / "empty.png").touch()
    (source / "text.png").write_text("Not a picture.\n" * 9)
    (source / "folder.png").mkdir()
    photo(seed=3).save(source / "folder.png" / "inside.png")
    photo((150, 150)).save(source / "huge.png")
    photo((90, 90)).save(source / "grows.png")
    photo(seed=4).save(source / "last.png")
    (source / "sub").mkdir()
    photo(seed=5).save(source / "sub" / "blocked.png")
    output.mkdir()
    (output / "sub").write_text("a file where a folder would have to be")
    (source / "dangling.png").symlink_to(source / "nowhere.png")

    outcome = command(source, output, "--max_pixels", "20000")
    assert outcome.status == 1
    lines = outcome.err.splitlines()
    bad = ["truncated", "empty", "text", "huge", "grows", "dangling"]
    for name in bad:
        (line,) = [line for line in lines if line.startswith(f"{source / name}.png: ")]
        assert len(line) > len(f"{source / name}.png: ") + 10
    (blocked,) = [line for line in lines if line.startswith(str(output / "sub" / "blocked.png"))]
    assert "cannot be written" in blocked
    assert len(lines) == len(bad) + 1
    assert "--max_pixels" in next(line for line in lines if "grows" in line)
    assert outcome.out.splitlines()[-1].startswith(f"3 upscaled into {output}")
    assert "7 failed; " in outcome.out.splitlines()[-1]
    assert sorted(contents(output)) == ["folder.png/inside.png", "good.png", "last.png", "sub"]


def test_what_is_left_out_is_named_and_counted(command, tmp_path):
    source = save(tmp_path / "in", a=SQUARE)
    (source / "album").symlink_to(tmp_path / "nowhere")
    (source / "b.heic").touch()
    outcome = command(source, tmp_path / "out")
    assert outcome.status == 1
    assert outcome.out.splitlines()[-1].startswith(f"1 upscaled into {tmp_path / 'out'}, 1 left out; ")
    assert "album: is left out, because the link leads nowhere" in outcome.err
    assert "note: 1 picture cannot be used (.heic is not read" in outcome.err
    # A picture of an unread format is a remark, no error.
    (source / "album").unlink()
    assert command(source, tmp_path / "out").status == 0


def test_a_huge_header_is_refused_before_decoding(command, tmp_path):
    # 60000 x 60000 pixels in a few bytes: decoding them would take gigabytes.
    bomb = io.BytesIO()
    PngImagePlugin.putchunk(bomb, b"IHDR", (60000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]))
    source = save(tmp_path / "in", good=SQUARE)
    PngImagePlugin.putchunk(bomb, b"IDAT", zlib.compress(bytes(100)))
    (source / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb.getvalue())
    outcome = command(source, tmp_path / "out")
    assert outcome.status == 1 and list(contents(tmp_path / "out")) == ["good.png"]
    assert "bomb.png" in outcome.line and "pixels" in outcome.line


def test_nothing_to_do(command, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    assert "no images" in command(tmp_path / "empty", tmp_path / "out").line
    line = command(tmp_path / "missing", tmp_path / "out").line
    assert str(tmp_path / "missing") in line and "no such" in line
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_made(command, tmp_path):
    source = save(tmp_path / "in", a=SQUARE)
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file" / "out", tmp_path / "file"):
        assert str(output) in command(source, output).line


# --- bad models ---------------------------------------------------------------------------


@pytest.fixture
def copy(root, tmp_path) -> Path:
    """The models, to be damaged."""
    return Path(shutil.copytree(root, tmp_path / "models"))


@pytest.fixture
def on_models(command, tmp_path):
    """Runs the command with other models."""
    source = save(tmp_path / "in", a=SQUARE)

    def run(models: Path, *more: str) -> Outcome:
        command.root = models
        outcome = command(source, tmp_path / "out", *more)
        assert outcome.status == 1 and contents(tmp_path / "out") == {}, outcome
        return outcome

    return run


def test_no_checkpoint(on_models, copy):
    shutil.rmtree(copy / "sd3")
    assert str(copy / "sd3") in on_models(copy).line


def test_half_a_checkpoint(on_models, copy):
    shutil.rmtree(copy / "sd3" / "vae")
    line = on_models(copy).line
    assert "vae/config.json" in line and str(copy / "sd3") in line


def test_weights_that_are_not_there(on_models, copy):
    (copy / "sd3/transformer/diffusion_pytorch_model.safetensors").unlink()
    line = on_models(copy).line
    assert "diffusion_pytorch_model.safetensors" in line and str(copy / "sd3/transformer") in line


def test_weights_cut_short(on_models, copy):
    file = copy / "sd3/vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert str(file) in on_models(copy).line


def test_a_checkpoint_of_another_kind(on_models, copy):
    config = copy / "sd3/transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "UNet2DConditionModel"}))
    line = on_models(copy).line
    assert str(config) in line and "UNet2DConditionModel" in line and "SD3Transformer2DModel" in line


def test_foreign_weights(on_models, copy):
    file = copy / "sd3/transformer/diffusion_pytorch_model.safetensors"
    shutil.copy(copy / "sd3/vae/diffusion_pytorch_model.safetensors", file)
    line = on_models(copy).line
    assert str(file) in line and "not one tensor" in line


def test_every_tensor_that_does_not_fit_is_named(on_models, copy):
    def damage(tensors: dict[str, np.ndarray]) -> None:
        del tensors["proj_out.bias"], tensors["transformer_blocks.0.attn.to_q.weight"]
        tensors["surplus.weight"] = np.zeros((2, 2), np.float32)
        tensors["context_embedder.weight"] = np.zeros((16, 5), np.float32)

    config = tiny.tiny_mmdit_config()
    tiny.save_network(copy / "sd3/transformer", config, tiny.random_params(config, 1), damage)
    lines = on_models(copy).err.splitlines()
    text = "\n".join(lines)
    assert "missing: proj_out.bias" in text and "missing: transformer_blocks.0.attn.to_q.weight" in text
    assert "unexpected: surplus.weight" in text
    assert "wrong shape: context_embedder.weight is (16, 5), expected (16, 12)" in text
    assert len(lines) == 5


@pytest.mark.parametrize("flag", ["--rank", "--rank_vae"])
def test_loras_of_another_rank(on_models, copy, flag):
    line = on_models(copy, flag, "64").line
    assert f"pass {flag} {RANK}" in line
    assert {"--rank": "transformer.safetensors", "--rank_vae": "vae.safetensors"}[flag] in line


def test_lora_of_another_base(on_models, copy):
    wide = tiny.tiny_mmdit_config(num_attention_heads=4, caption_projection_dim=32)
    lora = tiny.random_lora(tiny.random_params(wide, 1), ("to_q", "proj_out"), RANK, 5)
    tiny.save_peft(copy / "lora/transformer.safetensors", lora, wide)
    text = on_models(copy).err
    assert str(copy / "lora/transformer.safetensors") in text
    assert "wrong shape: transformer_blocks.0.attn.to_q.lora_A.weight" in text and "\n  and 2 more" in text


def test_lora_of_the_other_network(on_models, copy):
    shutil.copy(copy / "lora/transformer.safetensors", copy / "lora/vae.safetensors")
    text = on_models(copy).err
    assert str(copy / "lora/vae.safetensors") in text


def test_no_lora(on_models, copy):
    shutil.rmtree(copy / "lora")
    assert str(copy / "lora/transformer.safetensors") in on_models(copy).line


def test_prompts_that_do_not_fit(on_models, copy):
    save_prompt_embeds(copy / "prompt", PromptEmbeds(np.ones((5, 13), np.float32), np.ones(10, np.float32)))
    line = on_models(copy).line
    assert str(copy / "prompt") in line and "13" in line and "joint_attention_dim 12" in line


def test_no_prompts(on_models, copy):
    shutil.rmtree(copy / "prompt")
    line = on_models(copy).line
    assert str(copy / "prompt") in line and "convert/prompts.py" in line


# --- bad flags ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (["--upscle", "4"], 2, ["--upscle", "--upscale"]),
        (["--align_method", "adian"], 2, ["--align_method", "adian", "adain"]),
        (["--shard", "2/2"], 1, ["--shard 2/2", "i/n"]),
        (["--shard", "half"], 1, ["--shard half", "i/n"]),
        (["--latent_tiled_size", "7"], 1, ["--latent_tiled_size 7", "even"]),
        (["--latent_tiled_size", "200"], 1, ["--latent_tiled_size 200", "96"]),
        (["--latent_tiled_overlap", "8"], 1, ["--latent_tiled_overlap 8", "--latent_tiled_size 8"]),
        (["--latent_tiled_overlap", "-1"], 1, ["--latent_tiled_overlap -1"]),
        (["--upscale", "0.5"], 1, ["--upscale 0.5", "1 to 64"]),
        (["--upscale", "nan"], 1, ["--upscale nan"]),
        (["--process_size", "0"], 1, ["--process_size 0"]),
        (["--tile_batch_size", "0"], 1, ["--tile_batch_size 0"]),
        (["--batch_size", "-1"], 1, ["--batch_size -1"]),
        (["--rank", "0"], 1, ["--rank 0"]),
        (["--device", "cuda"], 1, ["--device cuda", "cpu"]),
        (["--device", "cpu:99"], 1, ["--device cpu:99"]),
        (["--device", "gpux"], 1, ["--device gpux", "cuda"]),
    ],
)
def test_flags_that_cannot_work(command, tmp_path, more, status, words):
    outcome = command(save(tmp_path / "in", a=SQUARE), tmp_path / "out", *more)
    assert outcome.status == status
    assert outcome.line.startswith("upscale.py: ") and all(word in outcome.line for word in words), outcome
    assert contents(tmp_path) == contents(tmp_path / "in") or list(contents(tmp_path)) == ["in/a.png"]


def test_required_flags(command):
    outcome = command.plain("-o", "results")
    assert outcome.status == 2 and "--input_dir" in outcome.line


# --- without a model ------------------------------------------------------------------------


def test_the_bundled_model_is_used_where_none_is_named(command, tmp_path):
    source = save(tmp_path / "in", a=SQUARE)
    outcome = command.plain("-i", str(source), "-o", str(tmp_path / "out"), "--process_size", "16")
    assert outcome.status == 0 and "using the small model in" in outcome.out and "no LoRA" not in outcome.out
    assert Image.open(tmp_path / "out" / "a.png").size == (4 * SQUARE[1], 4 * SQUARE[0])


def test_a_lora_needs_its_model(command, root):
    outcome = command.plain("-i", "photos", "--lora_dir", str(root / "lora"))
    assert outcome.status == 1 and f"--lora_dir {root / 'lora'}" in outcome.line
    assert "--pretrained_model_name_or_path" in outcome.line


def test_tiles_are_as_large_as_the_model_has_positions_for(root, monkeypatch):
    def tile(largest: int, *given: str) -> int:
        config = json.loads((root / "sd3/transformer/config.json").read_text())
        folder = root / f"table {largest}"
        (folder / "transformer").mkdir(parents=True, exist_ok=True)
        (folder / "transformer/config.json").write_text(json.dumps(config | {"pos_embed_max_size": largest}))
        monkeypatch.setattr(
            sys, "argv", [SCRIPT, "-i", "photos", "--pretrained_model_name_or_path", str(folder), *given]
        )
        return complete_options(cli.parse(upscale.Options, description="")).latent_tiled_size

    assert (tile(8), tile(192), tile(8, "--latent_tiled_size", "4")) == (16, 64, 4)


# --- interruptions --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_while_writing(root, cache, tmp_path, kind):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for index in range(400):
        photo(seed=index).save(source / f"{index:03}.png", compress_level=0)
    process = subprocess_of(root, cache, source, output, *SMALL)
    deadline = time.monotonic() + 120
    while len(list(output.glob("[0-9]*.png"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(kind)
    out, err = process.communicate(timeout=60)
    names = contents(output)
    assert 3 <= len(names) < 400, "was not interrupted on the way"
    if kind == signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-1] == "interrupted" and "Traceback" not in err, err
        assert "upscaled into" not in out
        assert all(name.endswith(".png") and not name.startswith(".") for name in names)
    for name, data in names.items():
        if not name.startswith("."):
            assert Image.open(io.BytesIO(data)).convert("RGB").size == (64, 64)
