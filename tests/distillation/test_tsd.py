"""The losses match their formulas in NumPy, with simple functions as networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tsdsr_jax.distillation.tsd import (
    LARGEST_TERM,
    TSDConfig,
    auxiliary_loss,
    sample_weights,
    trajectory,
    tsd_gradient,
    tsd_loss,
)
from tsdsr_jax.models import flow
from tsdsr_jax.models.guidance import Text, guided
from tsdsr_jax.training.optimizer import INITIAL_SCALE

SHAPE = (3, 4, 6, 2)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(weight: float):
    """A "network" whose output depends nonlinearly on the latent, and on each sample's own timestep."""
    return lambda x, t: jnp.tanh(weight * x) + x * (t / 1000)[:, None, None, None]


def test_the_schedule_has_1000_shifted_levels_and_no_zero():
    levels = flow.sigmas()
    assert levels.shape == (1000,) and levels.dtype == np.float32
    assert levels[0] == 1 and levels[-1] == pytest.approx(3 * 0.001 / 1.002)
    assert levels[500] == pytest.approx(0.75)
    assert (np.diff(levels) < 0).all()


def test_the_schedule_is_that_of_diffusers():
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    # The quotients are rounded differently.
    np.testing.assert_allclose(flow.sigmas(), scheduler.sigmas.numpy()[:1000], rtol=2e-7)
    np.testing.assert_allclose(flow.timesteps(flow.sigmas()), scheduler.timesteps.numpy(), rtol=2e-7)


def test_noising_and_the_clean_prediction_are_inverse():
    clean, noise, sigma = normal(0), normal(1), jnp.asarray([1.0, 0.4, 0.003])
    noisy = flow.add_noise(clean, noise, sigma)
    np.testing.assert_allclose(flow.to_clean(noisy, noise - clean, sigma), clean, atol=1e-6)
    following = jnp.asarray([0.5, 0.1, 0.0])
    np.testing.assert_allclose(
        flow.euler_step(noisy, noise - clean, sigma, following),
        flow.add_noise(clean, noise, following),
        atol=1e-6,
    )


def test_trajectories_are_each_samples_own_and_end_with_the_schedule():
    index, bias = jnp.asarray([50, 300, 949, 790]), jnp.asarray([0, 24, 0, -25])
    expected = [
        [50, 100, 150, 200, 250],
        [300, 356, 412, 468, 524],
        [949, 961, 974, 986, 999],
        [790, 833, 877, 921, 965],
    ]
    np.testing.assert_array_equal(trajectory(index, bias, 4, 50), expected)
    # Without DASM and bias, the next point is one stride ahead.
    np.testing.assert_array_equal(trajectory(index, bias * 0, 1, 50)[:, 1], [100, 350, 999, 840])


def test_trajectories_are_linspace_truncated():
    generator = np.random.default_rng(0)
    index, bias = generator.integers(50, 950, 500), generator.integers(-25, 25, 500)
    ends = np.minimum(index + 200 + bias, 999)
    expected = np.linspace(index, ends, 5).astype(int).T
    np.testing.assert_array_equal(trajectory(jnp.asarray(index), jnp.asarray(bias), 4, 50), expected)


def reference_gradient(fake, real, noise, index, bias, config):
    """Follows the definition, sample by sample and point by point, in float64."""
    teacher, auxiliary = (
        (lambda weight: lambda x, t: np.tanh(weight * x) + x * (t / 1000))(0.7),
        (lambda x, t: np.tanh(0.3 * x) + x * (t / 1000)),
    )
    levels = 3 * (s := (1000 - np.arange(1000)) / 1000) / (1 + 2 * s)
    result = np.zeros(fake.shape)
    for b in range(len(fake)):
        points = len(config.point_weights)
        grid = np.linspace(
            index[b], min(index[b] + config.stride * points + bias[b], 999), points + 1
        ).astype(int)
        x, y = ((1 - levels[grid[0]]) * clean[b] + levels[grid[0]] * noise[b] for clean in (fake, real))
        for n, weight in enumerate(config.point_weights):
            sigma, following = levels[grid[n]], levels[grid[n + 1]]
            vt_x, vt_y, va_x = teacher(x, 1000 * sigma), teacher(y, 1000 * sigma), auxiliary(x, 1000 * sigma)
            result[b] += (
                sigma**2 * weight * (config.balance * (vt_x - va_x) + (1 - config.balance) * (vt_x - vt_y))
            )
            x, y = x - (sigma - following) * va_x, y - (sigma - following) * vt_y
    return result


