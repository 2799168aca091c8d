"""convert/sd3.py and convert/lora.py: every layout in, identical values out, and what goes wrong is said.

The scripts run as processes of their own where that is the point; where only their messages are, in this one.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from parity import arrays, error, leaves, random_lora, uniform, write_folder
from tsdsr_jax.commands import convert_lora as lora_command
from tsdsr_jax.commands import convert_sd3 as sd3_command
from tsdsr_jax.errors import UserError
from tsdsr_jax.models import lora
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import abstract_params
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.weights import torch_names
from tsdsr_jax.weights.lora_files import load_lora, save_lora
from tsdsr_jax.weights.sd3_folder import MERGED_FILE, PARAMS_FILE, PARTS, TORCH_STEM, open_checkpoint
from tsdsr_jax.weights.tensor_files import TensorReader, open_tensors, save_tensors

pytest_plugins = "parity"

ROOT = Path(__file__).parents[2]
CONFIGS = {"transformer": MMDiTConfig.tiny(), "vae": VAEConfig.tiny()}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "convert" / script), *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)


@pytest.fixture
def sd3(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """convert/sd3.py in this process."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["sd3.py", *map(str, arguments)])
        sd3_command.main()

    return run


@pytest.fixture
def convert_lora(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """convert/lora.py in this process."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, arguments)])
        lora_command.main()

    return run


def stored_leaves(folder: Path, variant: str | None = None) -> dict[str, np.ndarray]:
    """Every parameter of a checkpoint folder of either layout, by part and path, as stored."""
    checkpoint = open_checkpoint(folder, variant=variant)
    return {f"{part}/{path}": leaf for part in PARTS for path, leaf in checkpoint.network(part).leaves()}


def assert_identical(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype and ours[name].shape == array.shape, name
        assert ours[name].tobytes() == array.tobytes(), name


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# --- every layout --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "saved", "flags"),
    [
        ("float32", {}, []),
        ("float16", dict(max_shard_size="150KB"), []),
        ("float16", dict(variant="fp16"), []),
        ("float16", dict(variant="fp16", max_shard_size="150KB"), ["--variant", "fp16"]),
        ("bfloat16", {}, ["--dtype", "keep"]),
    ],
    ids=["single", "sharded", "variant found", "variant asked for, sharded", "bfloat16"],
)
def test_layouts_that_diffusers_writes(
    oracle: Any, tmp_path: Path, dtype: str, saved: dict[str, str], flags: list[str]
) -> None:
    import torch

    networks = {"transformer": oracle.tiny_transformer(1), "vae": oracle.tiny_vae(2)}
    source, target = tmp_path / "diffusers", tmp_path / "ours"
    oracle.save_diffusers_folder(source, *networks.values(), dtype=getattr(torch, dtype), **saved)
    shards = list((source / "transformer").glob("*-of-*"))
    assert (len(shards) > 1) == ("max_shard_size" in saved)
    result = run_script("sd3.py", "--input", source, "--output", target, *flags)
    assert result.returncode == 0, result.stderr
    assert "wrote" in result.stdout and "transformer 0.6 M" in result.stdout
    assert {f"{part}/{name}" for part in PARTS for name in ("config.json", PARAMS_FILE)} | {
        "model_index.json",
        "scheduler/scheduler_config.json",
    } == files_under(target)
    ours = stored_leaves(target)
    assert {array.dtype for array in ours.values()} == {np.dtype(DTYPES[dtype])}
    for part, model in networks.items():
        config = open_checkpoint(target).network(part).config
        for entry in torch_names.base_entries(config):
            leaf = ours[f"{part}/{entry.path}"]
            for name, tensor in entry.scatter(leaf):
                expected = model.state_dict()[name].to(getattr(torch, dtype)).float().numpy()
                np.testing.assert_array_equal(tensor.astype(np.float32), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_without_torch(tmp_path: Path, dtype: str, sd3: Callable[..., None]) -> None:
    """Loads to the values that the diffusers folder itself loads to, and comes back byte for byte."""
    written = write_folder(tmp_path / "diffusers", CONFIGS, DTYPES[dtype])
    sd3("--input", tmp_path / "diffusers", "--output", tmp_path / "ours")
    assert_identical(stored_leaves(tmp_path / "ours"), stored_leaves(tmp_path / "diffusers"))
    sd3("-i", tmp_path / "ours", "-o", tmp_path / "back", "--to_diffusers")
    for part in PARTS:
        reader = open_tensors(tmp_path / "back" / part / f"{TORCH_STEM}.safetensors")
        assert reader.metadata == {"format": "pt"}
        assert_identical({name: reader.read(name) for name in reader.specs}, written[part])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_converted(tmp_path: Path, dtype: str, sd3: Callable[..., None]) -> None:
    write_folder(tmp_path / "diffusers", CONFIGS, np.float16)
    sd3("--input", tmp_path / "diffusers", "--output", tmp_path / "ours", "--dtype", dtype)
    expected = {
        path: leaf.astype(np.float32).astype(DTYPES[dtype])
        for path, leaf in stored_leaves(tmp_path / "diffusers").items()
    }
    assert_identical(stored_leaves(tmp_path / "ours"), expected)


@pytest.mark.parametrize("back", [False, True])
def test_adapters_are_merged(tmp_path: Path, back: bool, sd3: Callable[..., None]) -> None:
    """In float32, before the cast; into all that they adapt and nothing else, whichever way is converted."""
    write_folder(tmp_path / "diffusers", CONFIGS, np.float16)
    source, adapters = tmp_path / "diffusers", {}
    for part, targets in (("transformer", lora.STUDENT_TARGETS), ("vae", lora.VAE_ENCODER_TARGETS)):
        adapter = random_lora(CONFIGS[part], targets, 2)
        save_lora(tmp_path / "lora" / f"{part}.safetensors", adapter, part)
        adapters |= {
            f"{part}/{path}": np.asarray(leaf) for path, leaf in flatten_dict(adapter, sep="/").items()
        }
    plain = stored_leaves(source)
    if back:
        sd3("-i", source, "-o", tmp_path / "ours")
        source = tmp_path / "ours"
    flags = ["--to_diffusers"] if back else []
    sd3(
        "-i", source, "-o", tmp_path / "merged", "--lora_dir", tmp_path / "lora", "--dtype", "float32", *flags
    )
    merged = stored_leaves(tmp_path / "merged")
    for name, leaf in plain.items():
        module, expected = name.removesuffix("/kernel"), leaf.astype(np.float32)
        if f"{module}/a" in adapters and name.endswith("/kernel"):
            delta = np.matmul(*(adapters[f"{module}/{half}"].astype(np.float64) for half in "ab"))
            assert np.abs(delta).max() > 1e-3
            np.testing.assert_allclose(merged[name], expected + delta, rtol=0, atol=1e-6)
        else:
            np.testing.assert_array_equal(merged[name], expected)


def test_merged_adapters_are_named_from_then_on(tmp_path: Path, sd3: Callable[..., None]) -> None:
    """A folder says what is in its weights, whichever way they are converted later; other weights say nothing."""
    write_folder(tmp_path / "diffusers", CONFIGS)
    for part, targets in (("transformer", lora.STUDENT_TARGETS), ("vae", lora.VAE_ENCODER_TARGETS)):
        save_lora(tmp_path / "lora" / f"{part}.safetensors", random_lora(CONFIGS[part], targets, 2), part)
    merging = ("--lora_dir", tmp_path / "lora")
    names = tuple(f"{tmp_path}/lora/{part}.safetensors" for part in CONFIGS)
    sd3("-i", tmp_path / "diffusers", "-o", tmp_path / "merged", *merging)
    sd3("-i", tmp_path / "merged", "-o", tmp_path / "back", "--to_diffusers")
    sd3("-i", tmp_path / "back", "-o", tmp_path / "again")
    sd3("-i", tmp_path / "merged", "-o", tmp_path / "twice", *merging)
    for folder, expected in (("merged", names), ("back", names), ("again", names), ("twice", names * 2)):
        assert open_checkpoint(tmp_path / folder).merged == expected
    sd3("-i", tmp_path / "diffusers", "-o", tmp_path / "merged", "--overwrite")
    assert open_checkpoint(tmp_path / "merged").merged == () == open_checkpoint(tmp_path / "diffusers").merged


def test_merged_weights_keep_their_mark_where_they_could_not_be_replaced(
    tmp_path: Path, sd3: Callable[..., None]
) -> None:
    write_folder(tmp_path / "diffusers", CONFIGS)
    sd3("-i", tmp_path / "diffusers", "-o", tmp_path / "ours")
    mark = tmp_path / "ours" / MERGED_FILE
    mark.write_text('{"loras": ["a"]}')
    file = tmp_path / "diffusers" / "transformer" / f"{TORCH_STEM}.safetensors"
    reader = open_tensors(file)
    save_tensors(file, {name: reader.read(name) + np.float32(7e4) for name in reader.specs})
    with pytest.raises(UserError, match="outside the range of float16"):
        sd3("-i", tmp_path / "diffusers", "-o", tmp_path / "ours", "--overwrite", "--dtype", "float16")
    assert open_checkpoint(tmp_path / "ours").merged == ("a",)
    sd3("-i", tmp_path / "diffusers", "-o", tmp_path / "ours", "--overwrite")
    assert not mark.exists()


def test_sums_beyond_float16_are_refused(tmp_path: Path, sd3: Callable[..., None]) -> None:
    write_folder(tmp_path / "diffusers", CONFIGS, np.float16)
    for part, targets in (("transformer", lora.STUDENT_TARGETS), ("vae", lora.VAE_ENCODER_TARGETS)):
        adapter = random_lora(CONFIGS[part], targets, 2)
        large = jax.tree.map(lambda leaf: 1e4 * leaf, adapter)
        save_lora(tmp_path / "lora" / f"{part}.safetensors", large, part)
    with pytest.raises(UserError, match="outside the range of float16"):
        sd3("-i", tmp_path / "diffusers", "-o", tmp_path / "merged", "--lora_dir", tmp_path / "lora")


def test_sums_beyond_float32_are_refused(tmp_path: Path, sd3: Callable[..., None]) -> None:
    write_folder(tmp_path / "diffusers", CONFIGS)
    for part, targets in (("transformer", lora.STUDENT_TARGETS), ("vae", lora.VAE_ENCODER_TARGETS)):
        large = jax.tree.map(lambda leaf: leaf * 1e25, random_lora(CONFIGS[part], targets, 2))
        save_lora(tmp_path / "lora" / f"{part}.safetensors", large, part)
    with pytest.raises(UserError, match="exceeds float32's range after the LoRA is merged"):
        sd3("-i", tmp_path / "diffusers", "-o", tmp_path / "merged", "--lora_dir", tmp_path / "lora")
    assert not list((tmp_path / "merged").rglob(PARAMS_FILE))


def test_adapters_that_are_not_there(tmp_path: Path) -> None:
    write_folder(tmp_path / "diffusers", CONFIGS)
    result = run_script(
        "sd3.py", "-i", tmp_path / "diffusers", "-o", tmp_path / "ours", "--lora_dir", tmp_path / "lora"
    )
    assert result.returncode == 1 and "transformer.safetensors: not found" in result.stderr
    assert not (tmp_path / "ours").exists()


def test_values_beyond_float16_are_refused(tmp_path: Path, sd3: Callable[..., None]) -> None:
    write_folder(tmp_path / "diffusers", CONFIGS)
    file = tmp_path / "diffusers" / "vae" / f"{TORCH_STEM}.safetensors"
    reader = open_tensors(file)
    tensors = {name: reader.read(name) for name in reader.specs}
    tensors["decoder.conv_in.bias"][3] = 7e4
    save_tensors(file, tensors)
    with pytest.raises(UserError, match=r"decoder/conv_in/bias: .*outside the range of float16.*bfloat16"):
        sd3("--input", tmp_path / "diffusers", "--output", tmp_path / "ours", "--dtype", "float16")
    assert not (tmp_path / "ours" / "vae" / PARAMS_FILE).exists()


def test_round_trip_loads_in_diffusers(oracle: Any, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    style = dict(qk_norm="rms_norm", dual_attention_layers=(0, 1))
    networks = {"transformer": oracle.tiny_transformer(1, **style), "vae": oracle.tiny_vae(2)}
    oracle.save_diffusers_folder(tmp_path / "first", *networks.values(), max_shard_size="150KB")
    for source, target, flags in (("first", "ours", ()), ("ours", "back", ("--to_diffusers",))):
        result = run_script("sd3.py", "--input", tmp_path / source, "--output", tmp_path / target, *flags)
        assert result.returncode == 0, result.stderr
    for part, kind in (("transformer", SD3Transformer2DModel), ("vae", AutoencoderKL)):
        loaded = kind.from_pretrained(tmp_path / "back" / part)
        assert_identical(arrays(loaded.state_dict()), arrays(networks[part].state_dict()))


# --- what goes wrong -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A diffusers folder and what it converts to; tests copy what they change."""
    folder = tmp_path_factory.mktemp("pristine")
    write_folder(folder / "diffusers", CONFIGS)
    sys_argv, sys.argv = sys.argv, ["sd3.py", "-i", str(folder / "diffusers"), "-o", str(folder / "ours")]
    try:
        sd3_command.main()
    finally:
        sys.argv = sys_argv
    return {"diffusers": folder / "diffusers", "ours": folder / "ours"}


@pytest.fixture
def source(pristine: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage, of hard links: replace files, do not write into them."""
    import shutil

    return shutil.copytree(pristine["diffusers"], tmp_path / "diffusers", copy_function=os.link)


def replace_bytes(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def truncated(source: Path) -> None:
    file = source / "vae" / f"{TORCH_STEM}.safetensors"
    replace_bytes(file, file.read_bytes()[:-100])


def only_bin(source: Path) -> None:
    (source / "vae" / f"{TORCH_STEM}.safetensors").rename(source / "vae" / f"{TORCH_STEM}.bin")


def no_weights(source: Path) -> None:
    (source / "transformer" / f"{TORCH_STEM}.safetensors").unlink()


def missing_shard(source: Path) -> None:
    folder = source / "transformer"
    (folder / f"{TORCH_STEM}.safetensors").rename(folder / f"{TORCH_STEM}-00001-of-00002.safetensors")
    weight_map = {
        "a": f"{TORCH_STEM}-00001-of-00002.safetensors",
        "b": f"{TORCH_STEM}-00002-of-00002.safetensors",
    }
    index = folder / f"{TORCH_STEM}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def broken_index(source: Path) -> None:
    folder = source / "transformer"
    (folder / f"{TORCH_STEM}.safetensors").rename(folder / f"{TORCH_STEM}-00001-of-00002.safetensors")
    (folder / f"{TORCH_STEM}.safetensors.index.json").write_text('{"metadata": {}}')


def two_variants(source: Path) -> None:
    folder = source / "vae"
    (folder / f"{TORCH_STEM}.safetensors").rename(folder / f"{TORCH_STEM}.fp16.safetensors")
    (folder / f"{TORCH_STEM}.bf16.safetensors").touch()


def change_config(part: str, **values: Any) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        file = source / part / "config.json"
        config = json.loads(file.read_text()) | values
        replace_bytes(file, json.dumps(config).encode())

    return change


def no_config(source: Path) -> None:
    (source / "vae" / "config.json").unlink()


def broken_config(source: Path) -> None:
    replace_bytes(source / "vae" / "config.json", b'{"latent_channels": ')


@pytest.mark.parametrize(
    ("damage", "flags", "message"),
    [
        (
            truncated,
            [],
            r"vae/diffusion_pytorch_model\.safetensors: not a readable safetensors file .*truncated",
        ),
        (only_bin, [], r"vae: only pickled weights here; expected diffusion_pytorch_model\.safetensors"),
        (no_weights, [], r"transformer: diffusion_pytorch_model\.safetensors or .* not found"),
        (missing_shard, [], r"index\.json: diffusion_pytorch_model-00002-of-00002\.safetensors is missing"),
        (broken_index, [], r"index\.json: not an index"),
        (two_variants, [], r"vae: .* not found; the files there need --variant bf16 or fp16"),
        (
            lambda source: None,
            ["--variant", "fp16"],
            r"fp16\.safetensors or .* not found; .* need no --variant",
        ),
        (
            change_config("transformer", _class_name="UNet2DModel"),
            [],
            r"describes a UNet2DModel; expected a SD3Tr",
        ),
        (
            change_config("vae", _class_name="AutoencoderTiny"),
            [],
            "AutoencoderTiny; expected a AutoencoderKL",
        ),
        (change_config("vae", use_quant_conv=True), [], r"vae/config\.json: use_quant_conv is True"),
        (
            change_config("transformer", num_layers=4),
            [],
            r"(?s)missing: transformer_blocks\.3\.attn\.to_q\.weight",
        ),
        (change_config("transformer", caption_projection_dim=32), [], r"caption_projection_dim is 32"),
        (no_config, [], r"no vae/config\.json; expected a diffusers SD3 folder"),
        (broken_config, [], r"vae/config\.json: not readable JSON"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_checkpoints_are_refused_before_anything_is_written(
    source: Path, tmp_path: Path, sd3: Callable[..., None], damage: Any, flags: list[str], message: str
) -> None:
    damage(source)
    with pytest.raises(UserError, match=message):
        sd3("--input", source, "--output", tmp_path / "ours", *flags)
    assert not (tmp_path / "ours").exists()


def test_mistakes_are_one_line_on_the_terminal(source: Path, tmp_path: Path) -> None:
    truncated(source)
    result = run_script("sd3.py", "--input", source, "--output", tmp_path / "ours")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("sd3.py: ") and result.stderr.count("\n") == 1


def test_output_must_be_another_folder(
    pristine: dict[str, Path],
    source: Path,
    tmp_path: Path,
    sd3: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = files_under(source)
    with pytest.raises(UserError, match="--output is the input checkpoint"):
        sd3("--input", source, "--output", source)
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UserError, match="--output is the input checkpoint"):
        sd3("--input", source, "--output", tmp_path / "link")
    monkeypatch.chdir(source)
    with pytest.raises(UserError, match="--output is the input checkpoint"):
        sd3("--input", ".", "--output", "../diffusers")
    assert files_under(source) == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; --output must be a folder"):
        sd3("--input", source, "--output", tmp_path / "file")
    with pytest.raises(UserError, match="not written by this command; there is nothing to convert back"):
        sd3("--input", source, "--output", tmp_path / "back", "--to_diffusers")
    with pytest.raises(UserError, match="already converted; --to_diffusers"):
        sd3("--input", pristine["ours"], "--output", tmp_path / "again")


def test_existing_weights_are_replaced_only_when_asked(
    source: Path, tmp_path: Path, sd3: Callable[..., None]
) -> None:
    target = tmp_path / "ours" / "vae" / PARAMS_FILE
    target.parent.mkdir(parents=True)
    target.write_text("mine")
    with pytest.raises(UserError, match=r"vae/params\.safetensors: already exists; pass --overwrite"):
        sd3("--input", source, "--output", tmp_path / "ours")
    assert target.read_text() == "mine" and not (tmp_path / "ours" / "transformer").exists()
    sd3("--input", source, "--output", tmp_path / "ours", "--overwrite")
    assert_identical(stored_leaves(tmp_path / "ours"), stored_leaves(source))


@pytest.mark.parametrize(
    "interruption", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=str
)
def test_interrupted_conversion_leaves_nothing(
    source: Path,
    tmp_path: Path,
    sd3: Callable[..., None],
    interruption: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, reads = TensorReader.read, []

    def fail_late(self: TensorReader, name: str) -> np.ndarray:
        reads.append(name)
        if len(reads) == 20:
            assert list((tmp_path / "ours" / "transformer").glob(".*.part"))
            raise interruption
        return read(self, name)

    monkeypatch.setattr(TensorReader, "read", fail_late)
    with pytest.raises((KeyboardInterrupt, UserError), match=r"^$|No space left"):
        sd3("--input", source, "--output", tmp_path / "ours")
    assert files_under(tmp_path / "ours") == set()


def test_killed_conversion_leaves_no_weights_under_their_name(
    source: Path, tmp_path: Path, sd3: Callable[..., None]
) -> None:
    slow = (
        "import sys, time\nfrom tsdsr_jax.commands import convert_sd3 as script\n"
        "from tsdsr_jax.weights.tensor_files import TensorReader\n"
        "read = TensorReader.read\n"
        "TensorReader.read = lambda self, name: (time.sleep(0.5), read(self, name))[1]\n"
        "script.main()\n"
    )
    command = [sys.executable, "-c", slow, "--input", str(source), "--output", str(tmp_path / "ours")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.DEVNULL
    )
    folder, deadline = tmp_path / "ours" / "transformer", time.monotonic() + 60
    while not list(folder.glob(".*.part")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "ours").rglob("*.safetensors"))
    sd3("--input", source, "--output", tmp_path / "ours")  # and the next attempt is not hindered
    assert_identical(stored_leaves(tmp_path / "ours"), stored_leaves(source))


# --- hub ids ---------------------------------------------------------------------------------------


def hub_error(kind: str) -> Exception:
    from huggingface_hub import errors

    if kind == "OfflineModeIsEnabled":
        return errors.OfflineModeIsEnabled("Cannot reach the hub: offline mode.\nmore")
    if kind == "ConnectionError":  # whichever HTTP library the client uses
        return ConnectionError("[Errno -2] Name or service not known")
    return getattr(errors, kind)("no", response=SimpleNamespace(headers={}, status_code=404, request=None))


def test_hub_id_is_downloaded(
    pristine: dict[str, Path], tmp_path: Path, sd3: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options))
        return str(pristine["diffusers"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    sd3("--input", "owner/sd3-medium", "--output", "ours", "--revision", "refs/pr/2")
    assert_identical(stored_leaves(tmp_path / "ours"), stored_leaves(pristine["diffusers"]))
    ((repo_id, options),) = calls
    assert repo_id == "owner/sd3-medium" and options["revision"] == "refs/pr/2"
    patterns = options["allow_patterns"]

    def wanted(name: str, patterns: list[str]) -> bool:
        return bool(list(huggingface_hub.utils.filter_repo_objects([name], allow_patterns=patterns)))

    needed = [f"{part}/{name}" for part in PARTS for name in ("config.json", f"{TORCH_STEM}.safetensors")]
    needed += [f"transformer/{TORCH_STEM}-00001-of-00002.safetensors"]
    needed += [f"transformer/{TORCH_STEM}.safetensors.index.json", "scheduler/scheduler_config.json"]
    needed += ["model_index.json", f"vae/{PARAMS_FILE}"]
    assert all(wanted(name, patterns) for name in needed)
    spared = ["text_encoder_3/model.safetensors", f"transformer/{TORCH_STEM}.bin", "sd3_medium.safetensors"]
    spared += [f"transformer/{TORCH_STEM}.fp16.safetensors"]
    assert not any(wanted(name, patterns) for name in spared)
    with pytest.raises(UserError, match=r"fp16\.safetensors"):  # the folder served here has none
        sd3("--input", "owner/sd3-medium", "--output", "other", "--variant", "fp16")
    patterns = calls[1][1]["allow_patterns"]
    assert wanted(f"vae/{TORCH_STEM}.fp16.safetensors", patterns)
    assert wanted(f"transformer/{TORCH_STEM}.fp16-00001-of-00002.safetensors", patterns)
    assert wanted(f"transformer/{TORCH_STEM}.safetensors.index.fp16.json", patterns)
    assert not wanted(f"transformer/{TORCH_STEM}.safetensors", patterns)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "owner/name: the repository is gated; accept its license .*hf auth login"),
        ("RepositoryNotFoundError", "owner/name: neither a folder nor a repository on the hub"),
        ("RevisionNotFoundError", "owner/name: has no revision 'v2'"),
        ("OfflineModeIsEnabled", "fetching it from the hub failed: Cannot reach the hub: offline mode.$"),
        ("ConnectionError", "fetching it from the hub failed: .*Name or service not known"),
    ],
)
def test_hub_failures_are_told_apart(
    kind: str, message: str, tmp_path: Path, sd3: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(repo_id: str, **options: Any) -> str:
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        sd3("--input", "owner/name", "--output", "ours", "--revision", "v2")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", ["/no/such/folder", "no_such_folder", "a/b/c"])
def test_missing_folders_are_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, sd3: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{name}: no such folder"):
        sd3("--input", name, "--output", "ours")


# --- convert/lora.py ---------------------------------------------------------------------------------

ADAPTERS = {
    "transformer": ("student", 4, lora.STUDENT_TARGETS),
    "teacher": ("student", 6, lora.STUDENT_TARGETS),
    "transformer_reg": ("aux", 2, lora.AUXILIARY_TARGETS),
    "vae": ("vae", 5, lora.VAE_ENCODER_TARGETS),
}


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    """TSD-SR's four adapter files in PEFT's layout, made without torch."""
    for name, (_, rank, targets) in ADAPTERS.items():
        config = CONFIGS["vae" if name == "vae" else "transformer"]
        tensors = torch_names.write_lora(random_lora(config, targets, rank), config)
        save_tensors(tmp_path / "peft" / f"{name}.safetensors", tensors)
    return tmp_path / "peft"


def read_all(path: Path) -> dict[str, np.ndarray]:
    reader = open_tensors(path)
    return {name: reader.read(name) for name in reader.specs}


def test_adapter_folder_there_and_back(
    peft_folder: Path,
    pristine: dict[str, Path],
    tmp_path: Path,
    convert_lora: Callable[..., None],
    capsys: Any,
) -> None:
    (peft_folder / "notes.txt").touch()
    convert_lora("--input", peft_folder, "--output", tmp_path / "ours", "--base", pristine["diffusers"])
    said = capsys.readouterr().out
    for name, (_, rank, _) in ADAPTERS.items():
        part = "vae" if name == "vae" else "transformer"
        assert f"{name}.safetensors (tsdsr_jax layout, {part}, rank {rank})" in said
    convert_lora("--input", tmp_path / "ours", "--output", tmp_path / "back", "--base", pristine["ours"])
    assert "PEFT layout" in capsys.readouterr().out
    assert files_under(tmp_path / "ours") == files_under(tmp_path / "back")
    for name in ADAPTERS:
        file = f"{name}.safetensors"
        assert set(read_all(tmp_path / "ours" / file)).isdisjoint(read_all(peft_folder / file))
        assert_identical(read_all(tmp_path / "back" / file), read_all(peft_folder / file))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_peft_there_and_back(
    oracle: Any, name: str, pristine: dict[str, Path], tmp_path: Path
) -> None:
    """The script itself; what it exports PEFT loads, and it predicts the same to the last bit."""
    import torch

    kind, rank, _ = ADAPTERS[name]
    targets = {"student": oracle.STUDENT_TARGETS, "aux": oracle.AUX_TARGETS, "vae": oracle.VAE_TARGETS}[kind]
    make = oracle.tiny_vae if kind == "vae" else oracle.tiny_transformer
    overrides = dict(block_out_channels=(16, 16, 32, 32), norm_num_groups=8) if kind == "vae" else {}
    model, fresh = make(1, **overrides), make(1, **overrides)
    getattr(oracle, f"add_{kind}_lora")(model, rank=rank, seed=2)
    files = [tmp_path / folder / f"{name}.safetensors" for folder in ("peft", "ours", "back")]
    oracle.save_lora(model, files[0])
    for source, target in itertools.pairwise(files):
        result = run_script("lora.py", "-i", source, "-o", target.parent, "--base", pristine["diffusers"])
        assert result.returncode == 0, result.stderr
    assert_identical(read_all(files[2]), read_all(files[0]))
    oracle.load_lora_into(fresh, files[2], targets)

    def predict(model: Any) -> np.ndarray:
        with torch.no_grad():
            if kind == "vae":
                image = torch.from_numpy(uniform("image", (1, 3, 32, 32)))
                return model.encode(image).latent_dist.parameters.numpy()
            return model(
                hidden_states=torch.from_numpy(uniform("latents", (1, 16, 8, 8))),
                timestep=torch.tensor([1000.0]),
                encoder_hidden_states=torch.from_numpy(uniform("context", (1, 9, 48))),
                pooled_projections=torch.from_numpy(uniform("pooled", (1, 40))),
            ).sample.numpy()

    np.testing.assert_array_equal(predict(fresh), predict(model))
    assert error(predict(make(1, **overrides)), predict(model)) > 0.01


def test_own_adapter_file_holds_our_tree(
    tmp_path: Path, pristine: dict[str, Path], convert_lora: Callable[..., None]
) -> None:
    """What training saves converts to PEFT as well."""
    adapter = random_lora(CONFIGS["transformer"], lora.STUDENT_TARGETS, 3)
    save_lora(tmp_path / "trained.safetensors", adapter, "transformer")
    convert_lora("-i", tmp_path / "trained.safetensors", "-o", tmp_path / "peft", "--base", pristine["ours"])
    expected = torch_names.write_lora(adapter, CONFIGS["transformer"])
    assert_identical(read_all(tmp_path / "peft" / "trained.safetensors"), expected)
    assert leaves(adapter).keys() == read_all(tmp_path / "trained.safetensors").keys()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapters_are_stored_in_another_type(
    peft_folder: Path,
    pristine: dict[str, Path],
    tmp_path: Path,
    convert_lora: Callable[..., None],
    dtype: str,
) -> None:
    base = ("--base", pristine["diffusers"], "--dtype", dtype)
    convert_lora("-i", peft_folder, "-o", tmp_path / "ours", *base)
    convert_lora("-i", tmp_path / "ours", "-o", tmp_path / "back", "--base", pristine["diffusers"])
    for name in ADAPTERS:
        found, given = (read_all(root / f"{name}.safetensors") for root in (tmp_path / "back", peft_folder))
        assert found.keys() == given.keys()
        for key, tensor in given.items():
            assert str(found[key].dtype) == dtype
            np.testing.assert_array_equal(found[key], tensor.astype(found[key].dtype))


@pytest.mark.parametrize(("factor", "dtype"), [(1.6, "keep"), (-0.5, "float16")])
def test_adapters_are_made_stronger_or_weaker(
    tmp_path: Path,
    peft_folder: Path,
    pristine: dict[str, Path],
    convert_lora: Callable[..., None],
    factor: float,
    dtype: str,
) -> None:
    """B alone is multiplied, in float32, and stored in the file's own type or the one asked for."""
    base = ("--base", pristine["diffusers"])
    convert_lora("-i", peft_folder, "-o", tmp_path / "plain", *base)
    convert_lora(
        "-i", peft_folder, "-o", tmp_path / "scaled", *base, "--lora_scale", str(factor), "--dtype", dtype
    )
    plain, scaled = (read_all(tmp_path / name / "transformer.safetensors") for name in ("plain", "scaled"))
    assert plain.keys() == scaled.keys()
    for name, tensor in plain.items():
        kind = tensor.dtype if dtype == "keep" else np.dtype(dtype)
        wanted = tensor * np.float32(factor) if name.endswith("/b") else tensor
        assert scaled[name].dtype == kind
        np.testing.assert_array_equal(scaled[name], wanted.astype(kind), err_msg=name)
    with pytest.raises(UserError, match="--lora_scale nan: expected a finite number"):
        convert_lora("-i", peft_folder, "-o", tmp_path / "none", *base, "--lora_scale", "nan")


def test_adapters_too_large_for_a_type_are_refused(
    tmp_path: Path, pristine: dict[str, Path], convert_lora: Callable[..., None]
) -> None:
    large = jax.tree.map(lambda leaf: leaf * 1e6, random_lora(CONFIGS["vae"], lora.VAE_ENCODER_TARGETS, 2))
    save_lora(tmp_path / "large.safetensors", large, "vae")
    with pytest.raises(UserError, match=r"large.safetensors: has values outside the range of float16"):
        convert_lora(
            "-i", tmp_path / "large.safetensors", "-o", tmp_path / "out", "--base", pristine["ours"],
            "--dtype", "float16",
        )  # fmt: skip
    assert not (tmp_path / "out" / "large.safetensors").exists()


def damaged_adapter(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    tensors = read_all(folder / "transformer.safetensors")
    change(tensors)
    save_tensors(folder / "damaged.safetensors", tensors)
    return folder / "damaged.safetensors"


Q1 = "transformer.transformer_blocks.1.attn.to_q"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.update({"lora_unet_x.alpha": np.zeros(1)}), "lora_unet_x.alpha"),
        (lambda t: t.pop(f"{Q1}.lora_B.weight"), "missing: transformer_blocks.1.attn.to_q.lora_B.weight"),
        (
            lambda t: t.update({f"{Q1}.lora_A.weight": np.zeros((9, 64), np.float32)}),
            "transformer_blocks.1.attn.to_q.lora_B.weight is (64, 4), expected (64, 9)",
        ),
        (
            lambda t: t.update({"transformer.x.lora_A.weight": np.zeros((4, 8), np.float32)}),
            "unexpected: x.lora_A.weight",
        ),
    ],
    ids=["foreign", "half", "rank", "module"],
)
def test_damaged_adapters_are_refused_by_name(
    peft_folder: Path,
    pristine: dict[str, Path],
    tmp_path: Path,
    convert_lora: Callable[..., None],
    change: Any,
    named: str,
) -> None:
    file = damaged_adapter(peft_folder, change)
    with pytest.raises(UserError) as caught:
        convert_lora("-i", file, "-o", tmp_path / "ours", "--base", pristine["diffusers"])
    assert named in str(caught.value) and str(file) in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_mistakes_with_adapters(
    peft_folder: Path, pristine: dict[str, Path], tmp_path: Path, convert_lora: Callable[..., None]
) -> None:
    base = ("--base", pristine["diffusers"])
    with pytest.raises(
        UserError,
        match=r"transformer_blocks\.0\.attn\.add_k_proj\.lora_A\.weight is \(4, 64\), expected \(4, 1536\)",
    ):
        convert_lora("-i", peft_folder, "-o", tmp_path / "ours")  # without --base: SD3-medium
    with pytest.raises(UserError, match="input and output are the same file"):
        convert_lora("-i", peft_folder, "-o", peft_folder, *base)
    with pytest.raises(UserError, match="nowhere: not found"):
        convert_lora("-i", tmp_path / "nowhere", "-o", tmp_path / "ours", *base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has none of transformer\.safetensors"):
        convert_lora("-i", tmp_path / "empty", "-o", tmp_path / "ours", *base)
    convert_lora("-i", peft_folder, "-o", tmp_path / "ours", *base)
    with pytest.raises(UserError, match="already exists; pass --overwrite"):
        convert_lora("-i", peft_folder, "-o", tmp_path / "ours", *base)
    convert_lora("-i", peft_folder, "-o", tmp_path / "ours", *base, "--overwrite")


def test_a_lora_in_the_other_networks_file_is_refused(tmp_path: Path) -> None:
    """Swapped files would convert without a complaint, and fail much later."""
    shapes = abstract_params(CONFIGS["transformer"])
    adapter = lora.init(jax.random.key(0), shapes, lora.AUXILIARY_TARGETS, 2)
    save_lora(tmp_path / "vae.safetensors", adapter, "transformer")
    with pytest.raises(
        UserError, match="is a LoRA for the transformer, expected one for the vae; are two files"
    ):
        load_lora(tmp_path / "vae.safetensors", CONFIGS["vae"])
