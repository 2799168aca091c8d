"""Prepares training sets as a user does: both layouts, interruptions, shared work, bad photographs, prompts."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load, save_file

import tiny_checkpoint as tiny
import tiny_training
from commands import Command
from photos import data_folder
from tiny_text_encoders import save_text_encoders
from tsdsr_jax.cli import Share
from tsdsr_jax.commands import prepare
from tsdsr_jax.data import manifest_writer, shard_sets, writers
from tsdsr_jax.data.folder_sets import PreparedFolder
from tsdsr_jax.data.record import Record
from tsdsr_jax.data.shard_sets import PreparedShards
from tsdsr_jax.data.sources import open_sets
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.weights.prompt_files import load_prompt_embeds
from tsdsr_jax.weights.torch_pickle import read_tensor

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the default prompt, and ten photographs. Not to be changed."""
    folder = tmp_path_factory.mktemp("preparation")
    tiny_training.save_models(folder)
    tiny_training.save_photos(folder / "photos", 10)
    return folder


class Prepare(Command):
    """With threads for workers."""

    def flags(self, output: Path, *more: str, photos: Path | None = None) -> Sequence[str]:
        return [
            "--hr_dir", str(photos or self.root / "photos"), "--output_dir", str(output), "--crop_size", "32",
            "--pretrained_model_name_or_path", str(self.root / "sd3"), "--default_embedding_dir", str(self.root / "default"),
            "--dataloader_num_workers", "0", "--batch_size", "1", "--samples_per_file", "4", *more,
        ]  # fmt: skip