@pytest.mark.parametrize(
    "config", [TSDConfig(), TSDConfig().without_dasm(), TSDConfig(balance=0.2, stride=20)]
)
def test_the_gradient_is_the_definition(config):
    fake, real, noise = normal(0), normal(1), normal(2)
    index, bias = np.asarray([50, 400, 949]), np.asarray([3, -25, 24])
    ours = tsd_gradient(
        fake, real, noise, jnp.asarray(index), jnp.asarray(bias), network(0.7), network(0.3),
        jnp.asarray(flow.sigmas()), config,
    )[0]  # fmt: skip
    expected = reference_gradient(fake, real, noise, index, bias, config)
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


def test_a_sample_does_not_depend_on_the_others_in_its_batch():
    fake, real, noise = normal(0), normal(1), normal(2)
    index, bias = jnp.asarray([50, 400, 949]), jnp.asarray([3, -25, 24])
    rest = network(0.7), network(0.3), jnp.asarray(flow.sigmas()), TSDConfig()
    together = tsd_gradient(fake, real, noise, index, bias, *rest)[0]
    alone = tsd_gradient(fake[1:2], real[1:2], noise[1:2], index[1:2], bias[1:2], *rest)[0]
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-5, atol=1e-6)


def test_identical_latents_and_networks_give_no_gradient():
    fake, noise = normal(0), normal(2)
    index = jnp.asarray([50, 400, 949])
    same = network(0.7), network(0.7), jnp.asarray(flow.sigmas()), TSDConfig()
    assert not np.any(tsd_gradient(fake, fake, noise, index, index * 0, *same)[0])


def test_non_finite_predictions_do_not_spread_and_are_counted():
    broken = lambda x, t: network(0.3)(x, t).at[0, 0, 0, 0].set(jnp.nan)  # noqa: E731
    index = jnp.asarray([50, 400, 949])
    gradient, replaced = tsd_gradient(
        normal(0),
        normal(1),
        normal(2),
        index,
        index * 0,
        network(0.7),
        broken,
        jnp.asarray(flow.sigmas()),
        TSDConfig(),
    )
    assert np.isfinite(gradient).all()
    # One value at each of the four points, and no others.
    assert replaced == 4 and np.count_nonzero(np.asarray(gradient) == 0) == 1


@pytest.mark.parametrize("value", [np.inf, -np.inf, 3e38, -2e6])
@pytest.mark.parametrize("config", [TSDConfig(), TSDConfig().without_dasm()])
def test_an_infinite_teacher_is_capped_so_that_its_square_is_finite_and_is_counted(value, config):
    broken = lambda x, t: network(0.7)(x, t).at[0, 0, 0, 0].set(value)  # noqa: E731
    index = jnp.asarray([50, 400, 949])
    gradient, replaced = tsd_gradient(
        normal(0),
        normal(1),
        normal(2),
        index,
        index * 0,
        broken,
        network(0.3),
        jnp.asarray(flow.sigmas()),
        config,
    )
    assert replaced >= 1
    assert abs(float(gradient[0, 0, 0, 0])) == LARGEST_TERM * len(config.point_weights)
    assert np.isfinite(float(tsd_loss(jnp.asarray(normal(0)), gradient)))
    # The other samples get the same as from a teacher that is not broken.
    sound, none = tsd_gradient(
        normal(0),
        normal(1),
        normal(2),
        index,
        index * 0,
        network(0.7),
        network(0.3),
        jnp.asarray(flow.sigmas()),
        config,
    )
    assert none == 0
    np.testing.assert_array_equal(gradient[1:], sound[1:])


