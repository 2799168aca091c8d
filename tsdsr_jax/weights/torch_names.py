"""PyTorch (diffusers, PEFT) names and layouts ↔ this library's parameter trees, both ways.

One table per network maps Flax modules to torch modules and says how their tensors are laid out. Everything else follows:
`abstract_params` lists the parameters from the config, each entry knows its torch tensors, one per scanned layer, and each
torch tensor must be used exactly once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tsdsr_jax.devices import cores
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import Config, Tree, abstract_params
from tsdsr_jax.weights.finite import is_finite
from tsdsr_jax.weights.tensor_files import TensorReader, TensorSpec, TensorStream

# What messages call a network by default.
DESCRIBED = "the model its config.json describes"


class Rule(NamedTuple):
    """Flax modules (a regular expression for the whole path) and their torch name (`{layer}`: the block's index)."""

    module: str
    torch: str
    layout: str


MMDIT_RULES = (
    Rule(r"pos_embed", r"pos_embed", "table"),
    Rule(r"pos_embed/proj", r"pos_embed.proj", "patch"),
    Rule(r"time_text_embed/(\w+)/(linear_[12])", r"time_text_embed.\1.\2", "dense"),
    Rule(r"context_embedder|proj_out", r"\g<0>", "dense"),
    Rule(r"norm_out/linear", r"norm_out.linear", "dense"),
    Rule(r"blocks_\d+/(norm1|norm1_context)/linear", r"transformer_blocks.{layer}.\1.linear", "dense"),
    Rule(
        r"blocks_\d+/(attn2?)/(to_[qkv]|add_[qkv]_proj|to_add_out)",
        r"transformer_blocks.{layer}.\1.\2",
        "dense",
    ),
    Rule(r"blocks_\d+/(attn2?)/to_out_0", r"transformer_blocks.{layer}.\1.to_out.0", "dense"),
    Rule(r"blocks_\d+/(attn2?)/(norm_\w+)", r"transformer_blocks.{layer}.\1.\2", "norm"),
    Rule(r"blocks_\d+/(ff|ff_context)/net_0/proj", r"transformer_blocks.{layer}.\1.net.0.proj", "dense"),
    Rule(r"blocks_\d+/(ff|ff_context)/net_2", r"transformer_blocks.{layer}.\1.net.2", "dense"),
)

_SIDE = r"(encoder|decoder)"
VAE_RULES = (
    Rule(rf"{_SIDE}/(conv_in|conv_out)", r"\1.\2", "conv"),
    Rule(rf"{_SIDE}/conv_norm_out", r"\1.conv_norm_out", "norm"),
    Rule(rf"{_SIDE}/(down|up)_blocks_(\d)/resnets_(\d)/(conv\w+)", r"\1.\2_blocks.\3.resnets.\4.\5", "conv"),
    Rule(rf"{_SIDE}/(down|up)_blocks_(\d)/resnets_(\d)/(norm\d)", r"\1.\2_blocks.\3.resnets.\4.\5", "norm"),
    Rule(rf"{_SIDE}/(down|up)_blocks_(\d)/(\w+samplers)_0/conv", r"\1.\2_blocks.\3.\4.0.conv", "conv"),
    Rule(rf"{_SIDE}/mid_block/resnets_(\d)/(conv\d)", r"\1.mid_block.resnets.\2.\3", "conv"),
    Rule(rf"{_SIDE}/mid_block/resnets_(\d)/(norm\d)", r"\1.mid_block.resnets.\2.\3", "norm"),
    Rule(rf"{_SIDE}/mid_block/attentions_0/(to_[qkv])", r"\1.mid_block.attentions.0.\2", "dense"),
    Rule(rf"{_SIDE}/mid_block/attentions_0/to_out_0", r"\1.mid_block.attentions.0.to_out.0", "dense"),
    Rule(rf"{_SIDE}/mid_block/attentions_0/group_norm", r"\1.mid_block.attentions.0.group_norm", "norm"),
)

# Our leaf name -> torch's.
_BASE_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "table": "pos_embed"}
_LORA_LEAVES = {"a": "lora_A.weight", "b": "lora_B.weight"}


# Side of the tiles that are transposed one at a time.
TILE = 128
# Layers read at a time; meanwhile each takes twice its memory.
THREADS = min(8, cores())


