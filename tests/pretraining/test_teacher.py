"""The flow-matching loss and its gradients match PyTorch + PEFT; its draws; and the training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import tiny_checkpoint as tiny
from parity import error, lora_of, nhwc, params_of
from tsdsr_jax.data.record import Record
from tsdsr_jax.models import flow
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.mmdit import MMDiT
from tsdsr_jax.models.params import abstract_params
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.pretraining.teacher import (
    FlowBase,
    FlowConfig,
    FlowDraws,
    FlowLoss,
    joined,
    new_adapter,
    new_transformer_params,
    split_fixed,
)
from tsdsr_jax.training.batch import encode, text_of
from tsdsr_jax.training.optimizer import OptimizerConfig
from tsdsr_jax.training.step import NETWORK, Trainer, objective_of
from tsdsr_jax.weights.torch_names import write_base, write_lora

pytest_plugins = "parity"
TOLERANCE = 1e-4


def problem(size: tuple[int, int], batch: int, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    return dict(
        latents=normal(batch, 16, *size), noise=normal(batch, 16, *size), index=generator.integers(0, 1000, batch),
        dropped=np.arange(batch) % 2 == 1, states=normal(batch, 7, 48), pooled=normal(batch, 40),
        null_states=normal(1, 7, 48), null_pooled=normal(1, 40),
    )  # fmt: skip


def loss_and_gradient(loss: FlowLoss, trained, frozen, data):
    base = FlowBase(frozen, {}, Text(data["null_states"], data["null_pooled"]))
    draws = FlowDraws(nhwc(data["noise"]), jnp.asarray(data["index"]), jnp.asarray(data["dropped"]))
    text = Text(data["states"], data["pooled"])
    function = jax.jit(
        jax.value_and_grad(lambda trained: loss(trained, base, nhwc(data["latents"]), text, draws))
    )
    return function(trained)


@pytest.mark.parametrize(("size", "batch"), [((4, 4), 1), ((4, 6), 3)])
@pytest.mark.parametrize("what", ["lora", "base"])
def test_loss_and_gradients_are_pytorchs(oracle, what, size, batch):
    """Gradients of the LoRA, or of all weights, differ by at most 1e-4 of each tensor's largest value."""
    torch = pytest.importorskip("torch")
    import oracle_training

    transformer = oracle.tiny_transformer(1)
    params = params_of(transformer)
    if what == "lora":
        oracle.add_student_lora(transformer, 4, 5, adapter="teacher")
        transformer.set_adapter("teacher")
        trained, frozen = lora_of(oracle, transformer, "teacher"), params
    else:
        trained, frozen = split_fixed(params)
    config = tiny.tiny_mmdit_config().__class__.from_dict(dict(transformer.config))
    loss = FlowLoss(MMDiT(config), None, FlowConfig(), adapter=what == "lora")
    data = problem(size, batch, 3)
    value, gradient = loss_and_gradient(loss, trained, frozen, data)

    parts = {
        name: torch.from_numpy(array) for name, array in data.items() if name not in ("index", "dropped")
    }
    named = {
        name: parameter for name, parameter in transformer.named_parameters()
        if ("lora_" in name) == (what == "lora")
    }  # fmt: skip
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(name in named)
    texts = oracle_training.TorchText(parts["states"], parts["pooled"])
    null = oracle_training.TorchText(parts["null_states"], parts["null_pooled"])
    if what == "lora":
        total = oracle_training.flow_loss(
            transformer,
            "teacher",
            parts["latents"],
            parts["noise"],
            data["index"],
            data["dropped"],
            texts,
            null,
        )
    else:
        transformer.disable_adapters = lambda: None  # it never had any
        total = oracle_training.flow_loss(
            transformer, None, parts["latents"], parts["noise"], data["index"], data["dropped"], texts, null
        )
    slopes = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    assert float(value) == pytest.approx(total.item(), rel=1e-5)
    if what == "lora":
        ours = write_lora(gradient, config, prefix="")
        theirs = {name.replace(".teacher.", "."): slope for name, slope in zip(named, slopes, strict=True)}
    else:
        ours = dict(write_base(joined(gradient, jax.tree.map(jnp.zeros_like, frozen)), config))
        ours.pop("pos_embed.pos_embed")
        theirs = dict(zip(named, slopes, strict=True))
    assert ours.keys() == theirs.keys()
    for name, slope in theirs.items():
        if slope is None or not slope.abs().max() > 1e-9:
            # An unused query of the last block's text, or a bias that cancels in a softmax.
            assert np.abs(ours[name]).max() < 1e-6, name
        else:
            assert error(ours[name], slope.numpy()) < TOLERANCE, name


