"""LPIPS weights: torchvision's and the lpips package's names → this library's parameters, and our own file.

torchvision has the network (`features.0.weight`), the lpips package the lin layers (`lin0.model.1.weight`). The state
dict of the package's whole module (`net.slice1.0.weight`, `lin0.model.1.weight`) can be read, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from tsdsr_jax.errors import UserError, first_line
from tsdsr_jax.git_lfs import refuse_pointer
from tsdsr_jax.hints import command
from tsdsr_jax.models.lpips import LPIPS, SLICES, Network, minimum_side
from tsdsr_jax.models.params import Tree
from tsdsr_jax.weights.finite import refuse_broken
from tsdsr_jax.weights.tensor_files import TensorSpec, open_tensors, save_tensors
from tsdsr_jax.weights.torch_names import Entry, Transform, check_names, to_tree

FORMAT = "tsdsr_jax.lpips"
TORCHVISION_FILES: dict[Network, str] = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}


class LpipsLayout(NamedTuple):
    """The layout of one kind of file.

    Attributes:
      what: its content in words, with a placeholder `{network}`.
      rules: (our path, torch name): a regular expression for the whole path and its replacement.
      ignored: a regular expression for the names of tensors that LPIPS does not use; the file need not have them.
    """

    what: str
    rules: tuple[tuple[str, str], ...]
    ignored: str


_NOTHING = r"(?!)"
_LIN_RULE = (r"(lin\d)", r"\1.model.1.weight")

TORCHVISION = LpipsLayout(
    "torchvision's network for {network}",
    ((r"slice\d_(\d+)/kernel", r"features.\1.weight"), (r"slice\d_(\d+)/bias", r"features.\1.bias")),
    ignored=r"classifier\.\d\.(weight|bias)",
)
LIN = LpipsLayout("the lpips package's lin layers for {network}", (_LIN_RULE,), ignored=_NOTHING)
PACKAGE = LpipsLayout(
    "the lpips package's LPIPS over {network}",
    (
        (r"(slice\d)_(\d+)/kernel", r"net.\1.\2.weight"),
        (r"(slice\d)_(\d+)/bias", r"net.\1.\2.bias"),
        _LIN_RULE,
    ),
    # Copies of the lin layers, and constants that models/lpips.py has itself.
    ignored=r"lins\.\d\.model\.1\.weight|scaling_layer\.(shift|scale)",
)
OWN = LpipsLayout("LPIPS over {network}", ((r".+", r"\g<0>"),), ignored=_NOTHING)

_SAME = Transform(lambda x: x, lambda x: x)
_CONV = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
_LIN = Transform(lambda x: x.reshape(-1), lambda x: x.reshape(1, -1, 1, 1))


@lru_cache
def param_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    side = minimum_side(network)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    params = jax.eval_shape(LPIPS(network).init, jax.random.key(0), image, image)["params"]
    return {path: leaf.shape for path, leaf in sorted(flatten_dict(params, sep="/").items())}


def entries(network: Network, layout: LpipsLayout) -> list[Entry]:
    """The entries of the parameters that this kind of file holds."""
    found = []
    for path, shape in param_shapes(network).items():
        matches = [match.expand(name) for rule, name in layout.rules if (match := re.fullmatch(rule, path))]
        if len(matches) > 1:
            raise AssertionError(f"{len(matches)} rules for {path}")
        transform = _SAME
        if layout is not OWN:
            transform = _CONV if path.endswith("/kernel") else _LIN if path.startswith("lin") else _SAME
        for name in matches:
            torch_shape = transform.to_torch(np.broadcast_to(np.float32(0), shape)).shape
            found.append(Entry(path, shape, False, (name,), torch_shape, transform))
    return found


class Tensors(NamedTuple):
    """The tensors of one file, whatever its format."""

    source: Path
    specs: Mapping[str, TensorSpec]
    read: Callable[[str], np.ndarray]


def read_leaves(tensors: Tensors, network: Network, layout: LpipsLayout) -> dict[str, np.ndarray]:
    """Reads all parameters in a file of this kind: path -> float32 array.

    Raises:
      UserError: tensors are missing, extra, misshapen or not finite, and the message names all of them; or they belong to
        the other network.
    """
    found = {name: spec for name, spec in tensors.specs.items() if not re.fullmatch(layout.ignored, name)}
    needed = entries(network, layout)
    try:
        _check(found, network, layout, tensors.source)
    except UserError:
        for other in set(SLICES) - {network}:
            if _fits(found, other, layout):
                raise UserError(
                    f"{tensors.source}: these are the weights for {other}, not {network}; pass --network {other}, or the"
                    f" file for {network}"
                ) from None
        raise
    leaves = {entry.path: entry.gather(tensors.read, np.dtype(np.float32)) for entry in needed}
    refuse_broken(tensors.source, [name for entry in needed for name in entry.broken(leaves[entry.path])])
    return leaves


def _check(found: Mapping[str, TensorSpec], network: Network, layout: LpipsLayout, source: object) -> None:
    expected = {entry.names[0]: entry.torch_shape for entry in entries(network, layout)}
    check_names(found, expected, source, layout.what.format(network=network))


def _fits(found: Mapping[str, TensorSpec], network: Network, layout: LpipsLayout) -> bool:
    try:
        _check(found, network, layout, "")
    except UserError:
        return False
    return True


def read_torch_lpips(network: Network, backbone: Path, lin: Path | None = None) -> Tree:
    """Reads LPIPS's parameters from PyTorch's files, `.pth` or safetensors.

    Args:
      network: the network that the files belong to.
      backbone: torchvision's file, or the state dict of the lpips package's whole module.
      lin: the package's file of lin layers; None if `backbone` is the whole module.

    Raises:
      UserError: a file is missing, damaged or does not fit, torch is needed but not installed, or `lin` is missing or not
        needed.
    """
    opened = _open_torch_file(backbone, network)
    if any(name.startswith("net.slice") for name in opened.specs):
        if lin is not None:
            raise UserError(f"{backbone}: holds the lin layers, too; leave out --lin {lin}")
        return to_tree(read_leaves(opened, network, PACKAGE).items())
    leaves = read_leaves(opened, network, TORCHVISION)
    if lin is None:
        raise UserError(
            f"{backbone}: has no lin layers; pass the lpips package's weights/v0.1/{network}.pth as --lin"
        )
    leaves |= read_leaves(_open_torch_file(lin, network), network, LIN)
    return to_tree(leaves.items())


def _open_torch_file(path: Path, network: Network) -> Tensors:
    """Opens a safetensors file, or, with torch, a `.pth` file in its zip or old format.

    Raises:
      UserError: the file is missing or damaged, holds anything but named tensors, or torch is needed but not installed.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: {'is a folder' if path.is_dir() else 'not found'}; {how_to_get_lpips(network)}"
        )
    if path.suffix == ".safetensors":
        reader = open_tensors(path)
        return Tensors(path, reader.specs, reader.read)
    refuse_pointer(path)
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: reading it needs torch: pip install 'tsdsr_jax[convert]' (safetensors files do not)"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make torch raise almost anything
        raise UserError(
            f"{path}: not a readable file of torch.save ({first_line(error)}); it may be truncated, download it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a state dict, tensors by name; check that it is the right file")
    # As float32, the type of our parameters, because NumPy has no bfloat16.
    arrays = {str(name): tensor.detach().float().numpy() for name, tensor in state.items()}
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}
    return Tensors(path, specs, arrays.__getitem__)


