"""Learning-rate schedules match diffusers' `get_scheduler` over a whole training run."""

import numpy as np
import pytest

from tsdsr_jax.training.schedules import learning_rate

NAMES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", NAMES)
def test_every_curve_is_that_of_diffusers(name, warmup):
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("diffusers.optimization")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    scheduler = optimization.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=50, num_cycles=3, power=2.0
    )
    expected = []
    for _ in range(51):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    schedule = learning_rate(name, 3e-4, warmup=warmup, steps=50, cycles=3, power=2.0)
    ours = [float(schedule(step)) for step in range(51)]
    # This compares float32 with Python floats. Near a cosine's zero, only the absolute error is meaningful. At a restart,
    # float32 and float64 may fall on different sides of the jump, so steps at jumps are left out.
    differs = ~np.isclose(ours, expected, rtol=1e-5, atol=1e-9)
    jumps = np.abs(np.diff(expected, prepend=expected[0])) > 2e-4
    assert not (differs & ~jumps).any() if name == "cosine_with_restarts" else not differs.any()


def test_the_first_update_of_a_warmed_up_training_has_rate_zero():
    assert float(learning_rate("cosine", 1e-3, warmup=10, steps=100)(0)) == 0
    assert float(learning_rate("constant", 1e-3, warmup=10, steps=100)(0)) == pytest.approx(1e-3)


def test_known_values():
    restarts = learning_rate("cosine_with_restarts", 1.0, warmup=10, steps=110, cycles=2)
    np.testing.assert_allclose(
        [restarts(5), restarts(10), restarts(35), restarts(60), restarts(110)], [0.5, 1, 0.5, 1, 0]
    )
    polynomial = learning_rate("polynomial", 1.0, warmup=0, steps=100, power=2)
    assert float(polynomial(50)) == pytest.approx(0.25, rel=1e-5)
    assert float(polynomial(500)) == pytest.approx(1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_a_curve_stays_where_it_ended(name):
    """diffusers' cosine rises again after the last step; here no schedule does."""
    schedule = learning_rate(name, 1.0, warmup=5, steps=50)
    assert float(schedule(80)) == float(schedule(50))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="cosine_with_restarts"):
        learning_rate("exponential", 1.0, warmup=0, steps=1)