# --- draws ----------------------------------------------------------------------------------------


def test_noise_levels_are_logit_normal_in_the_schedules_index():
    config = FlowConfig(logit_mean=0.4, logit_std=0.8, prompt_dropout=0.25)
    draws = FlowDraws.from_key(jax.random.key(0), (20_000, 1, 1, 4), config)
    index = np.asarray(draws.index)
    assert index.min() >= 0 and index.max() <= 999
    uniform = (index + 0.5) / 1000
    logits = np.log(uniform / (1 - uniform))
    assert abs(logits.mean() - 0.4) < 0.02 and abs(logits.std() - 0.8) < 0.02
    assert abs(np.asarray(draws.dropped).mean() - 0.25) < 0.01
    noise = np.asarray(draws.noise)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    # SD3's distribution is symmetric around the middle of the schedule, σ = 0.75.
    middle = np.median(
        np.asarray(FlowDraws.from_key(jax.random.key(1), (20_000, 1, 1, 1), FlowConfig()).index)
    )
    assert flow.sigmas()[int(middle)] == pytest.approx(0.75, abs=0.01)


def test_samples_without_texts_get_the_default_prompt():
    default = Text(jnp.ones((1, 5, 12)), jnp.ones((1, 10)))
    hr = np.full((2, 16, 16, 3), 255, np.uint8)
    for record in (
        Record(None, hr, None, None, None),
        Record(None, None, np.ones((2, 2, 2, 16)), None, None),
    ):
        text = text_of(record, default)
        assert (
            text.states.shape == (2, 5, 12)
            and text.pooled.shape == (2, 10)
            and bool((text.states == 1).all())
        )
        with pytest.raises(ValueError, match="need the default prompt"):
            text_of(record, None)
    own = Text(np.zeros((2, 5, 12)), np.zeros((2, 10)))
    assert float(jnp.abs(text_of(Record(None, hr, None, *own), default).states).max()) == 0


# --- the step -------------------------------------------------------------------------------------


def tiny_step(adapter: bool, dynamic: bool = False, **config):
    mmdit_config, vae_config = tiny.tiny_mmdit_config(), tiny.tiny_vae_config()
    params, vae = tiny.random_params(mmdit_config, 1), tiny.random_params(vae_config, 2)
    loss = FlowLoss(MMDiT(mmdit_config), AutoencoderKL(vae_config), FlowConfig(), adapter)
    optimizer = OptimizerConfig(schedule="constant", **config)
    trainer = Trainer(objective_of(loss.of_batch), optimizer, {NETWORK: 1e-2}, dynamic_scale=dynamic)
    trained, frozen = (
        (new_adapter(abstract_params(mmdit_config), 2, jax.random.key(0)), params)
        if adapter
        else split_fixed(params)
    )
    null = tiny.random_prompt(mmdit_config, 5)
    base = FlowBase(frozen, vae, Text(null.prompt[None], null.pooled[None]))
    return trainer, trainer.init({NETWORK: trained}), base


