"""The training step of every network: gradients, optimizers, moving average, and the guard against non-finite steps.

The trained parameters are a dictionary of parts, {"student": ..., "auxiliary": ...} or {"network": ...}. Each part has its
own optimizer, gradient clip and peak learning rate. A step updates all parts or none.

`Trainer` is the step as a pure function. `Step` runs it on a mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tsdsr_jax.data.batches import LocalBatch
from tsdsr_jax.data.record import Record
from tsdsr_jax.devices import compiler_options
from tsdsr_jax.models.params import Tree
from tsdsr_jax.training.batch import Metrics
from tsdsr_jax.training.optimizer import (
    LossScale,
    OptimizerConfig,
    accumulated,
    average,
    kept_where,
    updates_done,
)
from tsdsr_jax.training.sharding import base_shardings, batch_sharding, replicated

# Part name -> what belongs to this part: parameters, gradients or optimizer state.
Parts: TypeAlias = dict[str, Any]
# (parts, frozen arrays, batch, key, moment) -> (gradients of the scaled losses, metrics of the unscaled ones); pure.
Objective = Callable[[Parts, Any, Any, jax.Array, "Moment"], tuple[Parts, Metrics]]
# (parameters, frozen arrays, batch, key) -> (loss, metrics); pure.
Loss = Callable[[Tree, Any, Any, jax.Array], tuple[jax.Array, Metrics]]

NETWORK = "network"


class Moment(NamedTuple):
    """What an objective may know about the run: the loss scale, and the number of steps taken before."""

    scale: jax.Array
    step: jax.Array


def objective_of(loss: Loss) -> Objective:
    """Makes the objective of a single part, `NETWORK`, from its loss."""

    def gradients(
        parts: Parts, base: Any, batch: Any, key: jax.Array, moment: Moment
    ) -> tuple[Parts, Metrics]:
        def scaled(params: Tree) -> tuple[jax.Array, Metrics]:
            value, metrics = loss(params, base, batch, key)
            return value * moment.scale, metrics

        gradient, metrics = jax.grad(scaled, has_aux=True)(parts[NETWORK])
        return {NETWORK: gradient}, metrics

    return gradients


class TrainState(NamedTuple):
    """Everything that changes during training, in float32 or int32.

    Attributes:
      step: number of steps taken, including skipped ones.
      bad_steps: number of consecutive skipped steps.
      trained: parameters of each part: adapters, or a network.
      optimizer: optax state of each part.
      ema: moving average of the first part, under its name; or {}.
      loss_scale: see `LossScale`.
    """

    step: jax.Array
    bad_steps: jax.Array
    trained: Parts
    optimizer: Parts
    ema: Parts
    loss_scale: LossScale

    def averaged(self, part: str = NETWORK) -> Any:
        """Returns a part's moving average, or the part itself if there is none. This is what validation uses."""
        return self.ema.get(part, self.trained[part])

    def exported(self, part: str = NETWORK) -> dict[str, Any]:
        """Returns folder prefix -> parameters, for a part and, if there is one, its moving average."""
        return {"": self.trained[part]} | ({"ema/": self.ema[part]} if part in self.ema else {})


