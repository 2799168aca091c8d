"""A Git LFS pointer is called that, whichever file it stands for; other damage is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tsdsr_jax.data.manifest import has_manifest, read_manifest
from tsdsr_jax.data.shard_sets import count_records
from tsdsr_jax.errors import UserError
from tsdsr_jax.evaluation.niqe_params import load_pristine
from tsdsr_jax.git_lfs import refuse_pointer
from tsdsr_jax.images.files import decode_photo, read_content, read_photo, read_size
from tsdsr_jax.weights.lpips_files import read_torch_lpips
from tsdsr_jax.weights.sd3_folder import read_json
from tsdsr_jax.weights.tensor_files import open_tensors
from tsdsr_jax.weights.text_encoders import _read_json
from tsdsr_jax.weights.torch_pickle import read_tensor

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4169084344\n"

READERS: dict[str, Callable[[Path], Any]] = {
    "x.safetensors": open_tensors,
    "x.safetensors.index.json": open_tensors,
    "config.json": read_json,
    "model_index.json": _read_json,
    "prompt_embeds.pt": read_tensor,
    "alexnet.pth": lambda path: read_torch_lpips("alex", path),
    "niqe_pris_params.npz": load_pristine,
    "niqe_modelparameters.mat": load_pristine,
    "a.png": lambda path: read_photo(path, 1000),
    "b.jpg": lambda path: read_size(path, 1000),
    "c.tif": lambda path: decode_photo(read_content(path), str(path), 1000),
    "samples-00000-of-00001.arrayrecord": count_records,
    "manifest.json": lambda path: has_manifest(path.parent) or read_manifest(path.parent),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_is_called_that(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name}: is a Git LFS pointer, .*git lfs pull"):
        READERS[name](tmp_path / name)


def test_other_damage_is_not(tmp_path):
    (tmp_path / "x.safetensors").write_text("neither")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        open_tensors(tmp_path / "x.safetensors")
    refuse_pointer(tmp_path / "x.safetensors")
    refuse_pointer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"\n<!DOCTYPE html><html><head>", r"is a web page.*/resolve/"),
        (b"<html>", "is a web page"),
        (b"PK\x03\x04archive/data.pkl", r"is a PyTorch file.*save_file"),
    ],
)
def test_what_was_downloaded_or_renamed_instead_of_safetensors_is_named(tmp_path, start, words):
    (tmp_path / "x.safetensors").write_bytes(start + bytes(500))
    with pytest.raises(UserError, match=rf"x.safetensors: {words}"):
        open_tensors(tmp_path / "x.safetensors")


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"name": "\xc3\xa9"}')
    assert read_json(tmp_path / "config.json") == {"name": "\u00e9"}