def test_a_capped_value_survives_float16s_loss_scale():
    """At the latent size of a 512×512 photograph; float16's maximum is 65504."""
    fake = jnp.zeros((1, 64, 64, 16))
    gradient = fake.at[0, 0, 0, 0].set(4 * LARGEST_TERM)
    slope = jax.grad(lambda fake: INITIAL_SCALE * tsd_loss(fake, gradient))(fake)
    assert 0 < float(slope.max()) < 65504 / 10


def test_the_loss_passes_the_gradient_on_exactly():
    fake, gradient = jnp.asarray(normal(0)), jnp.asarray(1e-4 * normal(1))
    value, slope = jax.value_and_grad(tsd_loss)(fake, gradient)
    np.testing.assert_allclose(value, 0.5 * np.mean(np.square(np.asarray(gradient, np.float64))), rtol=1e-6)
    np.testing.assert_allclose(slope, gradient / gradient.size, rtol=1e-6)
    assert np.abs(slope).max() > 0


def test_no_gradient_flows_through_the_networks():
    def loss(fake):
        index = jnp.asarray([50, 400, 949])
        gradient, _ = tsd_gradient(
            fake,
            normal(1),
            normal(2),
            index,
            index * 0,
            network(0.7),
            network(0.3),
            jnp.asarray(flow.sigmas()),
            TSDConfig(),
        )
        return gradient.sum()

    assert not np.any(jax.grad(loss)(jnp.asarray(normal(0))))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_guidance_combines_both_texts_of_each_sample(split, scale):
    def toy(x, t, text):
        return (
            x * t[:, None, None, None]
            + text.pooled[:, None, None, :]
            + text.states.sum((1, 2))[:, None, None, None]
        )

    prompt, null = (Text(normal(s, (2, 5, 3)), normal(s + 1, (2, 2))) for s in (10, 20))
    x, t = normal(0, (4, 3, 3, 2)), jnp.asarray([1.0, 2.0, 3.0, 4.0])  # fake, real, fake, real
    twice = [Text(*(np.repeat(part, 2, axis=0) for part in text)) for text in (prompt, null)]
    with_prompt, without = (toy(x, t, text) for text in twice)
    expected = without + scale * (with_prompt - without)
    np.testing.assert_allclose(guided(toy, prompt, null, scale, split)(x, t), expected, rtol=1e-5, atol=1e-4)


def test_the_auxiliary_loss_weighs_each_sample_by_its_own_error():
    fake, noise = normal(0), normal(1)
    sigma, weight = np.float32([0.9, 0.5, 0.1]), np.float32([0.0, 2.0, 5.0])
    noisy = (1 - sigma[:, None, None, None]) * fake + sigma[:, None, None, None] * noise
    clean = noisy - sigma[:, None, None, None] * np.asarray(network(0.3)(noisy, 1000 * sigma))
    expected = np.mean(0.5 * weight * np.square(clean - fake).mean((1, 2, 3)))
    ours = auxiliary_loss(fake, noise, jnp.asarray(sigma), jnp.asarray(weight), network(0.3))
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    slope = jax.grad(
        lambda f: auxiliary_loss(f, noise, jnp.asarray(sigma), jnp.asarray(weight), network(0.3))
    )
    assert not np.any(slope(jnp.asarray(fake)))


def test_the_three_weightings():
    sigma, draws, uniform = jnp.asarray([0.9, 0.01]), jnp.asarray([0.0, 2.0]), jnp.asarray([0.0, 0.25])
    logistic = sample_weights("logit_normal", sigma, draws, uniform, logit_mean=1.0, logit_std=0.5)
    np.testing.assert_allclose(logistic, 1 / (1 + np.exp([-1.0, -2.0])), rtol=1e-6)
    np.testing.assert_allclose(
        sample_weights("sigma_sqrt", sigma, draws, uniform), [0.9**-2, 0.01**-2], rtol=1e-5
    )
    mode = sample_weights("mode", sigma, draws, uniform)
    np.testing.assert_allclose(mode, [1, 0.75 - 1.29 * (np.cos(np.pi / 8) ** 2 - 0.75)], rtol=1e-5)
    with pytest.raises(ValueError, match="logit_normal, sigma_sqrt and mode"):
        sample_weights("cosine", sigma, draws, uniform)
