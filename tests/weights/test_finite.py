"""NaN and infinity in weights: found at every place, in every type and layout, and nothing else is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tiny_checkpoint import random_params, save_network, tiny_mmdit_config, tiny_vae_config
from tsdsr_jax.commands import convert_sd3
from tsdsr_jax.errors import UserError
from tsdsr_jax.weights.finite import CHUNK, is_finite, refuse_broken
from tsdsr_jax.weights.lpips_files import OWN, Tensors, entries, read_leaves
from tsdsr_jax.weights.sd3_folder import PARAMS_FILE, TORCH_STEM, NetworkFiles
from tsdsr_jax.weights.streaming import load_parts
from tsdsr_jax.weights.tensor_files import TensorReader, TensorSpec, open_tensors, save_tensors, write_tensors

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
CONFIGS = {"transformer": tiny_mmdit_config(num_layers=3), "vae": tiny_vae_config()}


# --- arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 7, CHUNK, 2 * CHUNK + 3])
def test_one_value_in_any_place_is_found(dtype: type, size: int) -> None:
    values = np.full(size, ml_dtypes.finfo(dtype).max, dtype)
    assert is_finite(values)
    for place in {0, size // 2, size - 1}:
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            values[place] = value
            assert not is_finite(values), (place, value)
        values[place] = 1
    assert is_finite(values)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_all_numbers_of_16_bits(dtype: type) -> None:
    for bits in np.arange(1 << 16, dtype=np.uint16).reshape(-1, 1):
        number = bits.view(dtype)
        assert is_finite(number) == np.isfinite(number.astype(np.float32)).all(), hex(bits[0])


def test_other_arrays() -> None:
    assert (
        is_finite(np.zeros((3, 0), np.float16)) and is_finite(np.arange(5)) and is_finite(np.float32(3)[None])
    )
    columns = np.ones((4, 6), np.float16)[:, ::2]
    assert is_finite(columns)
    columns[3, 2] = np.inf
    assert not is_finite(columns) and not is_finite(columns.T)


def test_messages_count_and_do_not_go_on_for_ever() -> None:
    refuse_broken("file", [])
    with pytest.raises(UserError, match=r"^file: has values that are NaN or infinite in 1 tensor: a; "):
        refuse_broken("file", ["a"])
    with pytest.raises(UserError, match=r"in 30 tensors: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more; "):
        refuse_broken("file", [str(index) for index in range(30)])


# --- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, np.int32, np.uint8])
def test_views_are_what_reading_gives(tmp_path: Path, dtype: type) -> None:
    tensors = {
        "b": np.arange(24).reshape(2, 3, 4).astype(dtype),
        "a": np.arange(5).astype(dtype),
        "none": np.zeros((0, 3), dtype),
        "scalar": np.ones((), dtype),
    }
    save_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    reader = open_tensors(tmp_path / "x.safetensors")
    for name, array in tensors.items():
        view = reader.view(name)
        assert view.dtype == array.dtype and view.shape == array.shape
        np.testing.assert_array_equal(view, reader.read(name))


def test_views_of_shards(tmp_path: Path) -> None:
    for name in "ab":
        save_tensors(tmp_path / f"{name}.safetensors", {name: np.full(3, ord(name))})
    reader = TensorReader(tmp_path, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert [reader.view(name)[0] for name in "ab"] == [ord("a"), ord("b")]


# --- checkpoints -------------------------------------------------------------------------------------

FIRST, MIDDLE, LAST = (
    "context_embedder.bias",
    "transformer_blocks.1.ff.net.2.weight",
    "transformer_blocks.2.norm1.linear.weight",
)


@pytest.fixture
def sd3(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["sd3.py", *map(str, arguments)])
        convert_sd3.main()

    return run


def checkpoint(
    folder: Path, broken: dict[str, float], dtype: type = np.float32, part: str = "transformer"
) -> Path:
    """A diffusers folder in which the last value of some tensors of one network is another."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        for name, array in tensors.items():
            tensors[name] = array.astype(dtype)
        for name, value in broken.items():
            tensors[name].reshape(-1)[-1] = value

    for name, config in CONFIGS.items():
        save_network(
            folder / name, config, random_params(config, 1), change if name == part else lambda _: None
        )
    return folder


