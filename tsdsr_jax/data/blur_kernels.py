"""Blur kernels of the second-order degradation (Real-ESRGAN, Wang et al. 2021, §3; constants from SeeSR's script).

A kernel of odd side k is a function on the integer grid v = (x, y) centered at 0, of the squared Mahalanobis distance
m = vᵀ Σ⁻¹ v with Σ = U diag(σx², σy²) Uᵀ, divided by its sum:

    Gaussian                exp(−m / 2)
    generalized Gaussian    exp(−m^β / 2)
    plateau                 1 / (1 + m^β)

or ω·J₁(ω r) / (2π r), the low-pass filter of a disc in frequency space, which has negative lobes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.special import j1

Shape = Literal["gaussian", "generalized", "plateau"]


def mahalanobis(size: int, sigma_x: float, sigma_y: float, angle: float) -> np.ndarray:
    """m on the grid, (size, size) float64; rows are y, columns x."""
    half = size // 2
    x, y = np.meshgrid(np.arange(-half, half + 1.0), np.arange(-half, half + 1.0))
    along = np.cos(angle) * x + np.sin(angle) * y
    across = -np.sin(angle) * x + np.cos(angle) * y
    return np.square(along / sigma_x) + np.square(across / sigma_y)


def blur_kernel(
    shape: Shape,
    size: int,
    sigma_x: float,
    sigma_y: float | None = None,
    angle: float = 0.0,
    beta: float = 1.0,
) -> np.ndarray:
    """One kernel, (size, size) float64 with sum 1.

    Args:
      shape: which of the three functions.
      size: side, odd.
      sigma_x, sigma_y: deviations along the axes turned by `angle`; sigma_y None means isotropic.
      angle: in radians.
      beta: exponent of the generalized Gaussian and the plateau.
    """
    m = mahalanobis(size, sigma_x, sigma_x if sigma_y is None else sigma_y, angle)
    values = {
        "gaussian": lambda: np.exp(-m / 2),
        "generalized": lambda: np.exp(-(m**beta) / 2),
        "plateau": lambda: 1 / (1 + m**beta),
    }[shape]()
    return values / values.sum()


def sinc_kernel(size: int, cutoff: float) -> np.ndarray:
    """The ideal circular low-pass filter, (size, size) float64 with sum 1.

    Args:
      size: side, odd.
      cutoff: ω in radians per pixel, up to π.
    """
    half = size // 2
    axis = np.arange(-half, half + 1.0)
    radius = np.hypot(axis[:, None], axis[None])
    radius[half, half] = 1
    values = cutoff * j1(cutoff * radius) / (2 * np.pi * radius)
    values[half, half] = cutoff**2 / (4 * np.pi)
    return values / values.sum()


def pulse(size: int) -> np.ndarray:
    """The identity kernel."""
    kernel = np.zeros((size, size))
    kernel[size // 2, size // 2] = 1
    return kernel