def tiny_batch(parts: int, batch: int, latents: bool = True) -> Record:
    generator = np.random.default_rng(0)
    text = (
        generator.standard_normal((parts, batch, 5, 12)).astype(np.float32),
        generator.standard_normal((parts, batch, 10)).astype(np.float32),
    )
    if latents:
        return Record(
            None, None, generator.standard_normal((parts, batch, 4, 4, 16)).astype(np.float32), *text
        )
    return Record(None, generator.integers(0, 256, (parts, batch, 32, 32, 3), np.uint8), None, *text)


def test_each_step_has_its_own_draws():
    """With constant weights, only the draws change from step to step, and they depend on the step's number."""
    trainer, state, base = tiny_step(True)
    batch, step = tiny_batch(1, 2), jax.jit(trainer.step)
    still = state._replace(trained=jax.tree.map(jnp.zeros_like, state.trained))
    losses = [
        float(step(still._replace(step=jnp.int32(number)), base, batch, jax.random.key(0))[1]["flow"])
        for number in (0, 1, 2, 1)
    ]
    assert len(set(losses)) == 3 and losses[1] == losses[3]


def test_the_average_and_the_loss_scale_are_exact():
    """After one step, the average matches its formula, and a scaled loss gives the same gradient up to rounding."""
    trainer, state, base = tiny_step(True, ema_decay=0.75)
    batch, key = tiny_batch(1, 2), jax.random.key(0)
    after, metrics = jax.jit(trainer.step)(state, base, batch, key)
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, state.trained, after.trained)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.ema, expected)
    scaled, scaled_state, _ = tiny_step(True, dynamic=True)
    _, scaled_metrics = jax.jit(scaled.step)(scaled_state, base, batch, key)
    assert float(scaled_state.loss_scale.value) == 65536
    for name in ("flow", "gradient_norm"):
        assert float(scaled_metrics[name]) == pytest.approx(float(metrics[name]), rel=1e-5)


# With an adapter (10 s) it passed on 2026-11-26.
@pytest.mark.parametrize("adapter", [pytest.param(True, marks=pytest.mark.slow), False])
def test_training_on_one_batch_lowers_its_loss(adapter):
    trainer, state, base = tiny_step(adapter, ema_decay=0.5)
    batch, step = tiny_batch(2, 2), jax.jit(trainer.step)
    before, losses = state, []
    for _ in range(30):
        state, metrics = step(state, base, batch, jax.random.key(0))
        losses.append(float(metrics["flow"]))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    trained = state.trained[NETWORK]
    moved = {
        path for (path, new), old in zip(
            flatten_dict(trained, sep="/").items(), flatten_dict(before.trained[NETWORK]).values(), strict=True
        ) if (np.asarray(new) != old).any()
    }  # fmt: skip
    assert len(moved) > 0.9 * len(flatten_dict(trained))
    assert "pos_embed/table" not in flatten_dict(trained, sep="/")
    average = flatten_dict(state.averaged(), sep="/")
    assert all(leaf.shape == average[path].shape for path, leaf in flatten_dict(trained, sep="/").items())
    assert int(state.step) == 30 and int(state.bad_steps) == 0


def test_accumulated_parts_are_averaged():
    """The loss and the gradient are the mean of those of each part alone, with its own draws."""
    trainer, state, base = tiny_step(True)
    batch = tiny_batch(2, 2)
    _, metrics = jax.jit(trainer.step)(state, base, batch, jax.random.key(3))
    key = jax.random.fold_in(jax.random.key(3), 0)
    of_part = jax.jit(trainer.gradients)
    alone = [
        of_part(state, base, jax.tree.map(lambda leaf, p=part: leaf[p], batch), jax.random.fold_in(key, part))
        for part in range(2)
    ]
    assert float(metrics["flow"]) == pytest.approx(
        np.mean([float(each["flow"]) for _, each in alone]), rel=1e-5
    )
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(gradient for gradient, _ in alone))
    assert float(metrics["gradient_norm"]) == pytest.approx(float(optax.global_norm(mean)), rel=1e-5)


