"""LoRA files: reads PEFT's, diffusers' and our own layout, and writes our own.

Reading translates a file's tensor names (`lora_names.py`), compares them with the network's modules, and makes pairs
(`models/lora.py`). The strength (`lora_scaling.py`) is folded into the pairs, so no other code needs to know about alpha.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from tsdsr_jax.errors import UserError, listed
from tsdsr_jax.models import lora as lora_lib
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import Config, Tree, abstract_params
from tsdsr_jax.weights.finite import is_finite, refuse_broken
from tsdsr_jax.weights.lora_names import Names, part_of, understand
from tsdsr_jax.weights.lora_scaling import scalings
from tsdsr_jax.weights.sd3_folder import Part
from tsdsr_jax.weights.tensor_files import TensorReader, TensorSpec, open_tensors, save_tensors
from tsdsr_jax.weights.torch_names import DESCRIBED, Entry, check_names, kernel_entries, lora_entry, to_tree

LORA_FORMAT = "tsdsr_jax.lora"
# A LoRA for another network has hundreds of tensors that do not fit.
_NAMED = 3


class Adapter(NamedTuple):
    """A LoRA as read.

    Attributes:
      tree: pairs of host arrays in the stored dtype; float32 for b if a factor is folded into it.
      factors: the different factors folded in, sorted; (1.0,) if every b is as stored.
      filled: our modules with zeros in place of layers that have a smaller rank or are not adapted.
    """

    tree: Tree
    factors: tuple[float, ...] = (1.0,)
    filled: tuple[str, ...] = ()


def load_lora(path: str | Path, config: Config, model: str = DESCRIBED) -> Tree:
    """Reads the pairs of a LoRA file; see `open_lora`."""
    return open_lora(Path(path), config, model).tree


def open_lora(path: Path, config: Config, model: str = DESCRIBED) -> Adapter:
    """Reads a LoRA in PEFT's layout or ours for the network that `config` describes; messages call the network `model`.

    Raises:
      UserError: the file is missing, damaged, made for another network, not finite, or more than a LoRA.
    """
    if not path.is_file():
        raise UserError(f"{path}: not found; expected LoRA weights there")
    reader = open_tensors(path)
    found, expected = part_of(reader.specs), "transformer" if isinstance(config, MMDiTConfig) else "vae"
    if found != expected:
        raise UserError(
            f"{path}: is a LoRA for the {found}, expected one for the {expected}; are two files swapped?"
        )
    return _read_own(reader, config, model) if is_own_lora(reader) else read_lora(reader, config, model)


def is_own_lora(reader: TensorReader) -> bool:
    """Whether a LoRA file is in our layout rather than PEFT's."""
    return reader.metadata.get("format") == LORA_FORMAT


# --- PEFT's -------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """A module of ours that a file adapts: its path, and each layer's torch module with its rank (0: not adapted)."""

    module: str
    kernel: tuple[int, ...]
    ranks: dict[str, int]

    @property
    def rank(self) -> int:
        return max(self.ranks.values())


def read_lora(reader: TensorReader, config: Config, model: str = DESCRIBED) -> Adapter:
    """Reads an adapter with names like PEFT's.

    Raises:
      UserError: like `open_lora`; the message names a few of the missing, extra and misshapen tensors.
    """
    modules = (name.removesuffix(".weight") for entry in kernel_entries(config) for name in entry.names)
    names = understand(reader.specs, reader.source, modules)
    specs = {name: reader.specs[stored] for name, stored in names.tensors.items()}
    runs = _adapted_runs(specs, config)
    check_names(specs, _expected_shapes(runs, config), reader.source, model, _NAMED)
    ranks = {module: rank for run in runs for module, rank in run.ranks.items() if rank}
    factors = scalings(reader, names, ranks)
    leaves, broken = {}, []
    for run in runs:
        for entry in _pair_entries(run, config):
            leaves[entry.path] = leaf = _gather(entry, reader, names, factors)
            broken += [names.tensors[name] for name in entry.broken(leaf)]
    refuse_broken(reader.source, broken)
    filled = tuple(run.module for run in runs if set(run.ranks.values()) != {run.rank})
    return Adapter(to_tree(leaves.items()), tuple(sorted(set(factors.values()))), filled)


def _adapted_runs(specs: dict[str, TensorSpec], config: Config) -> list[Run]:
    """The network's modules with at least one layer that the file adapts."""
    runs = []
    for entry in kernel_entries(config):
        modules = [name.removesuffix(".weight") for name in entry.names]
        ranks = {module: _rank_of(specs, module) for module in modules}
        if any(ranks.values()):
            runs.append(Run(entry.path.removesuffix("/kernel"), entry.shape, ranks))
    return runs


def _rank_of(specs: dict[str, TensorSpec], module: str) -> int:
    """A torch module's rank, from either half of its pair; 0 if the file has neither."""
    for half, axis in (("A", 0), ("B", 1)):
        spec = specs.get(f"{module}.lora_{half}.weight")
        if spec is not None and len(spec.shape) > axis:
            return spec.shape[axis]
    return 0


def _pair_entries(run: Run, config: Config) -> list[Entry]:
    """The entries of a and b, for the largest rank of the run's layers."""
    shapes = zip(("a", "b"), lora_lib.pair_shapes(run.kernel, run.rank), strict=True)
    return [lora_entry(config, f"{run.module}/{leaf}", shape) for leaf, shape in shapes]


def _expected_shapes(runs: list[Run], config: Config) -> dict[str, tuple[int, ...]]:
    """Plain name -> shape of every tensor that adapts these runs, each layer with its own rank."""
    shapes = {}
    for run in runs:
        for axis, entry in enumerate(_pair_entries(run, config)):  # A is (r, in, ...), B (out, r, ...)
            for name, rank in zip(entry.names, run.ranks.values(), strict=True):
                if rank:
                    shape = entry.torch_shape
                    shapes[name] = (*shape[:axis], rank, *shape[axis + 1 :])
    return shapes


