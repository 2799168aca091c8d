"""LoRA adapters as pytrees, ΔW = A B (PEFT's conventions with alpha = rank).

An adapter mirrors the parameter tree of its network, with a pair in place of each adapted kernel:

    dense  kernel (in, out)          a (in, r)          b (r, out)
    conv   kernel (kh, kw, in, out)  a (kh, kw, in, r)  b (r, out)

Scanned blocks have a leading layer axis on all three. To apply an adapter, pass it as the `lora` collection:
`model.apply({"params": base, "lora": adapter}, ...)`. One base serves any number of adapters in one jitted function.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from tsdsr_jax.models.params import Tree

# Which modules an adapter covers: regular expressions that must match a module's whole path or its last components
# (PEFT's rule: `linear` covers `norm_out/linear` but not `linear_1`).
ATTENTION_TARGETS = (r"to_[qkv]", r"to_out_0", r"add_[qkv]_proj")
STUDENT_TARGETS = (*ATTENTION_TARGETS, "proj", "linear", "proj_out")  # and the teacher's
AUXILIARY_TARGETS = ATTENTION_TARGETS
VAE_ENCODER_TARGETS = (r"encoder/.*",)


def covers(targets: Sequence[str], module: str) -> bool:
    """Whether a target covers the module path, such as `blocks_0/attn/to_q`."""
    return any(re.fullmatch(rf"(.*/)?({target})", module) for target in targets)


def pair_shapes(kernel: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a and b for a kernel; a kernel with three axes is a stack of dense ones."""
    stack = kernel[:1] if len(kernel) == 3 else ()
    return (*kernel[:-1], rank), (*stack, rank, kernel[-1])


def init(key: jax.Array, params: Tree, targets: Sequence[str], rank: int) -> Tree:
    """A new adapter with ΔW = 0: A ~ N(0, 1/rank²), B = 0, in float32 (PEFT's "gaussian").

    Args:
      key: PRNG key.
      params: the network's parameters, or their shapes (`jax.eval_shape`).
      targets: module patterns, for example `STUDENT_TARGETS`.
      rank: r ≥ 1.

    Raises:
      ValueError: no module matches, or the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"a LoRA needs a rank of at least 1, not {rank}")
    kernels = {path[:-1]: leaf for path, leaf in flatten_dict(params).items() if path[-1] == "kernel"}
    chosen = {path: leaf.shape for path, leaf in kernels.items() if covers(targets, "/".join(path))}
    if not chosen:
        raise ValueError(f"no module matches the LoRA targets {tuple(targets)}")
    pairs = {}
    for index, (path, shape) in enumerate(sorted(chosen.items())):
        a_shape, b_shape = pair_shapes(shape, rank)
        a = jax.random.normal(jax.random.fold_in(key, index), a_shape, jnp.float32) / rank
        pairs[(*path, "a")], pairs[(*path, "b")] = a, jnp.zeros(b_shape, jnp.float32)
    return unflatten_dict(pairs)


def scale(lora: Tree, factor: float | jax.Array) -> Tree:
    """Multiplies an adapter's ΔW by `factor`."""
    pairs = flatten_dict(lora)
    return unflatten_dict({path: leaf * factor if path[-1] == "b" else leaf for path, leaf in pairs.items()})


def merge(params: Tree, lora: Tree, factor: float = 1.0) -> Tree:
    """Adds factor·A B to the kernels in float32, and casts each result to its kernel's dtype.

    Leaves without a pair are not copied.

    Raises:
      ValueError: the parameters lack a module of the adapter, or its kernel has another shape.
    """
    merged, pairs = flatten_dict(params), flatten_dict(lora)
    for path in {path[:-1] for path in pairs}:
        kernel, a, b = merged.get((*path, "kernel")), pairs[(*path, "a")], pairs[(*path, "b")]
        if kernel is None or kernel.shape != (*a.shape[:-1], b.shape[-1]):
            found = "no such module" if kernel is None else f"its kernel is {kernel.shape}"
            raise ValueError(
                f"the LoRA adapts {'/'.join(path)} with a {a.shape} and b {b.shape}, but {found}"
            )
        merged[(*path, "kernel")] = merge_kernel(kernel, a, b, factor)
    return unflatten_dict(merged)


def merged_share(params: Tree, merged: Tree, lora: Tree) -> float:
    """How much of an adapter's ΔW is in merged kernels: 1 if nothing was lost when they were rounded to their dtype.

    It is the projection of what merging changed on A B, over all kernels. Steps of bfloat16 are 2⁻⁸ of a weight, so that
    much of a small ΔW is rounded away.
    """
    before, after, pairs = flatten_dict(params), flatten_dict(merged), flatten_dict(lora)
    found = [
        _projection(
            before[(*path, "kernel")], after[(*path, "kernel")], pairs[(*path, "a")], pairs[(*path, "b")]
        )
        for path in {path[:-1] for path in pairs}
    ]
    kept, wanted = (sum(float(value) for value in values) for values in zip(*found, strict=True))
    return kept / wanted if wanted else 1.0


@jax.jit
def _projection(
    before: jax.Array, after: jax.Array, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    delta = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    change = after.astype(jnp.float32) - before.astype(jnp.float32)
    return (change * delta).sum(), jnp.square(delta).sum()


@partial(jax.jit, static_argnames=("factor", "dtype"))
def merge_kernel(
    kernel: jax.Array, a: jax.Array, b: jax.Array, factor: float = 1.0, dtype: DTypeLike | None = None
) -> jax.Array:
    """kernel + factor·A B, computed in float32 and cast to `dtype`; None: the kernel's."""
    # Highest precision: GPUs would otherwise round these float32 products to TF32.
    delta = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + factor * delta).astype(dtype or kernel.dtype)


def pair_of(leaves: Mapping[str, Any], path: str) -> tuple[Any, Any] | None:
    """The pair (a, b) for the kernel at `path`, or None; `leaves` is an adapter flattened with "/"."""
    module = path.removesuffix("/kernel")
    if module == path or f"{module}/a" not in leaves:
        return None
    return leaves[f"{module}/a"], leaves[f"{module}/b"]


def modules(lora: Tree) -> dict[str, int]:
    """The adapted module paths and their ranks."""
    pairs = flatten_dict(lora, sep="/")
    return {path[: -len("/a")]: leaf.shape[-1] for path, leaf in pairs.items() if path.endswith("/a")}