def test_photographs_are_encoded_to_a_sample_of_the_posterior():
    config = tiny.tiny_vae_config()
    network, params = AutoencoderKL(config), tiny.random_params(config, 2)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 48, 3)).astype(np.float32)
    posterior = network.apply({"params": params}, images, method="encode")
    np.testing.assert_allclose(
        encode(network, params, images, None), posterior.mean * config.scaling_factor, rtol=1e-6
    )
    key = jax.random.key(7)
    noise = jax.random.normal(key, posterior.mean.shape)
    expected = posterior.sample(noise) * config.scaling_factor
    np.testing.assert_allclose(encode(network, params, images, key), expected, rtol=1e-6)


def test_photographs_are_encoded_in_the_step():
    trainer, state, base = tiny_step(True)
    images = tiny_batch(1, 2, latents=False)
    _, metrics = jax.jit(trainer.step)(state, base, images, jax.random.key(0))
    assert np.isfinite(float(metrics["flow"])) and float(metrics["gradient_norm"]) > 0


def test_a_step_that_is_not_finite_changes_nothing_but_counters():
    trainer, state, base = tiny_step(True, dynamic=True)
    batch = tiny_batch(1, 2)
    broken = batch._replace(latent_hr=batch.latent_hr * np.float32(np.inf))
    after, metrics = jax.jit(trainer.step)(state, base, broken, jax.random.key(0))
    assert int(after.bad_steps) == 1 and float(after.loss_scale.value) == float(state.loss_scale.value) / 2
    jax.tree.map(np.testing.assert_array_equal, after.trained, state.trained)
    jax.tree.map(np.testing.assert_array_equal, after.optimizer, state.optimizer)
    assert float(metrics["update_norm"]) == 0


@pytest.mark.parametrize(("optimizer", "branch"), [("adamw", True), ("adamw", False), ("muon", True)])
def test_an_update_that_is_not_finite_changes_nothing_but_counters(optimizer, branch, monkeypatch):
    """The gradients are finite, but the optimizer makes NaN of them, as with an epsilon of 0."""
    config = OptimizerConfig(schedule="constant", optimizer=optimizer, ema_decay=0.9)
    sound = config.transformation

    def broken(self, peak):
        return optax.chain(sound(peak), optax.scale(np.inf), optax.scale(0.0))

    monkeypatch.setattr(OptimizerConfig, "transformation", broken)
    loss = lambda trained, base, batch, key: (jnp.square(trained["kernel"] - batch).sum(), {})  # noqa: E731
    trainer = Trainer(objective_of(loss), config, {NETWORK: 1e-2}, dynamic_scale=True, branch=branch)
    state = trainer.init({NETWORK: {"kernel": np.ones((3, 4), np.float32)}})
    after, metrics = jax.jit(trainer.step)(state, {}, np.zeros((1, 3, 4), np.float32), jax.random.key(0))
    assert float(metrics["gradient_norm"]) > 0 and float(metrics["update_norm"]) == 0
    assert int(after.bad_steps) == 1 and float(after.loss_scale.value) == float(state.loss_scale.value) / 2
    for name in ("trained", "optimizer", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))


def test_a_new_network_is_the_identity_with_zero_output():
    config = tiny.tiny_mmdit_config()
    params = new_transformer_params(config, jax.random.key(0))
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, abstract_params(config))
    leaves = flatten_dict(params, sep="/")
    zero = {path for path, leaf in leaves.items() if path.endswith("kernel") and not np.abs(leaf).any()}
    assert zero == {path for path in leaves if "/linear/kernel" in path or path == "proj_out/kernel"} and zero
    velocity = MMDiT(config).apply(
        {"params": params}, jnp.ones((1, 4, 6, 16)), jnp.ones(1), jnp.ones((1, 5, 12)), jnp.ones((1, 10))
    )
    assert float(jnp.abs(velocity).max()) == 0