class Trainer:
    """Takes optimizer steps. `step` is pure; jit it with its state donated.

    Args:
      objective: computes the parts' gradients, and metrics to log.
      config: settings of the optimizers.
      rates: peak learning rate of each part. The first part is the one that is averaged and whose rate is logged.
      others: settings of the optimizers of parts that differ from `config`. A part of these that has no gradient at all is
        left alone, as if there were no step for it: zeros would wear out Adam's moments, and its first real step would be
        many times too large.
      dynamic_scale: scale the loss, for float16.
      branch: skip the optimizers (`cond`) if a gradient is not finite. This saves memory on whole networks, because
        choosing between the old and the new state (`where`) keeps both in memory.
    """

    def __init__(
        self,
        objective: Objective,
        config: OptimizerConfig,
        rates: Mapping[str, float],
        *,
        others: Mapping[str, OptimizerConfig] | None = None,
        dynamic_scale: bool = False,
        branch: bool = True,
    ):
        self.objective, self.config, self.rates = objective, config, dict(rates)
        self.dynamic_scale, self.branch = dynamic_scale, branch
        self._first, self._others = next(iter(self.rates)), set(others or {})
        configs = dict.fromkeys(self.rates, config) | dict(others or {})
        self._optimizers = {name: configs[name].transformation(rate) for name, rate in self.rates.items()}

    def init(self, trained: Parts) -> TrainState:
        """Creates the state before the first step; trained parameters become float32."""
        trained = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), trained)
        average = {}
        if self.config.ema_decay is not None:
            # A copy, because a buffer can be donated only once.
            average[self._first] = jax.tree.map(jnp.copy, trained[self._first])
        return TrainState(
            step=jnp.int32(0),
            bad_steps=jnp.int32(0),
            trained=trained,
            optimizer={name: optimizer.init(trained[name]) for name, optimizer in self._optimizers.items()},
            ema=average,
            loss_scale=LossScale.first(self.dynamic_scale),
        )

    def step(self, state: TrainState, base: Any, batches: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One optimizer step of every part.

        Args:
          state: the state to update; donate it.
          base: frozen arrays.
          batches: every leaf is (A, B, ...), where A counts gradient-accumulation steps.
          key: the run's key; the step and the accumulation step are folded in.

        Returns:
          The new state, and the metrics of the objective and of the step. If a gradient or an update is not finite, only
          the counters and the loss scale change.
        """
        key = jax.random.fold_in(key, state.step)

        def of_batch(index: jax.Array) -> tuple[Parts, Metrics]:
            batch = jax.tree.map(lambda leaf: leaf[index], batches)
            return self.gradients(state, base, batch, jax.random.fold_in(key, index))

        gradients, metrics = accumulated(of_batch, jax.tree.leaves(batches)[0].shape[0])
        gradient_norms = _norms(gradients)
        trained, optimizer, ema, update_norms = self._guarded(state, gradients, _all_finite(gradient_norms))
        finite = _all_finite(gradient_norms) & _all_finite(update_norms)
        new_state = TrainState(
            step=state.step + 1,
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            trained=trained,
            optimizer=optimizer,
            ema=ema,
            loss_scale=state.loss_scale.after(finite) if self.dynamic_scale else state.loss_scale,
        )
        own = {
            "learning_rate": self.config.rate(self.rates[self._first])(
                updates_done(state.optimizer[self._first])
            ),
            "bad_steps": new_state.bad_steps,
            "loss_scale": state.loss_scale.value,
        }
        updates = {name: jnp.where(finite, norm, 0) for name, norm in update_norms.items()}
        return new_state, metrics | _logged(gradient_norms, updates, _norms(trained)) | own

    def gradients(self, state: TrainState, base: Any, batch: Any, key: jax.Array) -> tuple[Parts, Metrics]:
        """Computes the gradients of one accumulation step, with the loss scale divided out."""
        scale = state.loss_scale.value
        gradients, metrics = self.objective(state.trained, base, batch, key, Moment(scale, state.step))
        return jax.tree.map(lambda leaf: leaf / scale, gradients), metrics

    def _guarded(
        self, state: TrainState, gradients: Parts, finite: jax.Array
    ) -> tuple[Parts, Parts, Parts, Metrics]:
        """Updates the parts, or leaves them as they are unless gradients and updates are finite; see `_update`."""
        if self.branch:
            return jax.lax.cond(finite, partial(self._update, finite=True), _unchanged, state, gradients)
        return self._update(state, gradients, finite=finite)

    def _update(
        self, state: TrainState, gradients: Parts, *, finite: jax.Array | bool
    ) -> tuple[Parts, Parts, Parts, Metrics]:
        """Updates the parts, or leaves them as they are; also returns the updates' norms.

        Gradients that are not finite do not always make updates that are not: where only their norm overflows, clipping
        makes zeros of them.
        """
        updates, optimizer = self._updates(state, gradients)
        norms = _norms(updates)
        if self.config.optimizer == "adamw" and jax.default_backend() != "cpu":
            # AdamW's updates are cheap to recompute once their norm is known. Keeping them until then would take three
            # quarters of the network's memory on a GPU.
            (state, gradients), norms = jax.lax.optimization_barrier(((state, gradients), norms))
            updates, optimizer = self._updates(state, gradients)
        trained = optax.apply_updates(state.trained, updates)
        decay = self.config.ema_decay
        ema = (
            {}
            if decay is None
            else {name: average(decay, mean, trained[name]) for name, mean in state.ema.items()}
        )
        before = state.trained, state.optimizer, state.ema
        return *kept_where(finite & _all_finite(norms), (trained, optimizer, ema), before), norms

    def _updates(self, state: TrainState, gradients: Parts) -> tuple[Parts, Parts]:
        """Computes each part's update and its new optimizer state."""
        results = {}
        for name, optimizer in self._optimizers.items():
            before = state.optimizer[name]
            results[name] = optimizer.update(gradients[name], before, state.trained[name])
            if name in self._others:
                nothing = jax.tree.map(jnp.zeros_like, gradients[name])
                results[name] = kept_where(
                    optax.global_norm(gradients[name]) > 0, results[name], (nothing, before)
                )
        updates, states = ({name: result[index] for name, result in results.items()} for index in (0, 1))
        return updates, states


def _unchanged(state: TrainState, gradients: Parts) -> tuple[Parts, Parts, Parts, Metrics]:
    norms = {name: jnp.zeros(()) for name in gradients}
    return state.trained, state.optimizer, state.ema, norms


def _norms(parts: Parts) -> Metrics:
    return {name: optax.global_norm(part) for name, part in parts.items()}


def _all_finite(norms: Metrics) -> jax.Array:
    return jnp.isfinite(jnp.stack(list(norms.values()))).all()


def _logged(gradients: Metrics, updates: Metrics, parameters: Metrics) -> Metrics:
    """Names the norms for the log: `gradient_norm`, or `student_gradient_norm` if there are several parts."""
    kinds = {"gradient_norm": gradients, "update_norm": updates, "norm": parameters}
    return {
        kind if len(norms) == 1 else f"{part}_{kind}": norm
        for kind, norms in kinds.items()
        for part, norm in norms.items()
    }


# --- on a mesh ------------------------------------------------------------------------------------

# (state, base, batches, key) -> (state, metrics)
JittedStep = Callable[[TrainState, Any, Record, jax.Array], tuple[TrainState, Metrics]]


class Beginning(NamedTuple):
    """What a run starts training from.

    Attributes:
      create: (key, `loaded`) -> the trained parts; pure. The key is for parameters that are not loaded.
      loaded: arrays on their devices. They are donated, because a whole network would otherwise be in memory twice, and
        passed as an argument, so that they do not become constants of a program. Shapes are enough for a resumed run.
    """

    create: Callable[[jax.Array, Any], Parts]
    loaded: Any = ()


# Steps fold their number into the run's key. This number, which no step has, makes the key of the first parameters.
_FIRST_PARAMETERS = 0x66697273


class Step:
    """A trainer's step on the devices of a mesh, bound to its frozen arrays and the run's key.

    Args:
      trainer: defines the step.
      mesh: the devices.
      base: frozen arrays, already on the devices.
      seed: seed of everything that is drawn on the devices.
      beginning: what the first state is made from.
      split: split the state over the mesh's fsdp axis, like a base; otherwise every device holds all of it.

    Attributes:
      shapes: shapes, dtypes and shardings of the state.
    """

    def __init__(
        self,
        trainer: Trainer,
        mesh: Mesh,
        base: Any,
        seed: int,
        beginning: Beginning,
        *,
        split: bool = False,
    ):
        self.base, self.key, self._loaded = base, jax.random.key(seed), beginning.loaded
        first = jax.random.fold_in(self.key, _FIRST_PARAMETERS)
        self._rows = batch_sharding(mesh, axis=1)

        def make(loaded: Any) -> TrainState:
            return trainer.init(beginning.create(first, loaded))

        shapes = jax.eval_shape(make, beginning.loaded)
        shardings = (
            base_shardings(shapes, mesh) if split else jax.tree.map(lambda leaf: replicated(mesh), shapes)
        )
        self.shapes: TrainState = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            shapes,
            shardings,
        )
        self._make = jax.jit(make, out_shardings=shardings, donate_argnums=0)
        self._step = jit_step(trainer, mesh, shardings)

    def new_state(self) -> TrainState:
        """Creates the state before the first step. Call it only once: it donates the loaded arrays."""
        return self._make(self._loaded)

    def put(self, batch: LocalBatch) -> Record:
        """Puts this process's rows on its devices, as its part of the global batch."""
        return batch.records.map(partial(jax.make_array_from_process_local_data, self._rows))

    def __call__(self, state: TrainState, batches: Record) -> tuple[TrainState, Metrics]:
        """Takes one step. `state` is donated and cannot be used afterwards."""
        return self._step(state, self.base, batches, self.key)


def jit_step(trainer: Trainer, mesh: Mesh, shardings: Any) -> JittedStep:
    """Jits `trainer.step`; the state is donated and keeps its shardings."""
    return jax.jit(
        trainer.step,
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
        compiler_options=compiler_options(mesh.devices.flat[0]),
    )
