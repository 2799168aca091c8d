"""Folders of photographs as samples: which are found and left out, how they are cropped, and what draws depend on."""

import dataclasses
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import tiny_checkpoint as tiny
from photos import data_folder
from tsdsr_jax.data.batches import Batches, RowPlan, SampleShapes
from tsdsr_jax.data.crops import plan
from tsdsr_jax.data.degradation import DegradationConfig
from tsdsr_jax.data.options import DataOptions
from tsdsr_jax.data.photos import Box, CropConfig, Photographs, Survey, left_out, random_crop, survey
from tsdsr_jax.data.sizes import KnownSizes
from tsdsr_jax.data.sources import look_at, open_data
from tsdsr_jax.data.workers import read_ahead
from tsdsr_jax.errors import UserError
from tsdsr_jax.images.resize import pillow_bicubic
from tsdsr_jax.images.search import find_photographs
from tsdsr_jax.weights.prompt_files import save_prompt_embeds

CROP = CropConfig(32, 32, 24)


def surveyed(files: list[tuple[Path, Path]], crop: CropConfig) -> Survey:
    return survey(files, KnownSizes([root for _, root in files]).look(files), crop)


def save(path: Path, size: tuple[int, int] = (40, 48), seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tiny.synthetic_photo(*size, seed)).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for index in range(6):
        save(root / f"trip {index % 2}" / f"{index}.png", seed=index)
    return root


def listed(root: Path) -> list[tuple[Path, Path]]:
    return [(path, root) for path in find_photographs(root).files]


def source(root: Path, seed: int = 5, **more) -> Photographs:
    return Photographs(surveyed(listed(root), CROP).photographs, CROP, DegradationConfig(), seed, **more)


# --- what is found --------------------------------------------------------------------------------


