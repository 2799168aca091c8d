"""The transformer's parameters with an array per layer, in place of stacks of layers."""

from __future__ import annotations

from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from tsdsr_jax.models.mmdit import MMDiT, MMDiTConfig
from tsdsr_jax.models.params import Tree


def by_layer(config: MMDiTConfig, tree: Tree) -> Tree:
    """Gives each layer its own arrays, `layers_0`, `layers_1`, ..., in place of the stacks `blocks_0`, ...

    Args:
      tree: parameters or an adapter of a scanned `MMDiT`. Stacks without a pair of an adapter may be missing.
    """
    made = {name: part for name, part in tree.items() if not name.startswith("blocks_")}
    for run, (first, length, _) in enumerate(config.runs()):
        if (stack := tree.get(f"blocks_{run}")) is None:
            continue
        # One `split`, whose gradient is one concatenation; each slice's would be a stack of zeros.
        parts = jax.tree.map(lambda leaf, length=length: jax.lax.split(leaf, [1] * length), stack)
        for layer in range(length):
            made[f"layers_{first + layer}"] = jax.tree.map(
                lambda leaf, layer=layer: leaf[layer][0],
                parts,
                is_leaf=lambda leaf: isinstance(leaf, list | tuple),
            )
    return made


def variables(model: MMDiT, params: Tree, adapter: Tree) -> dict[str, Tree]:
    """What `model.apply` takes: parameters as the model has them, and an adapter in stacks, or {}."""
    if not model.scanned:
        # Rounded before they are taken apart, so that not every layer's are rounded by themselves.
        rounded = jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf).astype(model.dtype), adapter)
        leaves = flatten_dict(by_layer(model.config, adapter))
        for path, leaf in flatten_dict(by_layer(model.config, rounded)).items():
            leaves[(*path[:-1], f"{path[-1]}_rounded")] = leaf
        adapter = unflatten_dict(leaves)
    return {"params": params, "lora": adapter}


def take_apart(config: MMDiTConfig, params: Tree) -> Tree:
    """Like `by_layer` for arrays on devices; empties `params`, so that no more than one stack is in memory twice."""
    made: dict[str, Any] = {name: params.pop(name) for name in list(params) if not name.startswith("blocks_")}
    for run, (first, length, _) in enumerate(config.runs()):
        leaves = flatten_dict(params.pop(f"blocks_{run}"))
        layers: list[dict[Any, jax.Array]] = [{} for _ in range(length)]
        for path in list(leaves):
            for layer, part in zip(layers, _parts(leaves.pop(path)), strict=True):
                layer[path] = part
        made |= {f"layers_{first + index}": unflatten_dict(layer) for index, layer in enumerate(layers)}
    return made


def _parts(stack: jax.Array) -> list[jax.Array]:
    """The layers of a stack, sharded as it is."""
    where = stack.sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
    return list(jax.jit(_unstacked, out_shardings=where)(stack))


def _unstacked(stack: jax.Array) -> list[jax.Array]:
    return [stack[index] for index in range(stack.shape[0])]