@pytest.fixture
def command(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Prepare:
    return Prepare(prepare.main, "train/prepare.py", root, monkeypatch, capsys)


def records(folder: Path) -> list[Record]:
    source = open_sets([folder])
    return [source.read(index) for index in range(len(source))]


def same(ours: Record, theirs: Record) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


# --- what is made ---------------------------------------------------------------------------------


def test_both_layouts_hold_the_same_samples(command, root, tmp_path):
    said = command.done(tmp_path / "shards")
    assert "10 samples" in said and "train/distill.py --data_dir" in said
    command.done(tmp_path / "folders", "--layout", "folders")
    assert isinstance(open_sets([tmp_path / "shards"]), PreparedShards)
    assert isinstance(open_sets([tmp_path / "folders"]), PreparedFolder)
    both = list(zip(records(tmp_path / "shards"), records(tmp_path / "folders"), strict=True))
    assert len(both) == 10
    for ours, theirs in both:
        same(ours, theirs)
    record, default = both[0][0], load_prompt_embeds(root / "default")
    assert record.lr.shape == record.hr.shape == (32, 32, 3) and record.latent_hr.shape == (4, 4, 16)
    assert record.latent_hr.dtype == np.float32 and record.prompt.dtype == record.pooled.dtype == np.float16
    np.testing.assert_array_equal(record.prompt, default.prompt.astype(np.float16))
    made = manifest(tmp_path / "shards")
    assert (
        made["complete"] and made["samples"] == [4, 4, 2] and made["prompts"] == 1 and made["planned"] == 10
    )
    assert made["settings"]["degradation"]["first"]["quality"] == [30, 95] and "jax" in made["versions"]
    assert open_sets([tmp_path / "shards"]).name(0).endswith("shards: 0/0.png#0")


def test_latents_are_samples_of_the_posterior_times_the_scaling_factor(command, root, tmp_path):
    command.done(tmp_path / "set")
    vae = tiny.random_params(tiny.tiny_vae_config(), 2)
    network = AutoencoderKL(tiny.tiny_vae_config())
    deviations = []
    for record in records(tmp_path / "set"):
        image = record.hr[None].astype(np.float32) / 127.5 - 1
        posterior = network.apply({"params": vae}, image, method="encode")
        latent = record.latent_hr / tiny.tiny_vae_config().scaling_factor
        deviations.append((latent - posterior.mean[0]) / np.exp(0.5 * posterior.logvar[0]))
    deviations = np.array(deviations)
    # 2560 values, so that one standard error is 0.02 for the mean and 0.014 for the deviation.
    assert abs(deviations.mean()) < 0.08 and abs(deviations.std() - 1) < 0.06
    assert np.abs(np.corrcoef(deviations.reshape(10, -1)) - np.eye(10)).max() < 0.3


def test_the_original_reads_the_folders(command, tmp_path):
    """Reads like its loader: sorts names as integers, uses torch.load, and squeezes the leading axis."""
    torch = pytest.importorskip("torch")
    command.done(tmp_path / "folders", "--layout", "folders")
    folder = tmp_path / "folders"
    stems = sorted(int(path.stem) for path in (folder / "lr_bicubic").iterdir())
    assert stems == list(range(1, 11))
    expected = records(folder)
    for number, record in zip(stems, expected, strict=True):
        name = f"{number:07d}"
        for kind, shape, ours in (
            ("latent_hr", (16, 4, 4), record.latent_hr.transpose(2, 0, 1)),
            ("prompt_embeds", (5, 12), record.prompt),
            ("pool_embeds", (10,), record.pooled),
        ):
            tensor = torch.load(folder / kind / f"{name}.pt", weights_only=True)
            assert tensor.shape == (1, *shape)
            np.testing.assert_array_equal(tensor.squeeze(0).numpy(), ours)
        for kind, ours in (("gt", record.hr), ("lr_bicubic", record.lr)):
            np.testing.assert_array_equal(
                np.asarray(Image.open(folder / kind / f"{name}.png").convert("RGB")), ours
            )
        assert (folder / "prompt_txt" / f"{name}.txt").read_text().startswith("Cinematic")


def test_grids_and_whole_photographs(command, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    picture = tiny.synthetic_photo(70, 100, 0)
    Image.fromarray(picture).save(photos / "a.png")
    Image.fromarray(tiny.synthetic_photo(20, 40, 1)).save(photos / "b.png")
    said = command.done(
        tmp_path / "grid", "--crops", "grid", "--no_sharpen_gt", "--min_size", "16", photos=photos
    )
    assert (
        "1 photographs are smaller than the crops of 32×32 pixels and are left out" in said
        and "b.png" in said
    )
    crops = records(tmp_path / "grid")
    assert len(crops) == 2 * 3 and all(crop.hr.shape == (32, 32, 3) for crop in crops)
    np.testing.assert_array_equal(crops[4].hr, picture[3 + 32 : 3 + 64, 2 + 32 : 2 + 64])
    said = command.done(
        tmp_path / "whole", "--crops", "whole", "--no_sharpen_gt", "--min_size", "16", photos=photos
    )
    assert "2 different sizes" in said
    whole = records(tmp_path / "whole")
    assert [record.hr.shape for record in whole] == [(64, 96, 3), (16, 32, 3)]
    np.testing.assert_array_equal(whole[0].hr, picture[3:67, 2:98])


def test_crops_are_those_of_training_on_the_way(command, root, tmp_path):
    from tsdsr_jax.data.degradation import DegradationConfig
    from tsdsr_jax.data.photos import CropConfig, Photographs
    from tsdsr_jax.data.sources import look_at

    command.done(tmp_path / "set", "--crops_per_photo", "2", "--seed", "3")
    crop = CropConfig(32, 32, 24)
    source = Photographs(look_at([root / "photos"], crop, print).photographs, crop, DegradationConfig(), 3)
    prepared = records(tmp_path / "set")
    for index in range(10):
        for epoch in range(2):
            ours, theirs = prepared[2 * index + epoch], source.read(index, epoch)
            np.testing.assert_array_equal(ours.lr, theirs.lr)
            np.testing.assert_array_equal(ours.hr, theirs.hr)


# --- interrupted and shared -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["shards", "folders"])
def test_an_interrupted_run_goes_on_and_gives_the_same(command, tmp_path, monkeypatch, layout):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command.done(whole, "--layout", layout)
    writer = writers.ShardWriter if layout == "shards" else writers.FolderWriter
    add = writer.add

    def interrupted(self, sample):
        if sample.position == 6:
            raise KeyboardInterrupt
        add(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "add", interrupted)
        outcome = command(parts, "--layout", layout)
        assert outcome.status == 130 and "interrupted" in outcome.err
    with pytest.raises(UserError, match=r"not finished; run train/prepare\.py again with the same flags"):
        open_sets([parts])
    before = {path: path.stat().st_mtime_ns for path in parts.rglob("*") if path.is_file()}
    command.done(parts, "--layout", layout)
    kept = [
        path
        for path, time in before.items()
        if path.name != "manifest.json" and path.stat().st_mtime_ns == time
    ]
    assert len(kept) == len(before) - 1
    for ours, theirs in zip(records(parts), records(whole), strict=True):
        same(ours, theirs)
    assert not list(parts.rglob(".*"))


@pytest.mark.parametrize("layout", ["shards", "folders"])
def test_machines_share_the_work(command, tmp_path, monkeypatch, layout):
    monkeypatch.setattr(writers, "_RUN", 3)
    shared = tmp_path / "shared"
    assert "pieces are missing, perhaps from the parts of other machines" in command.done(
        shared, "--layout", layout, "--shard", "1/2"
    )
    with pytest.raises(UserError, match="not finished"):
        open_sets([shared])
    assert "10 samples" in command.done(shared, "--layout", layout, "--shard", "0/2")
    command.done(tmp_path / "alone", "--layout", layout)
    for ours, theirs in zip(records(shared), records(tmp_path / "alone"), strict=True):
        same(ours, theirs)
    assert manifest(shared) == manifest(tmp_path / "alone")


def test_worker_processes_change_nothing(command, tmp_path):
    for workers in "02":
        command.done(tmp_path / workers, "--dataloader_num_workers", workers)
    for number in range(3):
        contents = {
            shard_sets.shard_path(tmp_path / workers, "samples", number, 3).read_bytes() for workers in "02"
        }
        assert len(contents) == 1


def test_other_settings_or_another_base_do_not_go_into_the_same_set(command, root, tmp_path):
    output = tmp_path / "set"
    command.done(output)
    for flags, words in (
        (("--seed", "1"), "seed: 0 before, 1 now"),
        (("--crop_size", "16"), "crop: "),
        (("--no_sharpen_gt",), "degradation: "),
        (("--jpeg", "codec"), "degradation: "),
        (("--layout", "folders"), "layout: shards before, folders now"),
        (("--default_embedding_dir", str(root / "null")), "default prompt: "),
    ):
        said = command.refused(output, *flags)
        assert "holds a prepared set made with other settings" in said and words in said
    other = tmp_path / "sd3"
    tiny.save_checkpoint(other, tiny.tiny_mmdit_config(), tiny.tiny_vae_config())
    tiny.save_network(other / "vae", tiny.tiny_vae_config(), tiny.random_params(tiny.tiny_vae_config(), 77))
    assert "autoencoder: " in command.refused(output, "--pretrained_model_name_or_path", str(other))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("all of it")
    assert "is not empty and holds no prepared set" in command.refused(tmp_path / "other")


# --- bad photographs ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["shards", "folders"])
def test_bad_photographs_are_left_out_by_name_and_counted(command, root, tmp_path, layout):
    photos = shutil.copytree(root / "photos", tmp_path / "photos")
    whole = (photos / "1" / "4.png").read_bytes()
    (photos / "1" / "4.png").write_bytes(whole[: len(whole) // 2])
    (photos / "broken.jpg").write_bytes(b"no image")
    Image.fromarray(tiny.synthetic_photo(10, 10, 0)).save(photos / "small.png")
    said = command.done(tmp_path / "set", "--layout", layout, photos=photos)
    assert "1 photographs are smaller than the crops of 32×32 pixels" in said and "small.png" in said
    assert "1 images cannot be read" in said and "broken.jpg" in said
    assert "left out: " in said and "4.png" in said and "9 samples" in said and "1 could not be made" in said
    made = manifest(tmp_path / "set")
    assert (
        sum(made["samples"]) == 9
        and len(made["damaged"]) == len(made["smaller_than_crops"]) == len(made["unreadable"]) == 1
    )
    assert len(records(tmp_path / "set")) == 9
    assert "9 samples" in command.done(tmp_path / "set", "--layout", layout, photos=photos)


def test_nothing_to_prepare_is_said(command, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no images in it" in command.refused(tmp_path / "set", photos=tmp_path / "empty")
    assert "no such folder" in command.refused(tmp_path / "set", photos=tmp_path / "nothing")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--shard", "2/2"), "--shard 2/2: expected i/n"),
        (("--shard", "one"), "--shard one: expected i/n"),
        (("--crop_size", "500"), "multiples of 16"),
        (("--crops_per_photo", "0"), "--crops_per_photo 0: expected at least 1"),
        (("--dataloader_num_workers", "-1"), "--dataloader_num_workers -1"),
        (("--pretrained_model_name_or_path", "/nowhere"), "no such folder"),
        (("--default_embedding_dir", "/nowhere"), "no such folder"),
        (("--prompts", "txt"), "10 of 10 photographs have no text in a .txt beside them"),
    ],
)
def test_flags_that_cannot_work_are_refused(command, tmp_path, flags, words):
    assert words in command.refused(tmp_path / "set", *flags)
    assert not (tmp_path / "set").exists()


# --- damaged sets ---------------------------------------------------------------------------------


def test_damaged_shards_are_refused_by_name(command, tmp_path):
    output = tmp_path / "set"
    command.done(output)
    path = shard_sets.shard_path(output, "samples", 1, 3)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match="1 of 3 samples files are missing, such as samples-00001-of-00003"):
        open_sets([output])
    path.write_bytes(content[:1000])
    with pytest.raises(UserError, match=r"samples-00001-of-00003.arrayrecord: cannot be read"):
        open_sets([output])
    shutil.copy(shard_sets.shard_path(output, "samples", 2, 3), path)
    with pytest.raises(UserError, match=r"8 samples in its files, 10 in manifest.json"):
        open_sets([output])
    path.write_bytes(content)
    source = open_sets([output])
    assert len(source) == 10
    # Changes one byte of a record, which its checksum detects.
    middle = bytearray(content)
    middle[content.index(b"WEBP") + 200] ^= 255
    path.write_bytes(bytes(middle))
    problems = []
    for index in range(10):
        try:
            open_sets([output]).read(index)
        except UserError as error:
            problems.append(str(error))
    assert len(problems) == 1 and "cannot be read" in problems[0] and str(output) in problems[0]


def test_sets_made_differently_are_not_joined(command, tmp_path):
    command.done(tmp_path / "a")
    command.done(tmp_path / "b", "--crop_size", "16", "--min_size", "16")
    with pytest.raises(UserError, match=r"b: cannot be joined with .*a: its degraded image has shape"):
        open_sets([tmp_path / "a", tmp_path / "b"])
    command.done(tmp_path / "c", "--layout", "folders", "--seed", "9")
    joined = open_sets([tmp_path / "a", tmp_path / "c"])
    assert len(joined) == 20
    same(joined.read(13), open_sets([tmp_path / "c"]).read(3))
    assert joined.name(13) == open_sets([tmp_path / "c"]).name(3)
    assert joined.fingerprint() != open_sets([tmp_path / "c", tmp_path / "a"]).fingerprint()


# --- prompts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    config = tiny.tiny_mmdit_config()
    save_text_encoders(folder, (4, 6), (4, config.pooled_projection_dim - 4), config.joint_attention_dim)
    return folder


@pytest.mark.parametrize("layout", ["shards", "folders"])
def test_texts_beside_the_photographs_are_encoded_once_each(
    command, root, encoders, tmp_path, monkeypatch, layout
):
    from tsdsr_jax.data import set_prompts
    from tsdsr_jax.weights.text_encoders import EncoderOptions, encode_prompts

    photos = shutil.copytree(root / "photos", tmp_path / "photos")
    texts = {f"{index % 3}/{index}.png": f"a {('cat', 'house')[index % 2]}" for index in range(8)}
    for name, text in texts.items():
        # Some with the byte-order mark that some editors write.
        encoding = "utf-8-sig" if name.startswith("0") else "utf-8"
        (photos / name).with_suffix(".txt").write_text(text + "\n", encoding=encoding)
    encoded: list[str] = []

    def noted(folder, texts, options):
        encoded.extend(texts)
        return encode_prompts(folder, texts, options)

    monkeypatch.setattr(set_prompts, "encode_prompts", noted)
    flags = ("--layout", layout, "--text_encoder_path", str(encoders), "--max_sequence_length", "7")
    said = command.refused(tmp_path / "set", "--prompts", "txt", *flags, photos=photos)
    assert (
        "2 of 10 photographs have no text in a .txt beside them: 2/8.png, 0/9.png" in said
        or "0/9.png, 2/8.png" in said
    )
    default = load_prompt_embeds(root / "default")
    flags = ("--prompts", "txt_or_default", *flags)
    # The given embedding of the default prompt has 5 tokens, new ones have 84: they cannot share a set.
    said = command.refused(tmp_path / "set", *flags, photos=photos)
    assert "5 tokens" in said and "84" in said
    own = tmp_path / "default"
    long = np.zeros((84, 12), np.float32)
    long[0, 0] = 1
    own.mkdir()
    save_file({"prompt_embeds": long, "pooled_embeds": default.pooled}, own / "prompt.safetensors")
    encoded.clear()
    command.done(tmp_path / "set", *flags, "--default_embedding_dir", str(own), photos=photos)
    assert sorted(encoded) == ["a cat", "a house"]
    options = EncoderOptions(max_sequence_length=7)
    expected = dict(
        zip(("a cat", "a house"), encode_prompts(encoders, ["a cat", "a house"], options), strict=True)
    )
    source = open_sets([tmp_path / "set"])
    files = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*.png"))
    for index, name in enumerate(files):
        record = source.read(index)
        text = texts.get(name)
        prompt = long.astype(np.float16) if text is None else expected[text].prompt
        np.testing.assert_array_equal(record.prompt, prompt)
    if layout == "shards":
        stored = shard_sets.ArrayRecordDataSource(
            [str(shard_sets.shard_path(tmp_path / "set", "prompts", 0, 1))]
        )
        assert [load(stored[index])["text"].tobytes().decode()[:7] for index in range(3)] == [
            "a cat",
            "a house",
            "Cinemat",
        ]
    encoded.clear()
    command.done(tmp_path / "set", *flags, "--default_embedding_dir", str(own), photos=photos)
    assert not encoded


# --- the sheet ------------------------------------------------------------------------------------


def test_the_sheet_shows_photographs_and_what_becomes_of_them(command, tmp_path):
    said = command.done(tmp_path / "set", "--preview", str(tmp_path / "sheet.png"), "--preview_photos", "3")
    assert "3 photographs" in said and not (tmp_path / "set").exists()
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] == 5 * (32 + 8) + 8 and sheet.shape[0] > 3 * 32


def test_from_real_photographs(command, root, tmp_path):
    """A hundred photographs in both layouts."""
    photos = data_folder("bsds500", "val")
    flags = ("--crop_size", "64", "--samples_per_file", "40")
    command.done(tmp_path / "shards", *flags, photos=photos)
    command.done(tmp_path / "folders", *flags, "--layout", "folders", photos=photos)
    a, b = open_sets([tmp_path / "shards"]), open_sets([tmp_path / "folders"])
    assert len(a) == len(b) == 100
    for index in (0, 39, 40, 99):
        same(a.read(index), b.read(index))


def test_tensors_are_what_their_files_say(command, tmp_path):
    command.done(tmp_path / "folders", "--layout", "folders")
    latent = read_tensor(tmp_path / "folders" / "latent_hr" / "0000001.pt")
    assert latent.dtype == np.float32 and jax.numpy.isfinite(latent).all()


# --- nothing of the user's is lost, and nothing is mixed ------------------------------------------


def test_a_manifest_of_somebody_else_stays(command, tmp_path):
    own = tmp_path / "set" / "manifest.json"
    own.parent.mkdir()
    own.write_text('{"my": "precious"}')
    assert "holds no prepared set of train/prepare.py" in command.refused(tmp_path / "set")
    assert own.read_text() == '{"my": "precious"}'
    # It does not matter in a set of the original's.
    command.done(tmp_path / "made", "--layout", "folders")
    (tmp_path / "made" / "manifest.json").write_text('{"my": "precious"}')
    assert len(open_sets([tmp_path / "made"])) == 10


def test_the_sheet_replaces_sheets_only(command, root, tmp_path):
    photos = shutil.copytree(root / "photos", tmp_path / "photos")
    victim = photos / "0" / "0.png"
    before = victim.read_bytes()
    assert "exists and is not a preview" in command.refused(
        tmp_path / "set", "--preview", str(victim), photos=photos
    )
    assert victim.read_bytes() == before
    assert "ends in .png" in command.refused(tmp_path / "set", "--preview", str(tmp_path / "a.jpg"))
    for _ in range(2):
        command.done(tmp_path / "set", "--preview", str(tmp_path / "sheet.png"), "--preview_photos", "2")
    whole = (photos / "1" / "1.png").read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    said = command.done(
        tmp_path / "set", "--preview", str(tmp_path / "sheet.png"), "--preview_photos", "1", photos=photos
    )
    assert "left out: " in said and "0.png" in said


def test_a_set_among_its_photographs_is_not_taken_for_some(command, root, tmp_path):
    photos = shutil.copytree(root / "photos", tmp_path / "photos")
    for _ in range(2):
        assert "10 samples" in command.done(photos / "set", "--layout", "folders", photos=photos)
    assert "is also the output folder" in command.refused(photos, photos=photos)


def test_a_folder_given_twice_counts_once(command, root, tmp_path):
    assert "10 samples" in command.done(
        tmp_path / "set", "--hr_dir", str(root / "photos"), str(root / "photos" / "1")
    )


def test_of_two_machines_that_begin_together_with_other_settings_one_is_refused(root, tmp_path):
    manifests = [
        manifest_writer.ManifestWriter(tmp_path / "set", "shards", {"seed": seed}, Share(seed, 2))
        for seed in (0, 1)
    ]
    for each in manifests:
        each.check()
    manifests[0].begin()
    with pytest.raises(UserError, match="seed: 0 before, 1 now"):
        manifests[1].begin()
    # Both have passed their checks, so that the link decides.
    (tmp_path / "set" / "manifest.json").unlink()
    manifests[1]._write({"complete": False}, new=True)
    manifests[0]._write({"complete": False}, new=True)
    assert manifest(tmp_path / "set")["settings"] == {"seed": 1}
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["manifest.json"]


@pytest.mark.parametrize("layout", ["shards", "folders"])
def test_a_photograph_that_can_be_read_again_is_made_after_all(command, root, tmp_path, monkeypatch, layout):
    """As after a network failure, with the file unchanged."""
    from tsdsr_jax.data import photos

    read = photos.read_photo

    def failing(path, most):
        if Path(path).name == "4.png":
            raise UserError(f"{path}: input/output error\u2028")
        return read(path, most)

    with monkeypatch.context() as patch:
        patch.setattr(photos, "read_photo", failing)
        assert "9 samples" in command.done(tmp_path / "set", "--layout", layout)
    made = manifest(tmp_path / "set")
    assert made["complete"] and len(made["damaged"]) == 1
    assert "10 samples" in command.done(tmp_path / "set", "--layout", layout)
    assert manifest(tmp_path / "set")["damaged"] == [] and len(records(tmp_path / "set")) == 10


def test_samples_that_were_lost_are_noticed(command, tmp_path):
    command.done(tmp_path / "set", "--layout", "folders")
    (tmp_path / "set" / "lr_bicubic" / "0000003.png").unlink()
    with pytest.raises(UserError, match=r"9 samples in its folders, 10 in manifest.json"):
        open_sets([tmp_path / "set"])


def test_a_name_that_is_no_text_is_left_out(command, root, tmp_path):
    photos = shutil.copytree(root / "photos", tmp_path / "photos")
    try:
        shutil.copy(photos / "0" / "0.png", os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png"))
    except OSError as error:
        if error.errno != errno.EILSEQ:
            raise
        pytest.skip("this file system refuses names that are not UTF-8")
    said = command.done(tmp_path / "set", photos=photos)
    assert "its name is not UTF-8" in said and "10 samples" in said


def test_prompts_are_read_by_many_threads_at_once(command, tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    command.done(tmp_path / "set")
    source = open_sets([tmp_path / "set"])
    monkeypatch.setattr(shard_sets, "_PROMPTS_KEPT", 2)
    monkeypatch.setattr(
        source, "_record", lambda _, number, kind: dict.fromkeys(("prompt_embeds", "pooled_embeds"), number)
    )
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda number: source._prompt(number % 7).prompt, range(20_000)))
    finally:
        sys.setswitchinterval(interval)
    assert found == [number % 7 for number in range(20_000)] and len(source._prompt_cache) <= 2


@pytest.mark.parametrize("layout", ["shards", "folders"])
def test_a_machine_without_a_share_may_come_first(command, tmp_path, layout):
    flags = ("--layout", layout, "--samples_per_file", "64")
    assert "pieces are missing" in command.done(tmp_path / "set", *flags, "--shard", "1/2")
    assert "10 samples" in command.done(tmp_path / "set", *flags, "--shard", "0/2")


def test_what_another_machine_is_writing_stays(command, tmp_path):
    command.done(tmp_path / "set")
    young, old = tmp_path / "set" / ".young.part", tmp_path / "set" / ".old.part"
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    command.done(tmp_path / "set")
    assert young.exists() and not old.exists()


def test_lost_files_are_made_again_and_strangers_do_not_count(command, tmp_path):
    output = tmp_path / "set"
    command.done(output, "--layout", "folders")
    before = records(output)
    for name in (
        "gt/0000003.png",
        "latent_hr/0000004.pt",
        "prompt_embeds/0000005.pt",
        "lr_bicubic/0000006.png",
    ):
        (output / name).unlink()
    (output / "lr_bicubic" / ".DS_Store").write_bytes(b"")
    (output / "lr_bicubic" / "Thumbs.db").write_bytes(b"")
    assert "10 samples" in command.done(output, "--layout", "folders")
    for ours, theirs in zip(records(output), before, strict=True):
        same(ours, theirs)


def test_equal_sets_have_equal_fingerprints_whenever_they_were_made(command, tmp_path, monkeypatch):
    import time

    for name, moment in (("a", 1.7e9), ("b", 1.8e9)):
        with monkeypatch.context() as patch:
            patch.setattr(time, "localtime", lambda _=None, moment=moment: time.gmtime(moment))
            command.done(tmp_path / name, "--layout", "folders")
    assert open_sets([tmp_path / "a"]).fingerprint() == open_sets([tmp_path / "b"]).fingerprint()


def test_a_set_of_nothing_is_refused(command, root, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    whole = (root / "photos" / "0" / "0.png").read_bytes()
    (photos / "a.png").write_bytes(whole[: len(whole) // 2])
    assert "none of the 1 samples could be made" in command.refused(tmp_path / "set", photos=photos)
    with pytest.raises(UserError, match="holds no sample"):
        open_sets([tmp_path / "set"])
