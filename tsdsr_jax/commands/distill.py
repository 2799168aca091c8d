"""Trains TSD-SR: distills SD3 into a one-step upscaler, on all GPUs of one or several machines.

python train/distill.py --pretrained_model_name_or_path sd3 --data_dir prepared --output_dir runs/first
    --use_default_prompt --use_dasm --guidance_scale 7.5 --resume_from_checkpoint latest
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from tsdsr_jax import cli, hints
from tsdsr_jax.commands.groups import TRAINING
from tsdsr_jax.data.batches import SampleShapes, first_sample
from tsdsr_jax.data.options import DataOptions
from tsdsr_jax.data.sources import Data, open_data, open_sets
from tsdsr_jax.distillation.adapters import (
    AUXILIARY_FILE,
    Ranks,
    beginning,
    load_adapters,
    load_teacher,
    make_losses,
    student_files,
)
from tsdsr_jax.distillation.adversary import Adversary
from tsdsr_jax.distillation.losses import AUXILIARY, STUDENT, Base, LossConfig, Student
from tsdsr_jax.distillation.tsd import TSDConfig, Weighting
from tsdsr_jax.distillation.validation import Validation
from tsdsr_jax.errors import UserError
from tsdsr_jax.models import lora
from tsdsr_jax.models.discriminator import DISCRIMINATOR, PatchDiscriminator
from tsdsr_jax.models.lpips import LPIPS
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.stacks import by_layer
from tsdsr_jax.training import session
from tsdsr_jax.training.agreement import content_of
from tsdsr_jax.training.checkpoint import LORA
from tsdsr_jax.training.loop import explained_memory
from tsdsr_jax.training.missing import (
    lack_own_prompts,
    missing_data,
    missing_lpips,
    missing_model,
    missing_prompts,
    missing_teacher,
    refuse_missing,
)
from tsdsr_jax.training.networks import (
    Networks,
    check_latents,
    check_shapes,
    load_texts,
    place_text,
    text_hash,
)
from tsdsr_jax.training.optimizer import OptimizerConfig
from tsdsr_jax.training.options import AdversarialOptions, LayerOptions, OptimizerOptions, RunOptions
from tsdsr_jax.training.resume import find_start
from tsdsr_jax.training.session import say
from tsdsr_jax.training.sharding import global_array, replicated
from tsdsr_jax.training.step import Step, Trainer
from tsdsr_jax.training.summary import Curve
from tsdsr_jax.training.validation import pick
from tsdsr_jax.weights import prompt_hints
from tsdsr_jax.weights.lpips_files import load_lpips
from tsdsr_jax.weights.prompt_files import PromptEmbeds
from tsdsr_jax.weights.sd3_folder import Checkpoint, check_fit, open_checkpoint

CURVES = (
    Curve("student loss", ("student",)),
    Curve("TSD", ("tsd",), log_scale=True),
    Curve("latent MSE", ("mse",)),
    Curve("LPIPS", ("lpips",)),
    Curve("pixels", ("pixel",)),
    Curve("auxiliary network loss", ("auxiliary",)),
    Curve("adversarial: logits", ("logits_real", "logits_student")),
    Curve("adversarial: losses", ("adversarial", "discriminator")),
    Curve("validation: latent MSE", ("validation_mse",)),
    Curve("validation: PSNR (dB)", ("validation_psnr",)),
    Curve(
        "gradient norms",
        ("student_gradient_norm", "auxiliary_gradient_norm", "discriminator_gradient_norm"),
        log_scale=True,
    ),
)


LOSSES = ("student", "tsd", "mse", "lpips", "pixel", "adversarial", "discriminator", "auxiliary")
COUNTS = {"tsd_not_finite": "values of the TSD gradient were not finite or above 1024, and were replaced"}
MEMORY_REMEDIES = (
    "--gradient_checkpointing, a smaller --train_batch_size with --gradient_accumulation_steps, --split_guidance, --fsdp N "
    "to split the base over N devices, --lambda_lpips 0"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RunOptions, OptimizerOptions, AdversarialOptions, LayerOptions, DataOptions):
    pretrained_model_name_or_path: cli.PathOrName
    """SD3: a diffusers folder, a hub id, or a folder written by convert/sd3.py."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Variant of the weight files to read, such as fp16."""
    teacher_lora_path: Path | None = None
    """The teacher's LoRA, for --use_teacher_lora: a file, or a folder that contains teacher.safetensors."""
    checkpoint_path: Path | None = None
    """Start from the student LoRAs in this folder (transformer.safetensors and vae.safetensors), as released or exported."""
    lpips_path: Path = hints.LPIPS_FILE
    """LPIPS weights written by convert/lpips.py."""

    mixed_precision: Literal["bf16", "fp16", "no"] = "fp16"
    """Precision of computation; trained weights are kept in float32. TSD subtracts velocities that are almost equal: in fp16
    its gradient is off by about 2 %, in bf16 by 10 to 20 %. fp16 uses a dynamic loss scale. Use bf16 on a TPU."""
    use_default_prompt: bool = False
    """Give the student the default prompt instead of each image's own."""
    use_dasm: bool = False
    """Use distribution-aware sampling: TSD at several points of a trajectory instead of one."""
    use_teacher_lora: bool = False
    """Use SD3 with the LoRA of --teacher_lora_path as the teacher, instead of SD3 itself."""
    merge_teacher_lora: bool = False
    """Merge the teacher's LoRA into a second copy of the transformer: faster, for 4 GB more with SD3. In 16 bits a part of
    a small LoRA is rounded away; the run says how much is left."""
    use_random_bias: bool = False
    """Vary the length of trajectories by -25 to 24 schedule steps; needs --use_dasm."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of the teacher and the auxiliary network in TSD; the published run used 7.5."""
    split_guidance: bool = False
    """Evaluate the empty and the real prompt one after the other, which halves the memory for guidance."""
    lambda_tsd: float = 1.0
    """Weight of the TSD loss; 0 turns it off."""
    lambda_mse: float = 1.0
    """Weight of the latent MSE; the authors turn it off if results are over-smoothed."""
    lambda_lpips: float = 1.0
    """Weight of LPIPS; 0 turns it off, and --lpips_path is not needed."""
    lambda_pixel: float = 0.0
    """Weight of the pixels' distance between decoded results and photographs, such as 1: L1, and differences of gradients at
    three scales. TSD-SR has none."""
    lambda_adv: float = 0.0
    """Weight of an adversarial loss on patches of the decoded photographs, such as 0.02; 0, as in TSD-SR, trains
    without."""
    adversarial_start: int = 0
    """Number of steps in which the discriminator learns first, without moving the student."""
    lambda_vsd: float = 0.7
    """The paper's lambda: the share of variational score distillation in TSD. The rest is target score matching."""
    dasm_points: int = 4
    """Number of points per trajectory, with --use_dasm."""
    dasm_gamma: float = 0.3
    """The paper's gamma: the weight of every point after the first."""
    dasm_stride: int = 50
    """Schedule steps between points."""
    first_index: int = 50
    """Lowest schedule index to draw (0 is pure noise, 999 is almost no noise)."""
    last_index: int = 949
    """Highest schedule index to draw."""
    weighting_scheme: Weighting = "logit_normal"
    """How samples are weighted in the auxiliary network's loss."""
    logit_mean: float = 0.0
    """Mean of the draws of --weighting_scheme logit_normal."""
    logit_std: float = 1.0
    """Standard deviation of the draws of --weighting_scheme logit_normal."""
    mode_scale: float = 1.29
    """Scale of --weighting_scheme mode."""

    rank: int = 64
    """Rank of the student's LoRA on the transformer."""
    rank_lora: int = 16
    """Rank of the auxiliary network's LoRA; the published run used 64."""
    rank_vae: int = 64
    """Rank of the student's LoRA on the autoencoder's encoder."""
    learning_rate: float = 1e-5
    """Peak learning rate of the student."""
    learning_rate_reg: float = 1e-6
    """Peak learning rate of the auxiliary network. Without TSD it learns, too, so that a later run with TSD can begin with
    it; 0 with --lambda_tsd 0 leaves it out, which makes steps faster."""

    def loss_config(self, shift: float) -> LossConfig:
        later = (self.dasm_gamma,) * (self.dasm_points - 1)
        return LossConfig(
            tsd=TSDConfig(
                balance=self.lambda_vsd,
                point_weights=(1.0, *later) if self.use_dasm else (1.0,),
                stride=self.dasm_stride,
                first_index=self.first_index,
                last_index=self.last_index,
            ),
            weight_tsd=self.lambda_tsd,
            weight_mse=self.lambda_mse,
            weight_lpips=self.lambda_lpips,
            weight_pixel=self.lambda_pixel,
            train_auxiliary=self.trains_auxiliary(),
            guidance_scale=self.guidance_scale,
            split_guidance=self.split_guidance,
            bias_range=(-25, 25) if self.use_random_bias else None,
            weighting=self.weighting_scheme,
            logit_mean=self.logit_mean,
            logit_std=self.logit_std,
            mode_scale=self.mode_scale,
            shift=shift,
        )

    def ranks(self) -> Ranks:
        return Ranks(self.rank, self.rank_vae, self.rank_lora)

    def check(self) -> None:
        """Raises UserError for flags that cannot work, before anything is loaded."""
        super().check()
        self.check_data()
        self.check_optimizer()
        self.check_adversarial()
        cli.at_least(self, 1, "rank", "rank_lora", "rank_vae", "dasm_points", "dasm_stride")
        cli.at_least(self, 0, "learning_rate", "learning_rate_reg", "lambda_tsd", "lambda_mse", "lambda_lpips",
                 "lambda_pixel", "dasm_gamma", "first_index")  # fmt: skip
        if not 0 <= self.lambda_vsd <= 1:
            raise UserError(f"--lambda_vsd {self.lambda_vsd:g}: expected a share from 0 to 1")
        if not self.first_index <= self.last_index < 999:
            raise UserError(
                f"--first_index {self.first_index} --last_index {self.last_index}: expected first ≤ last ≤ 998"
            )
        if self.use_dasm and self.use_random_bias and self.dasm_points * self.dasm_stride < 26:
            raise UserError(
                "--dasm_points × --dasm_stride: expected at least 26 with --use_random_bias, which subtracts up to 25"
            )
        losses = ("lambda_tsd", "lambda_mse", "lambda_lpips", "lambda_pixel", "lambda_adv")
        if not any(getattr(self, name) for name in losses):
            flags = ", ".join(f"--{name}" for name in losses)
            raise UserError(f"{flags} are all 0: there is nothing to train")
        if self.use_teacher_lora and self.teacher_lora_path is None:
            raise UserError("--use_teacher_lora: give the LoRA with --teacher_lora_path")

    def check_files(self) -> None:
        """Raises UserError if weights or embeddings are missing; the message names all of them."""
        model = self.pretrained_model_name_or_path
        found = [
            *missing_model(model),
            *missing_data(self),
            *(missing_lpips(self.lpips_path) if self.lambda_lpips else []),
            *missing_prompts(self, self.use_default_prompt or lack_own_prompts(self.hr_dir)),
            *missing_teacher(self.teacher_lora_path if self.use_teacher_lora else None),
        ]
        refuse_missing(found, model, hints.first_run())

    def adversary(self) -> Adversary | None:
        if not self.lambda_adv:
            return None
        discriminator = PatchDiscriminator(self.discriminator_width, dtype=self.dtype)
        return Adversary(discriminator, self.lambda_adv, self.adversarial_start)

    def rates(self) -> dict[str, float]:
        """Returns the peak learning rate of each trained part."""
        rates = {STUDENT: self.learning_rate, AUXILIARY: self.learning_rate_reg}
        return rates | ({DISCRIMINATOR: self.learning_rate_adv} if self.lambda_adv else {})

    def trains_auxiliary(self) -> bool:
        return bool(self.lambda_tsd or self.learning_rate_reg)

    def others(self, config: OptimizerConfig) -> dict[str, OptimizerConfig]:
        """Returns settings of the parts that are left alone while they have no gradient; see `Trainer`."""
        found = {DISCRIMINATOR: self.discriminator_config(config)}
        return found if self.trains_auxiliary() else found | {AUXILIARY: config}

    def all_notes(self, steps: int, merged: bool = False) -> list[str]:
        """Returns notes on flags that have no effect or may surprise; a `merged` model is already a student."""
        found = self.notes()
        if merged and self.lambda_tsd:
            found.append(
                "this model has LoRAs merged in: it is a finished student, not a teacher for TSD; "
                "pass --lambda_tsd 0 to train it with the other losses only"
            )
        if self.use_random_bias and not self.use_dasm:
            found.append("--use_random_bias has no effect without --use_dasm")
        if self.merge_teacher_lora and not self.use_teacher_lora:
            found.append("--merge_teacher_lora has no effect without --use_teacher_lora")
        if self.teacher_lora_path and not self.use_teacher_lora:
            found.append("--teacher_lora_path has no effect without --use_teacher_lora")
        return found + self.warmup_notes(steps) + self.adversarial_notes(steps)


