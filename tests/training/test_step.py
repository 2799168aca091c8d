"""The step around the losses: optimizers, clipping, accumulation, loss scale, skipped steps. Toy losses, exact answers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tsdsr_jax.data.record import Record
from tsdsr_jax.distillation.losses import Student
from tsdsr_jax.training.optimizer import OptimizerConfig
from tsdsr_jax.training.schedules import learning_rate
from tsdsr_jax.training.step import Beginning, Step, Trainer

KEY = jax.random.key(0)
CONSTANT = OptimizerConfig(schedule="constant", max_grad_norm=0.5)
RATES = {"student": 1e-2, "auxiliary": 3e-3}


def toy_gradients(parts, base, batch, key, moment):
    """Student: mean (x·(w + u) − y)²; auxiliary: mean (x·a − y)², where x is lr and y is hr."""
    scale = moment.scale

    def student_loss(student):
        return scale * jnp.mean(
            jnp.square(batch.lr * (student.transformer["w"] + student.vae["u"]) - batch.hr)
        )

    def auxiliary_loss(auxiliary):
        return scale * jnp.mean(jnp.square(batch.lr * auxiliary["a"] - batch.hr))

    mse, student = jax.value_and_grad(student_loss)(parts["student"])
    return {"student": student, "auxiliary": jax.grad(auxiliary_loss)(parts["auxiliary"])}, {
        "mse": mse / scale
    }


def toy_trainer(config: OptimizerConfig = CONSTANT, **more: Any) -> Trainer:
    return Trainer(toy_gradients, config, RATES, **more)


def start() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    w, u, a = (generator.standard_normal(3).astype(np.float32) for _ in range(3))
    return {"student": Student({"w": w}, {"u": u}), "auxiliary": {"a": a}}


def batches(seed: int, parts: int = 1, batch: int = 4) -> Record:
    generator = np.random.default_rng(seed)
    x, y = (generator.standard_normal((parts, batch, 2, 2, 3)).astype(np.float32) for _ in range(2))
    return Record(x, 3 * y, None, None, None)


def run(trainer: Trainer, steps: int, make=batches):
    state, step = trainer.init(start()), jax.jit(trainer.step, donate_argnums=0)
    history = []
    for index in range(steps):
        state, metrics = step(state, {}, make(index), KEY)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


@pytest.mark.parametrize("schedule", ["constant", "cosine_with_restarts"])
def test_updates_are_those_of_torchs_adamw_with_clipping(schedule):
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(CONSTANT, schedule=schedule, warmup=2, steps=12, cycles=2)
    state, history = run(toy_trainer(config), 6)

    curve = learning_rate(schedule, 1.0, warmup=2, steps=12, cycles=2)
    student, auxiliary = start().values()
    w, u, a = (
        torch.tensor(p, requires_grad=True)
        for p in (student.transformer["w"], student.vae["u"], auxiliary["a"])
    )
    optimizers = [torch.optim.AdamW(parameters, weight_decay=1e-4) for parameters in ([w, u], [a])]
    for index in range(6):
        x, y = (torch.tensor(np.asarray(value[0])) for value in batches(index)[:2])
        losses = ((x * (w + u) - y) ** 2).mean(), ((x * a - y) ** 2).mean()
        for optimizer, loss, peak in zip(optimizers, losses, RATES.values(), strict=True):
            optimizer.param_groups[0]["lr"] = peak * float(curve(index))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.max_grad_norm)
            optimizer.step()
    # torch divides by norm + 1e-6 when it clips.
    for ours, theirs in (
        (state.trained["student"].transformer["w"], w),
        (state.trained["student"].vae["u"], u),
        (state.trained["auxiliary"]["a"], a),
    ):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-5, atol=1e-6)
    assert (
        history[0]["student_gradient_norm"] > config.max_grad_norm
    )  # otherwise clipping would not be tested


def test_muon_moves_every_kernel_by_an_orthogonal_matrix_and_biases_as_adam_does():
    shapes = {"dense": (6, 4), "stack": (3, 6, 4), "conv": (3, 3, 2, 4)}
    generator = np.random.default_rng(0)
    kernels = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    # A stack of biases, (layers, features), has two axes but is not a matrix.
    params = {name: {"kernel": kernel, "bias": kernel[..., 0, :]} for name, kernel in kernels.items()}
    gradients = jax.tree.map(lambda leaf: 1e-3 * leaf + 1e-3, params)
    config = dataclasses.replace(CONSTANT, optimizer="muon", weight_decay=0.0)
    muon = config.transformation(1e-2)
    updates, _ = jax.jit(muon.update)(gradients, jax.jit(muon.init)(params), params)
    for name, matrix in {"dense": (1, 6, 4), "stack": (3, 6, 4), "conv": (1, 18, 4)}.items():
        update, gradient = (np.reshape(tree[name]["kernel"], matrix) for tree in (updates, gradients))
        # Five Newton-Schulz steps leave singular values between about 0.7 and 1.2. The scale gives the update of a square
        # matrix a root mean square of 0.2.
        values = np.linalg.svd(update, compute_uv=False) / (1e-2 * 0.2 * max(matrix[1:]) ** 0.5)
        assert ((values > 0.6) & (values < 1.3)).all(), (name, values)
        # Downhill, along the gradient's own directions.
        left, _, right = np.linalg.svd(gradient, full_matrices=False)
        along = np.einsum("lia,lij,laj->la", left, update, right)
        assert (along < -0.9 * np.linalg.svd(update, compute_uv=False).min(-1, keepdims=True)).all(), name
    # For biases, optax uses Nesterov momentum, too.
    adam = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0, nesterov=True))
    expected, _ = jax.jit(adam.update)(gradients, jax.jit(adam.init)(params), params)
    for name in shapes:
        np.testing.assert_allclose(updates[name]["bias"], expected[name]["bias"], rtol=1e-4)


def test_accumulated_parts_equal_one_large_batch():
    whole = lambda index: jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batches(index, 4, 2))  # noqa: E731
    accumulated, history = run(toy_trainer(), 3, lambda index: batches(index, 4, 2))
    together, expected = run(toy_trainer(), 3, whole)
    np.testing.assert_allclose(
        accumulated.trained["student"].transformer["w"],
        together.trained["student"].transformer["w"],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        accumulated.trained["auxiliary"]["a"], together.trained["auxiliary"]["a"], rtol=1e-5
    )
    for ours, theirs in zip(history, expected, strict=True):
        assert ours["mse"] == pytest.approx(theirs["mse"], rel=1e-5)


def broken(*bad: int, value: float = np.nan):
    def make(index: int) -> Record:
        batch = batches(index)
        return batch._replace(lr=np.full_like(batch.lr, value)) if index in bad else batch

    return make


# At 1e10 each gradient is finite, but their norm is not.
@pytest.mark.parametrize("value", [np.nan, 1e10])
@pytest.mark.parametrize("branch", [True, False])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(branch, value):
    trainer = toy_trainer(branch=branch)
    state, history = run(trainer, 6, broken(2, 3, value=value))
    assert [row["bad_steps"] for row in history] == [0, 0, 1, 2, 0, 0]
    # The four good steps alone give the same weights, so the bad ones changed neither moments nor schedule.
    good = [0, 1, 4, 5]
    expected, _ = run(trainer, 4, lambda index: batches(good[index]))
    for ours, theirs in zip(jax.tree.leaves(state[2:5]), jax.tree.leaves(expected[2:5]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert int(state.step) == 6


def test_the_loss_scale_halves_on_overflow_and_leaves_the_result_alone():
    scaled, history = run(toy_trainer(dynamic_scale=True), 4, broken(1))
    assert [row["loss_scale"] for row in history] == [65536, 65536, 32768, 32768]
    plain, _ = run(toy_trainer(), 4, broken(1))
    np.testing.assert_allclose(
        scaled.trained["student"].transformer["w"], plain.trained["student"].transformer["w"], rtol=1e-6
    )


def test_the_loss_scale_grows_after_enough_good_steps(monkeypatch):
    monkeypatch.setattr("tsdsr_jax.training.optimizer.GROWTH_STEPS", 3)
    _, history = run(toy_trainer(dynamic_scale=True), 8)
    assert [row["loss_scale"] for row in history] == [65536] * 3 + [131072] * 3 + [262144] * 2


def test_a_part_that_starts_late_begins_with_steps_of_usual_size():
    """As a discriminator does. Adam's moments of zeros would make its first step ten times as large as its rate."""

    def late(parts, base, batch, key, moment):
        gradients, metrics = toy_gradients(parts, base, batch, key, moment)
        begun = moment.step >= 300
        return gradients | {
            "auxiliary": jax.tree.map(lambda leaf: leaf * begun, gradients["auxiliary"])
        }, metrics

    config = dataclasses.replace(CONSTANT, max_grad_norm=1e9, weight_decay=0.0)
    trainer = Trainer(late, config, RATES, others={"auxiliary": dataclasses.replace(config, beta1=0.5)})
    state, step = trainer.init(start()), jax.jit(trainer.step, donate_argnums=0)
    sizes = []
    for index in range(302):
        before = np.asarray(state.trained["auxiliary"]["a"])
        state, metrics = step(state, {}, batches(index), KEY)
        sizes.append(np.abs(np.asarray(state.trained["auxiliary"]["a"]) - before).max())
    assert max(sizes[:300]) == 0
    assert sizes[300] == pytest.approx(RATES["auxiliary"], rel=1e-3)
    assert float(metrics["auxiliary_update_norm"]) > 0