def how_to_get_lpips(network: Network, output: Path | None = None) -> str:
    """Says where the weights come from, and gives the command that makes our file of them."""
    backbone, output = TORCHVISION_FILES[network], output or Path(f"lpips_{network}.safetensors")
    flags = {"network": network, "backbone": backbone, "lin": f"{network}.pth", "output": output}
    return (
        f"LPIPS is made from two files: torchvision's {backbone} (https://download.pytorch.org/models/{backbone})"
        f" and the lin layers, lpips/weights/v0.1/{network}.pth of https://github.com/richzhang/PerceptualSimilarity."
        f" With both in this folder, run\n  {command('convert/lpips.py', **flags)}"
    )


def save_lpips(path: Path, network: Network, params: Tree) -> None:
    """Writes our own file atomically."""
    leaves = {name: np.asarray(leaf) for name, leaf in sorted(flatten_dict(params, sep="/").items())}
    save_tensors(path, leaves, {"format": FORMAT, "network": network})


def load_lpips(path: Path) -> tuple[Network, Tree]:
    """Reads a file that `convert/lpips.py` wrote, for `LPIPS(network).apply({"params": params}, first, second)`.

    Returns:
      (network, params): "alex" or "vgg", and float32 host arrays.

    Raises:
      UserError: the file is missing (the message says how to get it), damaged, or of another kind.
    """
    guess: Network = "vgg" if "vgg" in path.name.lower() else "alex"
    if not path.is_file():
        raise UserError(
            f"{path}: {'is a folder' if path.is_dir() else 'not found'}; {how_to_get_lpips(guess, path)}"
        )
    reader = open_tensors(path)
    network = reader.metadata.get("network")
    if reader.metadata.get("format") != FORMAT or network not in SLICES:
        raise UserError(f"{path}: not a file that convert/lpips.py wrote; {how_to_get_lpips(guess)}")
    tensors = Tensors(path, reader.specs, reader.read)
    return network, to_tree(read_leaves(tensors, network, OWN).items())