def main() -> None:
    options = cli.parse(Options, description=__doc__, groups=TRAINING)
    options = options.prompted(options.pretrained_model_name_or_path)
    options.check()
    options.check_files()
    mesh = options.start()
    start = find_start(options)
    model = open_checkpoint(options.pretrained_model_name_or_path, options.revision, options.variant)
    options = options.fitted(model.longest_side) if options.hr_dir else options
    data = open_data(options, options.seed, "pairs", say, options.output_dir)
    with explained_memory(MEMORY_REMEDIES):
        task = _prepare(options, model, mesh, data, new=start is None)
    session.train(options, task, data, mesh, start)


def _prepare(options: Options, model: Checkpoint, mesh: Mesh, data: Data, new: bool) -> session.Task:
    """Checks everything by file headers, then loads the frozen base and describes the training."""
    networks = Networks(
        model.network("transformer"), model.network("vae"), mesh, options.dtype, options.scans(mesh)
    )
    check_fit(networks.transformer, networks.vae)
    lpips = load_lpips(options.lpips_path) if options.lambda_lpips else None
    perceptual = LPIPS(lpips[0]) if lpips else None
    check_shapes(data.shapes, networks, perceptual, prepared=bool(options.data_dir))
    null, default = load_texts(options, networks, data.shapes, options.use_default_prompt)
    held_out, shapes = data.source, data.shapes
    if options.validation_dir:
        held_out = open_sets([options.validation_dir])
        shapes = SampleShapes.of_source(held_out)
        check_shapes(shapes, networks, what="validation images")
    records = pick(held_out, shapes, options.num_validation_images, say)
    # A resumed run takes its adapters from the checkpoint.
    loaded = _starting_adapters(options, networks) if new else (None, None)

    steps = options.steps(len(data.source), mesh)
    session.announce(options, mesh, data, steps, options.all_notes(steps, bool(model.merged)))
    base, identity = _load_base(options, networks, null, default, lpips[1] if lpips else {})
    if new and data.shapes.latent_hr:
        check_latents(*first_sample(data.source), networks, base.vae)
    adversary = options.adversary()
    losses = make_losses(
        networks, options.loss_config(model.shift()), perceptual, adversary, options.gradient_checkpointing
    )
    config = options.optimizer_config(steps)
    trainer = Trainer(
        losses,
        config,
        options.rates(),
        others=options.others(config),
        dynamic_scale=options.dynamic_scale,
        branch=False,  # adapters are small
    )
    validation = Validation(losses, mesh, base, records)
    return session.Task(
        step=Step(trainer, mesh, base, options.seed, beginning(networks, options.ranks(), loaded, adversary)),
        validate=lambda state: validation(state.averaged(STUDENT)),
        files=lambda _: partial(student_files, networks),
        export=LORA,
        identity=identity
        | {"schedule's shift": model.shift()}
        | options.ranks()._asdict()
        | options.kept()
        | options.kept_discriminator(),
        agreed={
            "starting LoRAs": content_of(loaded),
            "LPIPS": content_of(lpips[1] if lpips else {}),
            "validation samples": content_of(records),
        },
        losses=LOSSES,
        counts=COUNTS,
        curves=CURVES,
        memory_remedies=MEMORY_REMEDIES,
        how_to_use=partial(_how_to_use, options),
    )