class Transform(NamedTuple):
    """Converts one layer's tensor from torch's layout, and back."""

    from_torch: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _transform(layout: str, leaf: str, patch: int) -> Transform:
    """The conversion of a leaf in a module with this layout."""
    if leaf in ("bias", "scale"):
        return Transform(_same, _same)
    if leaf == "table":  # (1, P·P, D)
        return Transform(
            lambda x: x.reshape(int(x.shape[1] ** 0.5), -1, x.shape[2]),
            lambda x: x.reshape(1, -1, x.shape[2]),
        )
    if layout == "dense":  # kernel, a and b: (out, in)
        return Transform(np.transpose, np.transpose)
    if leaf == "b":  # of a convolution: (out, r, 1, 1)
        return Transform(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
    if layout == "conv":  # (out, in, kh, kw)
        return Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
    # The patch embedding, a (out, C, p, p) convolution in torch and a linear map of (p, p, C) patches here.
    return Transform(
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x: x.reshape(patch, patch, -1, x.shape[1]).transpose(3, 2, 0, 1),
    )


class Entry(NamedTuple):
    """A leaf of a parameter or adapter tree, and the torch tensors that it consists of.

    Attributes:
      path: `blocks_0/attn/to_q/kernel`.
      shape: of the leaf, with a leading layer axis if `stacked`.
      names: torch names without prefix, one per layer, or a single one.
      torch_shape: shape of each torch tensor.
      transform: between one torch tensor and one of our layers.
    """

    path: str
    shape: tuple[int, ...]
    stacked: bool
    names: tuple[str, ...]
    torch_shape: tuple[int, ...]
    transform: Transform

    def stored_dtype(self, specs: Mapping[str, TensorSpec]) -> np.dtype:
        """The common dtype of its torch tensors; float32 if layers differ, so that stacking loses nothing."""
        dtypes = {specs[name].dtype for name in self.names}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def gather(self, read: Callable[[str], np.ndarray], dtype: np.dtype) -> np.ndarray:
        """Builds the leaf from its torch tensors."""
        leaf = np.empty(self.shape, dtype)

        def fill(layer: np.ndarray, name: str) -> None:
            copy_into(layer, self.transform.from_torch(read(name)))

        if not self.stacked:
            fill(leaf, *self.names)
            return leaf
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fill, leaf, self.names))
        return leaf

    def scatter(self, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(torch name, tensor) of each layer."""
        layers = leaf if self.stacked else [leaf]
        for name, layer in zip(self.names, layers, strict=True):
            tensor = self.transform.to_torch(layer)
            made = np.empty(tensor.shape, tensor.dtype)
            copy_into(made, tensor)
            yield name, made

    def broken(self, leaf: np.ndarray) -> list[str]:
        """The torch names of the layers that have a NaN or an infinity."""
        if is_finite(leaf):
            return []
        layers = leaf if self.stacked else [leaf]
        return [name for name, layer in zip(self.names, layers, strict=True) if not is_finite(layer)]


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source. Copies transposed matrices in tiles that fit the cache, six times as fast as NumPy alone."""
    if source.ndim != 2 or source.flags.c_contiguous:
        target[...] = source
        return
    for row in range(0, source.shape[0], TILE):
        for column in range(0, source.shape[1], TILE):
            tile = slice(row, row + TILE), slice(column, column + TILE)
            target[tile] = source[tile]


def _locate(config: Config, module: str) -> tuple[Rule, tuple[str, ...]]:
    """A Flax module's rule and torch names, one per layer."""
    rules = MMDIT_RULES if isinstance(config, MMDiTConfig) else VAE_RULES
    matches = [(rule, match) for rule in rules if (match := re.fullmatch(rule.module, module))]
    if len(matches) != 1:
        raise AssertionError(f"{len(matches)} rules, not one, for {module}")
    rule, match = matches[0]
    template = match.expand(rule.torch)
    run = re.match(r"blocks_(\d+)/", module)
    if run is None:
        return rule, (template,)
    assert isinstance(config, MMDiTConfig)
    first, length, _ = config.runs()[int(run[1])]
    return rule, tuple(template.replace("{layer}", str(first + index)) for index in range(length))


def _entry(config: Config, path: str, shape: tuple[int, ...], leaves: Mapping[str, str]) -> Entry:
    module, leaf = path.rsplit("/", 1)
    rule, names = _locate(config, module)
    transform = _transform(rule.layout, leaf, getattr(config, "patch_size", 1))
    stacked = module.startswith("blocks_")
    # A zero-stride array has a shape to permute but takes no memory.
    torch_shape = transform.to_torch(np.broadcast_to(np.float32(0), shape[stacked:])).shape
    return Entry(
        path, shape, stacked, tuple(f"{name}.{leaves[leaf]}" for name in names), torch_shape, transform
    )


def base_entries(config: Config) -> list[Entry]:
    """The entries of all parameters of a network."""
    shapes = flatten_dict(abstract_params(config), sep="/")
    return [_entry(config, path, leaf.shape, _BASE_LEAVES) for path, leaf in sorted(shapes.items())]


def kernel_entries(config: Config) -> list[Entry]:
    """The entries of the kernels, which adapters can change."""
    return [entry for entry in base_entries(config) if entry.path.endswith("/kernel")]


def lora_entry(config: Config, path: str, shape: tuple[int, ...]) -> Entry:
    """The entry of an adapter's leaf, a or b, with PEFT's tensors."""
    return _entry(config, path, shape, _LORA_LEAVES)


def check_names(
    found: Mapping[str, TensorSpec],
    expected: Mapping[str, tuple[int, ...]],
    source: object,
    model: str = DESCRIBED,
    most: int | None = None,
) -> None:
    """Compares the tensors found with those expected.

    Raises:
      UserError: tensors are missing, extra or misshapen; the message names all of them, or at most this many of each kind.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {found[name].shape}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != tuple(shape)
    ]
    if not (missing or extra or misshapen):
        return
    if not set(found) & set(expected):
        some = ", ".join(list(found)[:3]) or "none"
        raise UserError(
            f"{source}: not one tensor belongs to {model} (first tensors: {some}); "
            "is this another kind of checkpoint?"
        )
    groups = [
        (title, names)
        for title, names in (("missing", missing), ("unexpected", extra), ("wrong shape", misshapen))
        if names
    ]
    counts = ", ".join(f"{len(names)} {title}" for title, names in groups)
    lines = [f"{source}: does not fit {model} ({counts})"]
    for title, names in groups:
        lines += [f"  {title}: {name}" for name in names[:most]]
        lines += [f"  and {len(names) - most} more"] if most is not None and len(names) > most else []
    raise UserError("\n".join(lines))


def check_base_tensors(reader: TensorReader, config: Config) -> None:
    """Raises UserError, naming every offending tensor, unless a torch checkpoint fits the config."""
    expected = {name: entry.torch_shape for entry in base_entries(config) for name in entry.names}
    check_names(reader.specs, expected, reader.source)


def read_base(reader: TensorReader, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """Reads a torch checkpoint, one leaf at a time: (path, array in the stored dtype).

    Raises:
      UserError: the tensors do not fit the config; raised before the first leaf is read.
    """
    check_base_tensors(reader, config)
    return (
        (entry.path, entry.gather(reader.read, entry.stored_dtype(reader.specs)))
        for entry in base_entries(config)
    )


def base_specs(reader: TensorReader, config: Config) -> dict[str, TensorSpec]:
    """Shapes and dtypes of what `read_base` yields, in the same order."""
    return {
        entry.path: TensorSpec(entry.shape, entry.stored_dtype(reader.specs))
        for entry in base_entries(config)
    }


def write_base(params: Tree, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the torch tensors of a parameter tree one at a time: (name, array)."""
    leaves = flatten_dict(params, sep="/")
    for entry in base_entries(config):
        yield from entry.scatter(np.asarray(leaves[entry.path]))


def base_tensors(params: Tree, config: Config) -> TensorStream:
    """What `write_base` yields, made while it is written."""
    leaves = flatten_dict(params, sep="/")
    specs = {
        name: TensorSpec(entry.torch_shape, np.dtype(leaves[entry.path].dtype))
        for entry in base_entries(config)
        for name in entry.names
    }
    return TensorStream(specs, partial(write_base, params, config))


def write_lora(lora: Tree, config: Config, prefix: str = "transformer.") -> dict[str, np.ndarray]:
    """The tensors of an adapter, with the names and layouts that PEFT loads."""
    return {
        prefix + name: tensor
        for path, leaf in sorted(flatten_dict(lora, sep="/").items())
        for name, tensor in lora_entry(config, path, leaf.shape).scatter(np.asarray(leaf))
    }


def to_tree(leaves: Iterable[tuple[str, Any]]) -> Tree:
    """(path, leaf) pairs -> a nested tree."""
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in leaves})
