"""Parameters that come to the device part by part are those that come all at once."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity import leaves, random_lora, random_params
from tiny_checkpoint import save_network
from tsdsr_jax.errors import UserError
from tsdsr_jax.models import lora
from tsdsr_jax.models.folded import parts_of
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import Config
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.weights import streaming
from tsdsr_jax.weights.sd3_folder import PARAMS_FILE, NetworkFiles, Part
from tsdsr_jax.weights.streaming import AHEAD, load_parts
from tsdsr_jax.weights.tensor_files import TensorReader, write_tensors

CONFIGS: dict[Part, Config] = {
    "transformer": MMDiTConfig.tiny(num_layers=5, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "vae": VAEConfig.tiny(),
}
TARGETS = {"transformer": lora.STUDENT_TARGETS, "vae": lora.VAE_ENCODER_TARGETS}


def network(folder: Path, part: Part, converted: bool, dtype: Any = np.float32) -> NetworkFiles:
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), random_params(CONFIGS[part]))
    save_network(folder / part, CONFIGS[part], params)
    files = NetworkFiles(folder / part, part)
    if converted:
        write_tensors(folder / part / PARAMS_FILE, files.specs, files.leaves())
        files = NetworkFiles(folder / part, part)
    assert files.is_converted == converted
    return files


@pytest.mark.parametrize("converted", [False, True], ids=["diffusers", "converted"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("part", CONFIGS)
def test_equal_to_loading_all_at_once(tmp_path: Path, part: Part, adapted: bool, converted: bool) -> None:
    """In float32 bit for bit."""
    files = network(tmp_path, part, converted)
    adapter = random_lora(CONFIGS[part], TARGETS[part], rank=4) if adapted else None
    whole = files.load(jnp.float32, adapter, 0.7)
    config = files.config
    expected = list(parts_of(config, whole)) if isinstance(config, MMDiTConfig) else [whole]
    counted: list[int] = []
    found = list(load_parts(files, jnp.asarray, adapter, 0.7, progress=counted.append))
    assert len(found) == len(expected) == len(counted)
    for ours, theirs in zip(map(leaves, found), map(leaves, expected), strict=True):
        assert ours.keys() == theirs.keys()
        for path, leaf in ours.items():
            np.testing.assert_array_equal(leaf, theirs[path], err_msg=path)
    assert sum(counted) == sum(leaf.size for leaf in jax.tree.leaves(whole))


@pytest.mark.parametrize("part", CONFIGS)
def test_dtypes(tmp_path: Path, part: Part) -> None:
    """As stored and float32 where merged; or all the same."""
    files = network(tmp_path, part, False, np.float16)
    adapter = random_lora(CONFIGS[part], TARGETS[part], rank=4)
    adapted = {f"{module.split('/', 1)[-1]}/kernel" for module in lora.modules(adapter)}
    adapted |= {f"{module}/kernel" for module in lora.modules(adapter)}
    for tree in load_parts(files, jnp.asarray, adapter):
        for path, leaf in leaves(tree).items():
            assert leaf.dtype == (np.float32 if path in adapted else np.float16), path
    for tree in load_parts(files, jnp.asarray, adapter, dtype=jnp.float16):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype(np.float16)}


def test_no_more_is_read_than_a_few_parts_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = network(tmp_path, "transformer", False)
    read: list[str] = []
    whole = TensorReader.read
    monkeypatch.setattr(TensorReader, "read", lambda self, name: (read.append(name), whole(self, name))[1])
    parts = load_parts(files, jnp.asarray)
    for layer in range(-1, 5):  # first what is outside the blocks
        next(parts)
        begun = {int(name.split(".")[1]) for name in read if name.startswith("transformer_blocks.")}
        assert max(begun) <= layer + AHEAD
    parts.close()


def test_files_that_shrink(tmp_path: Path) -> None:
    files = network(tmp_path, "vae", False)
    files.specs  # noqa: B018
    (file,) = (tmp_path / "vae").glob("*.safetensors")
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(UserError, match=r"ends within .*was it replaced"):
        list(streaming.load_parts(files, jnp.asarray))