def test_the_average_follows_the_student():
    config = dataclasses.replace(CONSTANT, ema_decay=0.9)
    trainer = toy_trainer(config)
    state, step = trainer.init(start()), jax.jit(trainer.step)
    mean = np.asarray(start()["student"].transformer["w"])
    for index in range(5):
        state, _ = step(state, {}, batches(index), KEY)
        mean = 0.9 * mean + 0.1 * np.asarray(state.trained["student"].transformer["w"])
    np.testing.assert_allclose(state.averaged("student").transformer["w"], mean, rtol=1e-5)
    assert toy_trainer().init(start()).ema == {}


def test_the_first_parameters_have_a_key_that_no_step_has():
    """`split` and `fold_in` give the same keys: `split(key, 3)` are those of the steps 0, 1 and 2."""
    used: list[jax.Array] = []

    def create(key: jax.Array, loaded: Any) -> dict[str, Any]:
        used.append(key)
        return start()

    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    step = Step(toy_trainer(), mesh, {}, 5, Beginning(create))
    step.new_state()
    firsts = {jax.random.key_data(key).tobytes() for key in (used[0], *jax.random.split(used[0], 3))}
    run_key = jax.random.key(5)
    steps = [run_key, *(jax.random.fold_in(run_key, index) for index in range(100))]
    parts = [jax.random.fold_in(key, index) for key in steps for index in range(4)]
    assert not firsts & {jax.random.key_data(key).tobytes() for key in steps + parts}