def _how_to_use(options: Options, path: Path) -> str:
    """Returns the command that upscales with a checkpoint's adapters, the ones that were validated."""
    folder = options.default_embedding_dir
    assert folder is not None, "main sets it"
    upscaling = hints.command(
        "infer/upscale.py",
        **hints.given(options, *hints.MODEL),
        lora_dir=path / LORA if options.ema_decay is None else path / LORA / "ema",
        rank=options.rank,
        rank_vae=options.rank_vae,
        embedding_dir=folder,
        input_dir=hints.PHOTOS,
        output_dir=hints.new_folder(options.output_dir, "upscaled"),
    )
    if folder.exists():
        return f"upscale with it: {upscaling}"
    needed = f"upscaling needs the default prompt's embedding in {folder}."
    return f"{needed} {prompt_hints.how_to_encode(options, 'default', folder)}\nthen upscale with it: {upscaling}"


def _starting_adapters(options: Options, networks: Networks) -> tuple[Student | None, Tree | None]:
    """Loads the adapters of --checkpoint_path; None stands for new ones."""
    if options.checkpoint_path is None:
        return None, None
    student, auxiliary = load_adapters(options.checkpoint_path, networks, options.ranks())
    new = (
        "" if auxiliary else f"; it has no {AUXILIARY_FILE}, so the auxiliary network starts with a new LoRA"
    )
    say(f"starting from {options.checkpoint_path}{new}")
    return student, auxiliary


