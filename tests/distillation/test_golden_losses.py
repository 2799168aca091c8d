"""A training step's losses and all adapter gradients against stored answers of PyTorch + PEFT
(support/golden_losses.py writes them); needs no torch."""

import golden_losses as golden


def test_losses_and_gradients():
    golden.check()
