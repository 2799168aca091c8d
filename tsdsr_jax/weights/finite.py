"""Checks that tensors are finite, and that they stay so when cast: a NaN in a weight would spread to every result."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from tsdsr_jax.errors import UserError, listed

# Values checked at a time: few enough that intermediate results stay in a core's cache.
CHUNK = 1 << 19
# A number is NaN or infinite if all bits of its exponent are set. NumPy's isfinite converts these two types to float32,
# at 1.2 to 1.7 GB/s on one core; testing the bits reaches 8 to 15.
_EXPONENTS = {
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
}

# What `--dtype` of the conversion scripts calls the types that tensors are stored in.
STORED_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


def is_finite(array: np.ndarray) -> bool:
    """Whether all values are finite."""
    if np.issubdtype(array.dtype, np.integer):
        return True
    values, exponent = array.reshape(-1), _EXPONENTS.get(array.dtype)
    chunks = (values[start : start + CHUNK] for start in range(0, values.size, CHUNK))
    if exponent is None:
        return all(np.isfinite(chunk).all() for chunk in chunks)
    return all((chunk.view(np.uint16) & exponent).max() < exponent for chunk in chunks)


def refuse_broken(source: object, broken: Sequence[str]) -> None:
    """Raises UserError if there are broken tensors, and names them."""
    if broken:
        count = f"{len(broken)} tensors" if len(broken) > 1 else "1 tensor"
        raise UserError(
            f"{source}: has values that are NaN or infinite in {count}: {listed(broken, 10)}; "
            "download or save it again"
        )


def cast_finite(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Casts a tensor, layer by layer.

    Raises:
      UserError: a finite value would become infinite.
    """
    if array.dtype == dtype:
        return array
    result = np.empty(array.shape, dtype)
    # Through float32 because NumPy cannot cast between float16 and bfloat16.
    for target, source in zip(np.atleast_2d(result), np.atleast_2d(array), strict=True):
        wide = source.astype(np.float32)
        with np.errstate(over="ignore"):
            target[...] = wide
        if (np.isfinite(wide) & ~np.isfinite(target.astype(np.float32))).any():
            raise UserError(
                f"{name}: has values outside the range of {dtype}; choose --dtype bfloat16 or float32"
            )
    return result