def _merged_teacher(networks: Networks, transformer: Tree, teacher: Tree) -> Tree:
    """Merges the teacher's LoRA; says how much of it is left after rounding."""
    if not networks.scan_layers:
        teacher = by_layer(networks.mmdit_config, teacher)
    merged = jax.device_put(
        lora.merge(transformer, teacher), jax.tree.map(lambda leaf: leaf.sharding, transformer)
    )
    share = lora.merged_share(transformer, merged, teacher)
    kind = np.dtype(networks.dtype)
    lost = "" if share > 0.9 else "; without --merge_teacher_lora nothing of it is lost"
    say(f"the teacher's LoRA is merged: {share:.1%} of its change is left in {kind}{lost}")
    return merged


def _load_base(
    options: Options, networks: Networks, null: PromptEmbeds, default: PromptEmbeds | None, lpips: Tree
) -> tuple[Base, dict[str, Any]]:
    """Loads the frozen arrays onto the devices, and hashes them."""
    (transformer, transformer_hash), (vae, vae_hash) = networks.load([networks.transformer, networks.vae])
    teacher: Tree = {}
    teacher_hash = "none"
    if options.use_teacher_lora and (path := options.teacher_lora_path):
        teacher, teacher_hash = load_teacher(
            path / "teacher.safetensors" if path.is_dir() else path, networks
        )
    merged: Tree = {}
    if options.merge_teacher_lora and teacher:
        merged = _merged_teacher(networks, transformer, teacher)
        teacher = {}
    whole = replicated(networks.mesh)
    base = Base(
        transformer,
        vae,
        teacher,
        place_text(null, networks),
        place_text(default, networks) if default else None,
        jax.tree.map(lambda leaf: global_array(np.asarray(leaf), whole), lpips),
        merged,
    )
    return base, {
        "transformer": transformer_hash,
        "autoencoder": vae_hash,
        "teacher LoRA": teacher_hash,
        "null prompt": text_hash(null),
        "default prompt": text_hash(default) if default else "none",
    }
