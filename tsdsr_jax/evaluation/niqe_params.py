"""NIQE's model of natural photographs, read from the files of BasicSR, pyiqa or the MATLAB release."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
from scipy import io

from tsdsr_jax.errors import UserError, first_line
from tsdsr_jax.git_lfs import refuse_pointer

FEATURES = 36  # 18 at each of two scales
# Names in BasicSR's files and in those of the MATLAB release.
_NAMES = {"mean": ("mu_pris_param", "mu_prisparam"), "covariance": ("cov_pris_param", "cov_prisparam")}


@dataclasses.dataclass(frozen=True, eq=False)
class PristineModel:
    """The distribution of features of natural photographs.

    Attributes:
      mean: (36,) float64.
      covariance: (36, 36) float64.
    """

    mean: np.ndarray
    covariance: np.ndarray


def load_pristine(path: Path) -> PristineModel:
    """Reads BasicSR's `niqe_pris_params.npz`, or `niqe_modelparameters.mat` of pyiqa and of the MATLAB release.

    Raises:
      UserError: the file is missing, damaged, or of another kind.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'is a folder' if os.path.isdir(path) else 'not found'}; {_how_to_get()}")
    try:
        stored = io.loadmat(path) if path.suffix.lower() == ".mat" else _load_archive(path)
    except Exception as error:  # the readers share no error class for other files
        refuse_pointer(path)
        raise UserError(
            f"{path}: not a file of NIQE's parameters ({first_line(error)}); {_how_to_get()}"
        ) from None
    arrays = {}
    for key, names in _NAMES.items():
        name = next((name for name in names if name in stored), None)
        if name is None:
            raise UserError(
                f"{path}: not a file of NIQE's parameters (no {' or '.join(names)}); {_how_to_get()}"
            )
        arrays[key] = np.asarray(stored[name], np.float64)
    shapes = arrays["mean"].size, arrays["covariance"].shape
    if shapes != (FEATURES, (FEATURES, FEATURES)):
        raise UserError(
            f"{path}: {shapes[0]} means and a covariance of {shapes[1]}; expected 36 and (36, 36)"
        )
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise UserError(f"{path}: has values that are not finite; get the file again")
    return PristineModel(arrays["mean"].ravel(), arrays["covariance"])


def _load_archive(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def _how_to_get() -> str:
    """Where the parameters come from."""
    return (
        "--niqe_params takes niqe_pris_params.npz of BasicSR (in TSD-SR's repository as basicsr/metrics/), or"
        " niqe_modelparameters.mat of pyiqa"
    )
