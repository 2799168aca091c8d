"""A training step's losses and all adapter gradients match stored results of PyTorch + PEFT; needs no torch.

support/golden_losses.py writes these results.
"""

import golden_losses as golden


def test_losses_and_gradients():
    golden.check()