def _gather(entry: Entry, reader: TensorReader, names: Names, factors: dict[str, float]) -> np.ndarray:
    """Reads one half of a pair, multiplies b by its factors, and pads layers of a smaller rank or none with zeros."""
    present = [name for name in entry.names if name in names.tensors]
    on_b = {
        name: factors[name.removesuffix(".lora_B.weight")] for name in present if entry.path.endswith("/b")
    }
    dtypes = {reader.specs[names.tensors[name]].dtype for name in present}
    folded = any(factor != 1 for factor in on_b.values())
    dtype = dtypes.pop() if len(dtypes) == 1 and not folded else np.dtype(np.float32)

    def read(name: str) -> np.ndarray:
        if name not in names.tensors:
            return np.zeros(entry.torch_shape, dtype)
        tensor = reader.read(names.tensors[name])
        if on_b.get(name, 1) != 1:
            with np.errstate(over="ignore"):  # `read_lora` refuses infinities
                tensor = tensor.astype(np.float32) * np.float32(on_b[name])
        missing = [(0, full - size) for full, size in zip(entry.torch_shape, tensor.shape, strict=True)]
        return np.pad(tensor, missing) if np.any(missing) else tensor

    return entry.gather(read, dtype)


# --- ours ---------------------------------------------------------------------------------------------


def _read_own(reader: TensorReader, config: Config, model: str = DESCRIBED) -> Adapter:
    """Reads an adapter in our own layout, in which b includes the factors."""
    check_own(reader, config, model)
    leaves = {name: reader.read(name) for name in sorted(reader.specs)}
    refuse_broken(reader.source, [name for name, leaf in leaves.items() if not is_finite(leaf)])
    return Adapter(to_tree(leaves.items()))


def check_own(reader: TensorReader, config: Config, model: str = DESCRIBED) -> None:
    """Raises UserError, naming the offenders, unless every tensor is half of a pair for one of the network's kernels."""
    shapes = flatten_dict(abstract_params(config), sep="/")
    kernels = {
        path.removesuffix("/kernel"): leaf.shape for path, leaf in shapes.items() if path.endswith("/kernel")
    }
    if not reader.specs:
        raise UserError(f"{reader.source}: holds no tensors; expected a LoRA")
    expected: dict[str, tuple[int, ...]] = {}
    for name, spec in reader.specs.items():
        module, _, half = name.rpartition("/")
        if module not in kernels or half not in ("a", "b") or len(spec.shape) < 2:
            continue
        kernel, rank = kernels[module], spec.shape[-1] if half == "a" else spec.shape[-2]
        for leaf, shape in zip(("a", "b"), lora_lib.pair_shapes(kernel, rank), strict=True):
            expected.setdefault(f"{module}/{leaf}", shape)
    check_names(reader.specs, expected, reader.source, model, _NAMED)


def save_lora(path: Path, lora: Tree, part: Part) -> None:
    """Writes an adapter atomically in our own layout."""
    leaves = {name: np.asarray(leaf) for name, leaf in sorted(flatten_dict(lora, sep="/").items())}
    save_tensors(path, leaves, {"format": LORA_FORMAT, "network": part})


# --- checks before use --------------------------------------------------------------------------------


def check_rank(lora: Tree, rank: int, path: Path, flag: str) -> None:
    """Compares a flag with the adapter's rank, or with the largest one if modules differ.

    Raises:
      UserError: they differ; the message names a module of that rank and the value to pass.
    """
    ranks = lora_lib.modules(lora)
    module, largest = max(ranks.items(), key=lambda pair: pair[1])
    if largest == rank:
        return
    more = f" and {len(ranks) - 1} more modules" if len(ranks) > 1 else ""
    which = f"{module}{more}" if len(set(ranks.values())) == 1 else f"{module}, the largest of its ranks"
    raise UserError(f"{path}: rank {largest} in {which}, but {flag} is {rank}; pass {flag} {largest}")


def check_start(lora: Tree, like: Tree, path: Path) -> None:
    """Checks that training can start from an adapter: it has the modules and ranks of `like`, and no idle pairs.

    Raises:
      UserError: it cannot; the message names the modules.
    """
    found, expected = lora_lib.modules(lora), lora_lib.modules(like)
    if found.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise UserError(
            f"{path}: does not adapt the modules that are trained; missing: {listed(missing, 5) or 'none'}, extra: "
            f"{listed(extra, 5) or 'none'}"
        )
    if others := [f"{module} ({rank})" for module, rank in found.items() if rank != expected[module]]:
        raise UserError(f"{path}: training needs one rank for all modules; different in {listed(others, 5)}")
    if idle := idle_modules(lora):
        raise UserError(
            f"{path}: adapts only some layers of {listed(idle, 5)}, or some with a smaller rank; training could not reach "
            "the rest, so start from a LoRA that adapts all layers equally"
        )


def idle_modules(lora: Tree) -> list[str]:
    """The modules with a component that is zero in both halves, so that neither half gets a gradient."""
    pairs, idle = flatten_dict(lora, sep="/"), []
    for module in lora_lib.modules(lora):
        a, b = np.asarray(pairs[f"{module}/a"]), np.asarray(pairs[f"{module}/b"])
        layers = len(a) if a.ndim == 3 else 1
        used_a = (a != 0).reshape(layers, -1, a.shape[-1]).any(axis=1)
        used_b = (b != 0).reshape(layers, a.shape[-1], -1).any(axis=-1)
        if not (used_a | used_b).all():
            idle.append(module)
    return idle
