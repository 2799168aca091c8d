"""Names of results, and what is refused or named before anything is computed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tsdsr_jax.errors import UserError
from tsdsr_jax.images.files import read_photo
from tsdsr_jax.images.writing import read_made_with, write_photo
from tsdsr_jax.upscaling.jobs import FileJob
from tsdsr_jax.upscaling.options import UpscaleOptions, complete_options
from tsdsr_jax.upscaling.provenance import differing_flags, model_in_words
from tsdsr_jax.upscaling.targets import Naming, find_jobs, format_for


def save(path: Path, size: tuple[int, int] = (4, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)
    return path


def targets(sources: list[Path], output: Path, naming: Naming) -> list[str]:
    return [
        job.target.relative_to(output.parent).as_posix() for job in find_jobs(sources, output, naming).jobs
    ]


def test_one_photograph_may_have_a_files_name(tmp_path):
    photo = save(tmp_path / "a.png")
    assert targets([photo], tmp_path / "result.webp", Naming("webp")) == ["result.webp"]
    # A folder that exists stays one, whatever its name.
    (tmp_path / "folder.png").mkdir()
    assert targets([photo], tmp_path / "folder.png", Naming()) == ["folder.png/a.png"]
    # So do names that end in something else.
    assert targets([photo], tmp_path / "v1.5", Naming()) == ["v1.5/a.png"]


@pytest.mark.parametrize(
    ("name", "format", "expected"),
    [
        ("result.PNG", None, "png"),
        ("result.jpeg", None, "jpg"),
        ("result.tif", "tiff", "tiff"),
        ("outputs", None, "png"),
        ("outputs", "bmp", "bmp"),
    ],
)
def test_the_format_follows_the_name(tmp_path, name, format, expected):
    assert format_for(tmp_path / name, format) == expected


def test_names_that_cannot_be_meant_are_refused(tmp_path):
    photos = [save(tmp_path / "in" / "a.png"), save(tmp_path / "in" / "b.png")]
    with pytest.raises(UserError, match=r"result.png: is the name of one result, but there may be several"):
        find_jobs(photos, tmp_path / "result.png")
    with pytest.raises(UserError, match=r"result.png: is the name of one result"):
        find_jobs([tmp_path / "in"], tmp_path / "result.png")
    with pytest.raises(UserError, match=r"a.png: is the photograph itself"):
        find_jobs(photos[:1], photos[0])
    with pytest.raises(UserError, match=r"ends in .png, but --format is jpg"):
        format_for(tmp_path / "result.png", "jpg")
    for suffix in (".gif", ".heic", ".avif"):
        with pytest.raises(
            UserError, match=f"results cannot have the suffix {suffix}; write one of png, jpg"
        ):
            find_jobs(photos[:1], tmp_path / f"result{suffix}")
    with pytest.raises(UserError, match=r"nowhere.png: no such file or folder"):
        find_jobs([tmp_path / "nowhere.png"], tmp_path / "result.png")


def test_several_photographs_and_folders(tmp_path):
    a, b = save(tmp_path / "in" / "a.png"), save(tmp_path / "other" / "deep" / "b.png")
    sources = [a, tmp_path / "other", a]
    assert targets(sources, tmp_path / "out", Naming()) == ["out/a.png", "out/deep/b.png"]
    assert targets([a, b], tmp_path / "out", Naming("jpg", scale=2.5)) == ["out/a_x2.5.jpg", "out/b_x2.5.jpg"]
    same = save(tmp_path / "other" / "a.png")
    with pytest.raises(UserError, match=r"both results would be .*out/a_png.png; upscale them separately"):
        find_jobs([a, same], tmp_path / "out")


def test_names_that_some_file_systems_do_not_tell_apart(tmp_path):
    """Results may go to a disk that knows only one of the two names."""
    for name in ("\u00e9.png", "e\u0301.bmp", "B.png", "b.bmp"):
        save(tmp_path / "in" / name)
    assert sorted(targets([tmp_path / "in"], tmp_path / "out", Naming())) == [
        "out/B_png.png",
        "out/b_bmp.png",
        "out/e\u0301_bmp.png",
        "out/\u00e9_png.png",
    ]


def test_what_a_folder_leaves_out_is_passed_on(tmp_path):
    save(tmp_path / "in" / "a.jfif".replace("jfif", "png")).rename(tmp_path / "in" / "a.jfif")
    (tmp_path / "in" / "b.heic").touch()
    (tmp_path / "in" / "gone").symlink_to(tmp_path / "nowhere")
    found = find_jobs([tmp_path / "in"], tmp_path / "out")
    assert [job.target.name for job in found.jobs] == ["a.png"]
    assert len(found.notes) == 1 and "b.heic" in found.notes[0]
    assert (
        len(found.problems) == 1 and "gone: is left out, because the link leads nowhere" in found.problems[0]
    )


# --- results that exist ---------------------------------------------------------------------


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "tiff", "bmp"])
def test_a_result_says_how_it_was_made(tmp_path, format):
    photo = read_photo(save(tmp_path / "a.png"), 100)
    path, text = tmp_path / f"b.{format}", '{"seed": 1, "upscale": 2.0}'
    write_photo(path, photo.rgb, photo, format=format, made_with=text)
    assert read_made_with(path) == (text if format in ("png", "jpg") else None)
    np.testing.assert_array_equal(read_photo(path, 100).rgb, photo.rgb)
    # Other settings are noticed where the file says so, another size always.
    job = FileJob(tmp_path / "a.png", path, text.replace("1", "7"))
    expected = f"{path} (--seed 1 instead of 7)" if format in ("png", "jpg") else None
    assert job.difference((5, 4)) == expected
    assert FileJob(tmp_path / "a.png", path, text).difference((5, 4)) is None
    assert job.difference((10, 8)) == f"{path} (4×5 pixels instead of 8×10)"


def test_flags_that_changed():
    options = complete_options(UpscaleOptions(), say=lambda line: None)
    text = options.made_with()
    assert '"pretrained_model_name_or_path": "bundled"' in text and text.isascii()
    assert (
        differing_flags(text, text) == differing_flags(None, text) == differing_flags("by hand", text) == ""
    )
    assert differing_flags('["a"]', text) == ""
    mode = complete_options(UpscaleOptions(latent="mode", lora_scale=0.5), say=lambda line: None).made_with()
    expected = "--lora_scale 1.0 instead of 0.5, --latent sample instead of mode, --seed 42 instead of None"
    assert differing_flags(text, mode) == expected


def test_models_are_named_without_their_paths(tmp_path):
    """Results are passed on; but two checkpoints of a run, whose folders have one name, are told apart."""
    names = []
    for step, weights in enumerate([b"a" * 10**6, b"a" * 500_000 + b"b" * 500_000, b"a" * 10**6]):
        file = tmp_path / f"checkpoint_{step}" / "lora" / "transformer.safetensors"
        file.parent.mkdir(parents=True)
        file.write_bytes(weights)
        names.append(model_in_words(str(file.parent)))
    assert names[0] == names[2] != names[1]
    assert all(name.startswith("lora ") and len(name) == 13 for name in names)
    assert model_in_words("stabilityai/sd3") == "stabilityai/sd3" and model_in_words("none") == "none"


@pytest.mark.parametrize("content", [None, b""])
def test_an_empty_file_is_no_result(tmp_path, content):
    job = FileJob(save(tmp_path / "a.png"), tmp_path / "out.png")
    if content is not None:
        job.target.write_bytes(content)
    assert not job.is_finished()
    job.check_output((5, 4))
    save(job.target)
    assert job.is_finished()


def test_a_folder_where_a_result_belongs_is_named(tmp_path):
    job = FileJob(save(tmp_path / "a.png"), tmp_path / "out.png")
    job.target.mkdir()
    with pytest.raises(UserError, match=r"out.png: is a folder, where the result of .*a.png belongs"):
        job.check_output((5, 4))


def test_overwriting_spares_photographs_that_lie_in_the_output_folder(tmp_path):
    """photos/2024/a.jpg becomes photos/a.png, which may be another photograph; a result of an earlier run is replaced."""
    photo, other = save(tmp_path / "photos" / "2024" / "a.jpg"), save(tmp_path / "photos" / "a.png")
    find_jobs([photo.parent], other.parent)  # without --overwrite it is left alone
    with pytest.raises(
        UserError, match=r"photos/a.png: lies among the photographs, and the result would replace it"
    ):
        find_jobs([photo.parent], other.parent, overwrite=True)
    read = read_photo(photo, 100)
    write_photo(other, read.rgb, read, None, "png", '{"upscale": 4}')
    assert find_jobs([photo.parent], other.parent, overwrite=True).jobs[0].target == other
    # Elsewhere, files with results' names are results, or --overwrite is meant for them.
    find_jobs([photo], save(tmp_path / "out" / "a.png").parent, overwrite=True)