def test_photographs_are_found_in_subfolders_by_any_suffix_and_once(folder):
    save(folder / "b.JPG")
    save(folder / ".hidden" / "c.png")
    save(folder / ".d.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / "trip 0" / "loop").symlink_to(folder, target_is_directory=True)
    names = [path.relative_to(folder).as_posix() for path in find_photographs(folder).files]
    assert names == ["b.JPG"] + [f"trip {i % 2}/{i}.png" for i in (0, 2, 4, 1, 3, 5)]


def test_small_and_unreadable_ones_are_counted_and_named(folder):
    save(folder / "small.png", (20, 20))
    save(folder / "tiny.png", (8, 8))
    (folder / "broken.jpg").write_bytes(b"no image")
    found = surveyed(listed(folder), CROP)
    assert len(found.photographs) == 6 and len(found.below_crop) == 2 and len(found.unreadable) == 1
    said = "\n".join(left_out(found, CROP))
    assert (
        "2 photographs are smaller than the crops of 32×32 pixels and are left out" in said
        and "small.png" in said
    )
    assert "1 images cannot be read" in said and "broken.jpg" in said


def test_training_names_what_the_search_leaves_out(folder, tmp_path):
    (folder / "a.heic").touch()
    (folder / "album").symlink_to(tmp_path / "nowhere")
    notes = []
    assert len(look_at([folder, folder / "trip 0"], CROP, notes.append).photographs) == 6
    assert len(notes) == 2  # each once, although a folder is given twice
    assert "album: is left out" in notes[0] and "1 picture cannot be used" in notes[1]


def test_a_folder_without_usable_photographs_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_photographs(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in it"):
        find_photographs(tmp_path / "empty")
    save(tmp_path / "small" / "a.png", (8, 8))
    with pytest.raises(
        UserError,
        match=r"none of the 1 images can be used: 1 are smaller than the crops of 32×32 pixels; .*--small_photos",
    ):
        surveyed(listed(tmp_path / "small"), CROP)


@pytest.mark.parametrize("kind", ["grey", "sixteen bits", "cmyk", "alpha", "palette", "turned"])
def test_any_kind_of_photograph_becomes_a_pair(tmp_path, kind):
    path = tmp_path / "photos" / "a.png"
    if kind == "grey":
        save(path, mode="L")
    elif kind == "sixteen bits":
        path.parent.mkdir()
        grey = tiny.synthetic_photo(40, 48, 0)[..., 0].astype(np.uint16) * 257
        Image.fromarray(grey).save(path)
    elif kind == "cmyk":
        path = save(path.with_suffix(".jpg"), mode="CMYK")
    elif kind == "alpha":
        save(path, mode="RGBA")
    elif kind == "palette":
        save(path, mode="P")
    else:
        path.parent.mkdir()
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(tiny.synthetic_photo(40, 48, 0)).save(path.with_suffix(".jpg"), exif=exif)
    photographs = source(tmp_path / "photos")
    assert len(photographs) == 1
    record = photographs.read(0)
    assert (
        record.lr.shape == record.hr.shape == (32, 32, 3) and record.lr.dtype == record.hr.dtype == np.uint8
    )
    assert 2 < np.abs(record.lr.astype(int) - record.hr).mean() < 100
    assert photographs.photographs[0].height == (48 if kind == "turned" else 40)


# --- crops ----------------------------------------------------------------------------------------


def test_hidden_colors_of_a_cut_out_are_white(tmp_path):
    """What a file stores where nothing is seen is often rubbish, and must not be learned."""
    photo = tiny.synthetic_photo(40, 48, seed=0)
    rubbish = np.random.default_rng(0).integers(0, 256, photo.shape, np.uint8)
    y, x = np.mgrid[:40, :48]
    alpha = np.where(np.hypot(y - 20, x - 24) < 15, 255, 0).astype(np.uint8)
    visible = alpha[..., None] > 0
    Image.fromarray(np.dstack([np.where(visible, photo, rubbish), alpha])).save(tmp_path / "a.png")
    config = CropConfig(40, 48, 24, flip=0)
    samples = Photographs(
        surveyed(listed(tmp_path), config).photographs, config, DegradationConfig(sharpen=False), 0
    )
    np.testing.assert_array_equal(samples.pair(0, 0).hr, np.where(visible, photo, 255))


def test_profiles_are_applied(tmp_path):
    """Half the light, stored linearly, is 188 of 255 in sRGB."""
    linear = PngInfo()
    linear.add(b"gAMA", (100000).to_bytes(4, "big"))
    Image.new("RGB", (48, 40), (128, 128, 128)).save(tmp_path / "a.png", pnginfo=linear)
    samples = Photographs(
        surveyed(listed(tmp_path), CROP).photographs, CROP, DegradationConfig(sharpen=False), 0, with_lr=False
    )
    assert (samples.read(0).hr == 188).all()


def test_crops_lie_everywhere_and_half_are_mirrored():
    rows, columns = np.mgrid[0:10, 0:12]
    image = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
    generator = np.random.default_rng(0)
    places, mirrored = set(), 0
    for _ in range(400):
        crop = random_crop(image, CropConfig(8, 8), generator)
        assert crop.shape == (8, 8, 3)
        flipped = crop[0, 0, 1] > crop[0, 1, 1]
        mirrored += flipped
        places.add((int(crop[0, 0, 0]), int(crop[0, :, 1].min())))
        assert np.ptp(crop[..., 0]) == np.ptp(crop[..., 1]) == 7
    assert places == {(y, x) for y in range(3) for x in range(5)}
    assert 160 < mirrored < 240


def kept(folder: Path, small: str, minimum: int = 1) -> tuple[list[str], list[str]]:
    """The photographs that are used with crops of 32×48, and what is said about the others."""
    crop = CropConfig(32, 48, minimum, small=small)
    found = surveyed(listed(folder), crop)
    return [photo.name for photo in found.photographs], left_out(found, crop)


def test_small_photographs_are_left_out_by_default(tmp_path):
    for name, size in {"fits": (32, 48), "low": (31, 300), "narrow": (300, 47), "large": (400, 500)}.items():
        save(tmp_path / f"{name}.png", size)
    names, (line,) = kept(tmp_path, "leave_out")
    assert names == ["fits.png", "large.png"]
    assert line.startswith("2 photographs are smaller than the crops of 32×48 pixels and are left out")
    assert "low.png" in line and "narrow.png" in line
    for small, words in (("enlarge", "are enlarged"), ("mirror", "are extended by their mirror image")):
        names, (line,) = kept(tmp_path, small)
        assert len(names) == 4 and line.startswith("2 photographs") and words in line
    # Those of too few pixels are left out in any case, and named once.
    names, lines = kept(tmp_path, "mirror", minimum=100)
    assert names == ["large.png", "narrow.png"]
    assert [line.split(" photographs")[0] for line in lines] == ["2", "1"]


def test_a_set_of_small_photographs_stays_usable_at_a_smaller_crop(tmp_path):
    for index, size in enumerate([(321, 481), (481, 321), (100, 100)]):
        save(tmp_path / f"{index}.png", size)
    with pytest.raises(
        UserError, match=r"3 are smaller than the crops of 512×512 pixels; .*\(--crop_size 320 would fit most"
    ):
        surveyed(listed(tmp_path), CropConfig())
    assert len(surveyed(listed(tmp_path), CropConfig(320, 320, 240)).photographs) == 2


@pytest.mark.parametrize("size", [(6, 5), (6, 100), (15, 16)])
def test_small_photographs_are_enlarged_or_mirrored(size):
    image = tiny.synthetic_photo(*size, 0)
    config = CropConfig(16, 16, flip=0.0, small="enlarge")
    height, width = config.fitted(*size)
    assert min(height, width) == 16 and abs(height / width - size[0] / size[1]) < 0.02 * height / width
    crop = random_crop(image, config, np.random.default_rng(0))
    enlarged = pillow_bicubic(image, height, width)
    rows, columns = height - 15, width - 15
    windows = [enlarged[y : y + 16, x : x + 16] for y in range(rows) for x in range(columns)]
    assert any(np.array_equal(crop, window) for window in windows)
    # What fits is not resized.
    assert config.fitted(16, 200) == (16, 200) and CropConfig(16, 16, small="mirror").fitted(6, 5) == (6, 5)


def test_mirroring_is_at_the_right_and_the_bottom():
    image = tiny.synthetic_photo(6, 5, 0)
    crop = random_crop(image, CropConfig(16, 16, flip=0.0, small="mirror"), np.random.default_rng(0))
    np.testing.assert_array_equal(crop[:6, :5], image)
    np.testing.assert_array_equal(crop[6:11, :5], image[4::-1])
    np.testing.assert_array_equal(crop[:6, 5:9], image[:, 3::-1])


def test_a_grid_of_an_enlarged_photograph(tmp_path):
    save(tmp_path / "a.png", (20, 64))
    crop = CropConfig(32, 32, 1, small="enlarge")
    photographs = surveyed(listed(tmp_path), crop).photographs
    boxes = [sample.box for sample in plan(photographs, "grid", crop)]
    assert boxes == [Box(0, left, 32, 32) for left in (3, 35, 67)]  # of 32×102
    source = Photographs(photographs, crop, DegradationConfig(sharpen=False), 0)
    enlarged = pillow_bicubic(tiny.synthetic_photo(20, 64, 0), 32, 102)
    np.testing.assert_array_equal(source.pair(0, 0, boxes[1]).hr, enlarged[:, 35:67])


@pytest.mark.parametrize("size", [(60, 90), (300, 200), (41, 41)])
def test_photographs_are_cropped_at_a_longer_side_of_their_own(size):
    """Each crop is a window of the photograph at a size within the range; both ends of it are reached."""
    image = tiny.synthetic_photo(*size, 0)
    config = CropConfig(16, 32, flip=0.0, side=(48, 60))
    sides = [max(config.fitted(*size, draw)) for draw in (0.0, 0.5, 1.0)]
    assert sides == [48, 54, 60]
    for seed in range(4):
        crop = random_crop(image, config, np.random.default_rng(seed))
        sizes = {config.fitted(*size, draw) for draw in np.linspace(0, 1, 200)}
        assert any(
            np.array_equal(crop, resized[y : y + 16, x : x + 32])
            for resized in (pillow_bicubic(image, *each) for each in sizes)
            for y in range(resized.shape[0] - 15)
            for x in range(resized.shape[1] - 31)
        )
    fixed = CropConfig(16, 32, flip=0.0, side=(48, 48))
    assert fixed.fitted(*size) == fixed.fitted(*size, 1.0)


def test_photographs_too_narrow_at_that_side_are_left_out(tmp_path):
    for name, size in (("a", (90, 60)), ("b", (200, 30))):
        save(tmp_path / f"{name}.png", size)
    crop = CropConfig(32, 32, 1, side=(48, 64))
    found = surveyed(listed(tmp_path), crop)
    assert [photo.name for photo in found.photographs] == ["a.png"]
    (line,) = left_out(found, crop)
    assert (
        "1 photographs are smaller than the crops of 32×32 pixels at a longer side of 48 (see --photo_side)"
        in line
    )


@pytest.mark.parametrize("crops", ["grid", "whole"])
def test_crops_of_a_plan_lie_in_the_resized_photograph(tmp_path, crops):
    save(tmp_path / "a.png", (40, 60))
    crop = CropConfig(32, 32, 1, side=(96, 96))  # 64×96
    photographs = surveyed(listed(tmp_path), crop).photographs
    boxes = [sample.box for sample in plan(photographs, crops, crop)]
    assert boxes == ([Box(top, left, 32, 32) for top in (0, 32) for left in (0, 32, 64)] if crops == "grid" else
                     [Box(0, 0, 64, 96)])  # fmt: skip
    source = Photographs(photographs, crop, DegradationConfig(sharpen=False), 0)
    resized = pillow_bicubic(tiny.synthetic_photo(40, 60, 0), 64, 96)
    box = boxes[-1]
    np.testing.assert_array_equal(source.pair(0, 0, box).hr, resized[box.top :, box.left :])


# --- what samples depend on -----------------------------------------------------------------------


def test_every_epoch_is_another_crop_and_another_degradation(folder):
    photographs = source(folder)
    first, again, later = photographs.read(3, 0), source(folder).read(3, 0), photographs.read(3, 1)
    np.testing.assert_array_equal(first.lr, again.lr)
    np.testing.assert_array_equal(first.hr, again.hr)
    assert (first.hr != later.hr).any() and (first.lr != later.lr).any()
    assert (first.lr != source(folder, seed=6).read(3, 0).lr).any()
    assert first.latent_hr is first.prompt is first.pooled is None


@pytest.mark.parametrize(("workers", "workers_of_half"), [(0, 0), (2, 1)])
def test_the_stream_is_the_same_for_any_number_of_workers_and_hosts(folder, workers, workers_of_half):
    photographs = source(folder)
    shapes = SampleShapes.of_source(photographs)

    def stream(process: int, processes: int, workers: int) -> list[tuple[np.ndarray, np.ndarray]]:
        rows = RowPlan(4, 5, 1, 4, process, processes)
        return [batch.records[:2] for batch in read_ahead(Batches(photographs, shapes, rows, 5), workers)]

    whole = [Batches(photographs, shapes, RowPlan(4, 5, 1, 4), 5)[step].records[:2] for step in range(5)]
    halves = [stream(process, 2, workers_of_half) for process in range(2)]
    for step, (expected, one) in enumerate(zip(whole, stream(0, 1, workers), strict=True)):
        for part in range(2):
            np.testing.assert_array_equal(one[part], expected[part])
            both = np.concatenate([halves[process][step][part] for process in range(2)], axis=1)
            np.testing.assert_array_equal(both, expected[part])


def test_the_fingerprint_follows_the_photographs_not_the_place(folder, tmp_path):
    before = source(folder).fingerprint()
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    assert source(moved).fingerprint() == before
    save(moved / "trip 1" / "5.png", seed=99)
    assert source(moved).fingerprint() != before


def test_a_replaced_prompt_changes_the_identity(folder, tmp_path):
    """Whichever photograph it is of, and the default that the other photographs get, but not a photograph's own place."""
    config = tiny.tiny_mmdit_config()
    options = DataOptions(hr_dir=(folder,), crop_size=(32,), default_embedding_dir=tmp_path / "default")

    def identity(opened: DataOptions = options) -> dict[str, str]:
        return dict(open_data(opened, 0, "latents", lambda line: None).identity)

    assert "photographs' prompts" not in identity()
    save_prompt_embeds(tmp_path / "default", tiny.random_prompt(config, 1))
    for index in range(5):
        save_prompt_embeds(folder / f"trip {index % 2}/{index}.safetensors", tiny.random_prompt(config, 2))
    before = identity()
    save_prompt_embeds(folder / "trip 1/3.safetensors", tiny.random_prompt(config, 3))
    replaced = identity()
    assert {name for name in before if before[name] != replaced[name]} == {"photographs' prompts"}
    save_prompt_embeds(tmp_path / "default", tiny.random_prompt(config, 4))
    other_default = identity()
    assert {name for name in before if other_default[name] != replaced[name]} == {"photographs' prompts"}
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    assert identity(dataclasses.replace(options, hr_dir=(moved,))) == other_default


def test_without_degradation_there_is_the_target_alone(folder):
    both, alone = source(folder).read(2), source(folder, with_lr=False).read(2)
    assert alone.lr is None
    np.testing.assert_array_equal(alone.hr, both.hr)


# --- prompts, and the flags -----------------------------------------------------------------------


def test_prompts_beside_the_photographs_are_used_and_the_rest_get_the_default(folder, tmp_path):
    own, default = (tiny.random_prompt(tiny.tiny_mmdit_config(), seed) for seed in (1, 2))
    save_prompt_embeds(tmp_path / "default", default)
    options = DataOptions(hr_dir=(folder,), crop_size=(32,), default_embedding_dir=tmp_path / "default")
    said: list[str] = []
    assert open_data(options, 0, "pairs", said.append).shapes.prompt is None and not said
    save_prompt_embeds(folder / "trip 0" / "2.safetensors", own)
    (folder / "trip 0" / "0.txt").write_text("a lake")
    data = open_data(options, 0, "pairs", said.append)
    records = [data.source.read(index) for index in range(3)]
    for record, expected in zip(records, (default, own, default), strict=True):
        np.testing.assert_array_equal(record.prompt, expected.prompt)
    assert "5 of 6 photographs have no prompt embedding beside them" in said[0] and "trip 0/0.png" in said[0]
    assert "1 photographs have a .txt beside them" in said[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(hr_dir=(), data_dir=()), "either prepared sets with --data_dir or folders"),
        (dict(hr_dir=("a",), data_dir=("b",)), "either prepared sets with --data_dir or folders"),
        (dict(hr_dir=("a",), crop_size=(500,)), "--crop_size 500: expected one side, or height and width, multiples of 16"),
        (dict(hr_dir=("a",), crop_size=(512, 512, 512)), "--crop_size 512 512 512"),
        (dict(hr_dir=("a",), min_size=0), "--min_size 0: expected at least 1"),
    ],
)  # fmt: skip
def test_flags_that_cannot_work_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        DataOptions(**flags).check_data()


def test_what_a_run_must_agree_in(folder):
    one, other = (
        open_data(
            DataOptions(hr_dir=(folder,), crop_size=(32,), sharpen_gt=sharpen), 0, "pairs", print
        ).identity
        for sharpen in (True, False)
    )
    assert {name for name in one if one[name] != other[name]} == {"sharpening"}


def test_real_photographs(tmp_path):
    root = data_folder("bsds500", "val")
    crop = CropConfig(128, 160, 96)
    photographs = Photographs(surveyed(listed(root), crop).photographs, crop, DegradationConfig(), 0)
    assert len(photographs) == 100
    records = list(chain(photographs.read(index) for index in range(0, 100, 20)))
    for record in records:
        assert record.lr.shape == record.hr.shape == (128, 160, 3)
        assert np.corrcoef(record.lr.ravel(), record.hr.ravel())[0, 1] > 0.5
