"""Distances between images; the tests of the losses that use them compare them with PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

from tsdsr_jax.training.pixels import gradient_distance


def test_gradients_are_compared_at_three_scales():
    """A ramp differs from a constant at every scale, a checkerboard only at the finest."""
    ramp = np.broadcast_to(np.arange(16.0)[None, :, None, None], (1, 16, 16, 1))
    assert float(gradient_distance(ramp, 0 * ramp)) == pytest.approx((1 + 2 + 4) / 3)
    board = (np.indices((16, 16)).sum(0) % 2).astype(np.float32)[None, ..., None]
    assert float(gradient_distance(board, 0 * board)) == pytest.approx(2 / 3)
