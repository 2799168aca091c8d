"""The training step of the full-size SD3 from shapes alone: for plans and compile times, nothing of it runs."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tsdsr_jax.data.record import Record
from tsdsr_jax.distillation.losses import Base, LossConfig, Losses, Student
from tsdsr_jax.distillation.tsd import TSDConfig
from tsdsr_jax.models import lora
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.lpips import LPIPS
from tsdsr_jax.models.mmdit import MMDiT, MMDiTConfig
from tsdsr_jax.models.params import Tree, abstract_params
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig
from tsdsr_jax.training.optimizer import OptimizerConfig
from tsdsr_jax.training.options import PRECISIONS
from tsdsr_jax.training.sharding import base_shardings, batch_sharding, placement, replicated
from tsdsr_jax.training.step import Trainer, jit_step

TOKENS = 333


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What decides on the program of a step.

    Attributes:
      batch: images per device.
      size: side of the training images.
      rank: of all LoRAs.
      precision: of computation and frozen weights.
      checkpointing: recompute blocks in the backward pass.
      points: of DASM's trajectory; 1 is without DASM.
      split_guidance: evaluate the empty and the real prompt one after the other.
      lpips: with LPIPS and the decoder.
      teacher: whether the teacher has a LoRA.
      layers: of the transformer.
    """

    batch: int = 2
    size: int = 512
    rank: int = 64
    precision: Literal["bf16", "fp16", "no"] = "bf16"
    checkpointing: bool = False
    points: int = 4
    split_guidance: bool = False
    lpips: bool = True
    teacher: bool = True
    layers: int = 24


def lower(options: StepOptions, mesh: Mesh) -> jax.stages.Lowered:
    """Traces a step for the devices of a mesh."""
    dtype = PRECISIONS[options.precision]
    configs = dataclasses.replace(MMDiTConfig.sd3_medium(), num_layers=options.layers), VAEConfig.sd3()
    whole = replicated(mesh)
    trainer = _trainer(options, configs, mesh)
    networks = tuple(map(abstract_params, configs))
    placed = partial(_placed, whole=whole)
    adapter = partial(_adapter, rank=options.rank)
    transformer, vae = placed(networks, dtype, base_shardings(networks, mesh))
    teacher = adapter(networks[0], lora.STUDENT_TARGETS)
    widths = configs[0].joint_attention_dim, configs[0].pooled_projection_dim
    shape = partial(jax.ShapeDtypeStruct, sharding=whole)
    text = Text(shape((1, TOKENS, widths[0]), dtype), shape((1, widths[1]), dtype))
    image = shape((1, 64, 64, 3), jnp.float32)
    perceptual = (
        jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"] if options.lpips else {}
    )
    base = Base(
        transformer, vae, placed(teacher, dtype) if options.teacher else {}, text, text, placed(perceptual)
    )
    student = Student(teacher, adapter(networks[1], lora.VAE_ENCODER_TARGETS))
    parts = {"student": student, "auxiliary": adapter(networks[0], lora.AUXILIARY_TARGETS)}
    state = placed(jax.eval_shape(trainer.init, parts))
    key = jax.eval_shape(lambda: jax.random.key(0))
    samples = _samples(options, widths, mesh)
    step = jit_step(trainer, mesh, whole)
    assert isinstance(step, jax.stages.Wrapped)
    return step.lower(state, base, samples, shape(key.shape, key.dtype))


def _trainer(options: StepOptions, configs: tuple[MMDiTConfig, VAEConfig], mesh: Mesh) -> Trainer:
    dtype, remat = PRECISIONS[options.precision], options.checkpointing
    pinned = placement(mesh) if mesh.size > 1 else None
    tsd = TSDConfig()
    losses = Losses(
        MMDiT(configs[0], dtype=dtype, remat=remat, placement=pinned),
        AutoencoderKL(configs[1], dtype=dtype, remat=remat, placement=pinned),
        LossConfig(
            tsd=dataclasses.replace(tsd, point_weights=tsd.point_weights[: options.points]),
            weight_lpips=float(options.lpips),
            split_guidance=options.split_guidance,
        ),
        (lambda params, a, b: LPIPS().apply({"params": params}, a, b)) if options.lpips else None,
    )
    rates = {"student": 5e-6, "auxiliary": 1e-6}
    dynamic = options.precision == "fp16"
    return Trainer(losses, OptimizerConfig(), rates, dynamic_scale=dynamic, branch=False)


def _samples(options: StepOptions, widths: tuple[int, int], mesh: Mesh) -> Record:
    def shape(*sides: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (1, options.batch * mesh.size, *sides), dtype, sharding=batch_sharding(mesh, axis=1)
        )

    latent = options.size // 8
    images = shape(options.size, options.size, 3, dtype=jnp.uint8)
    prompts = shape(TOKENS, widths[0], dtype=jnp.float16), shape(widths[1], dtype=jnp.float16)
    return Record(images, images, shape(latent, latent, 16, dtype=jnp.float32), *prompts)


def _adapter(params: Tree, targets: tuple[str, ...], rank: int) -> Tree:
    return jax.eval_shape(partial(lora.init, targets=targets, rank=rank), jax.random.key(0), params)


def _placed(tree: Any, dtype: Any = None, shardings: Any = None, *, whole: Any) -> Any:
    shardings = shardings or jax.tree.map(lambda leaf: whole, tree)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=where),
        tree,
        shardings,
    )