def converted_without_looking(folder: Path, target: Path) -> Path:
    """What an older version would have made of it."""
    for part in CONFIGS:
        network = NetworkFiles(folder / part, part)
        write_tensors(target / part / PARAMS_FILE, network.specs, network.leaves())
        (target / part / "config.json").write_text((folder / part / "config.json").read_text())
    return target


@pytest.mark.parametrize("back", [False, True], ids=["to ours", "to diffusers"])
@pytest.mark.parametrize(
    ("broken", "dtype", "part"),
    [
        ({FIRST: np.nan}, np.float32, "transformer"),
        ({MIDDLE: np.nan}, np.float32, "transformer"),
        ({LAST: np.inf}, np.float16, "transformer"),
        ({MIDDLE: -np.inf}, ml_dtypes.bfloat16, "transformer"),
        ({FIRST: np.nan, MIDDLE: np.inf, LAST: np.nan}, np.float16, "transformer"),
        ({"encoder.conv_in.weight": np.nan}, np.float32, "vae"),
    ],
    ids=["first", "middle", "last", "bfloat16", "three", "autoencoder"],
)
def test_converting_names_the_tensors_and_writes_nothing(
    tmp_path: Path, sd3: Callable[..., None], broken: dict[str, float], dtype: type, part: str, back: bool
) -> None:
    source = checkpoint(tmp_path / "sd3", broken, dtype, part)
    if back:
        source = converted_without_looking(source, tmp_path / "ours")
    with pytest.raises(UserError) as caught:
        sd3("--input", source, "--output", tmp_path / "out", *["--to_diffusers"] * back)
    said = str(caught.value)
    assert str(source / part) in said and "NaN or infinite" in said and f"in {len(broken)} tensor" in said
    assert all(name in said for name in broken) and "\n" not in said
    # Layers beside a broken one are stacked with it, and not named.
    assert "transformer_blocks.0." not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_the_largest_numbers_convert(tmp_path: Path, sd3: Callable[..., None], dtype: type) -> None:
    largest = float(ml_dtypes.finfo(dtype).max)
    source = checkpoint(tmp_path / "sd3", {FIRST: largest, MIDDLE: -largest, LAST: largest}, dtype)
    sd3("--input", source, "--output", tmp_path / "out")
    sd3("--input", tmp_path / "out", "--output", tmp_path / "back", "--to_diffusers")
    files = [folder / "transformer" / f"{TORCH_STEM}.safetensors" for folder in (source, tmp_path / "back")]
    ours, theirs = map(open_tensors, files)
    assert all(ours.read(name).tobytes() == theirs.read(name).tobytes() for name in theirs.specs)


def test_loading_a_diffusers_folder_names_the_tensors(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "sd3", {MIDDLE: np.nan, FIRST: np.inf})
    files = NetworkFiles(source / "transformer", "transformer")
    with pytest.raises(UserError, match=rf"NaN or infinite in 2 tensors: {MIDDLE}, {FIRST};"):
        files.load(jnp.float32)
    with pytest.raises(UserError, match=rf"NaN or infinite in 2 tensors: {FIRST}, {MIDDLE};"):
        list(load_parts(files, jnp.asarray))


# --- LPIPS -------------------------------------------------------------------------------------------


def test_lpips_weights_are_looked_at() -> None:
    arrays = {entry.names[0]: np.ones(entry.torch_shape, np.float32) for entry in entries("alex", OWN)}
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}
    tensors = Tensors(Path("alex.pth"), specs, arrays.__getitem__)
    read_leaves(tensors, "alex", OWN)
    for name in ("lin0", "slice1_0/kernel"):
        arrays[name].reshape(-1)[3] = np.nan
    with pytest.raises(UserError, match=r"alex\.pth: .* in 2 tensors: lin0, slice1_0/kernel;"):
        read_leaves(tensors, "alex", OWN)
