"""Trains TSD-SR's teacher: a LoRA for SD3, on high-resolution photographs, with the flow-matching loss.

python train/teacher.py --pretrained_model_name_or_path sd3 --hr_dir PHOTOS --output_dir runs/teacher
    --default_embedding_dir dataset/default --null_embedding_dir dataset/null --max_train_steps 20000

Then: python train/distill.py ... --use_teacher_lora --teacher_lora_path runs/teacher/checkpoint_0020000/lora

--train base trains all weights of the transformer instead; with --from_scratch, they start from random values.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from tsdsr_jax import cli, hints
from tsdsr_jax.commands.groups import TRAINING
from tsdsr_jax.data.batches import SampleShapes, first_sample
from tsdsr_jax.data.options import DataOptions
from tsdsr_jax.data.record import Record, Source
from tsdsr_jax.data.sources import Data, open_data, open_sets
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.params import Tree
from tsdsr_jax.pretraining.teacher import FlowBase, FlowConfig, FlowLoss
from tsdsr_jax.pretraining.teacher_validation import TeacherValidation
from tsdsr_jax.pretraining.teacher_weights import (
    TransformerStart,
    load_starting_lora,
    model_files,
    start_from_base,
    start_from_scratch,
    start_lora,
    teacher_file,
    teacher_files,
)
from tsdsr_jax.training import session
from tsdsr_jax.training.agreement import content_of
from tsdsr_jax.training.checkpoint import LORA, MODEL, to_host
from tsdsr_jax.training.loop import explained_memory
from tsdsr_jax.training.missing import (
    lack_own_prompts,
    missing_data,
    missing_model,
    missing_prompts,
    refuse_missing,
)
from tsdsr_jax.training.networks import (
    Networks,
    check_latents,
    check_shapes,
    check_tokens,
    load_texts,
    place_text,
    text_hash,
)
from tsdsr_jax.training.options import LayerOptions, OptimizerOptions, RunOptions
from tsdsr_jax.training.resume import find_start
from tsdsr_jax.training.session import say
from tsdsr_jax.training.step import NETWORK, Step, Trainer, objective_of
from tsdsr_jax.training.summary import Curve
from tsdsr_jax.training.validation import pick
from tsdsr_jax.weights.prompt_files import PromptEmbeds
from tsdsr_jax.weights.sd3_folder import Checkpoint, check_fit, open_checkpoint

CURVES = (
    Curve("flow-matching loss", ("flow",)),
    Curve("validation: flow-matching loss", ("validation_flow",)),
    Curve("gradient norm", ("gradient_norm",), log_scale=True),
    Curve("learning rate", ("learning_rate",)),
)
MEMORY_REMEDIES = (
    "--gradient_checkpointing, a smaller --train_batch_size with --gradient_accumulation_steps, --fsdp N to split the "
    "weights over N devices"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RunOptions, OptimizerOptions, LayerOptions, DataOptions):
    pretrained_model_name_or_path: cli.PathOrName
    """SD3: a diffusers folder, a hub id, or a folder written by convert/sd3.py."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Variant of the weight files to read, such as fp16."""

    train: Literal["lora", "base"] = "lora"
    """What to train: a LoRA on the frozen transformer, or all of its weights."""
    from_scratch: bool = False
    """With --train base: start from new weights; only config.json of the transformer is read."""
    checkpoint_path: Path | None = None
    """With --train lora: a teacher's LoRA to start from; a file, or a folder that contains teacher.safetensors."""
    rank: int = 64
    """Rank of the LoRA."""
    prompt_dropout: float = 0.1
    """Probability of using the empty prompt instead of the photograph's, so that the teacher can be guided."""
    logit_mean: float = 0.0
    """Mean of the logit-normal distribution of noise levels; above 0, low noise is more likely."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal distribution of noise levels."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    sampling_steps: int = 28
    """Sampling steps of validation pictures that are generated from noise."""
    sampling_guidance: float = 5.0
    """Guidance of validation pictures that are generated from noise."""

    def config(self, shift: float) -> FlowConfig:
        return FlowConfig(shift, self.logit_mean, self.logit_std, self.prompt_dropout)

    @property
    def adapter(self) -> bool:
        return self.train == "lora"

    def check(self) -> None:
        """Raises UserError for flags that cannot work, before anything is loaded."""
        super().check()
        self.check_data()
        self.check_optimizer()
        cli.at_least(self, 1, "rank", "sampling_steps")
        cli.at_least(self, 0, "learning_rate")
        if not 0 <= self.prompt_dropout <= 1:
            raise UserError(f"--prompt_dropout {self.prompt_dropout:g}: expected 0 to 1 (a probability)")
        if not 0 < self.logit_std < float("inf"):
            raise UserError(f"--logit_std {self.logit_std:g}: expected more than 0")
        if self.from_scratch and self.adapter:
            raise UserError("--from_scratch needs --train base: a LoRA adapts existing weights")
        if self.checkpoint_path and not self.adapter:
            raise UserError("--checkpoint_path is a LoRA, for --train lora; pass other weights as the model")

    def all_notes(self, steps: int) -> list[str]:
        """Returns notes on flags that have no effect or may surprise."""
        found = self.notes()
        if self.scan_layers is False and not self.adapter:
            found.append(
                "--no_scan_layers has no effect with --train base, whose layers are trained in stacks"
            )
        return found + self.warmup_notes(steps)


def main() -> None:
    options = cli.parse(Options, description=__doc__, groups=TRAINING)
    options = options.prompted(options.pretrained_model_name_or_path)
    options.check()
    model_name = options.pretrained_model_name_or_path
    missing = [
        *missing_model(model_name),
        *missing_data(options),
        *missing_prompts(options, lack_own_prompts(options.hr_dir)),
    ]
    refuse_missing(missing, model_name, hints.first_run())
    mesh = options.start()
    start = find_start(options)
    model = open_checkpoint(options.pretrained_model_name_or_path, options.revision, options.variant)
    _check_base(options, model)
    options = options.fitted(model.longest_side) if options.hr_dir else options
    data = open_data(options, options.seed, "latents", say, options.output_dir)
    with explained_memory(MEMORY_REMEDIES):
        task = _prepare(options, model, mesh, data, new=start is None)
    session.train(options, task, data, mesh, start)


def _check_base(options: Options, model: Checkpoint) -> None:
    """Raises UserError if the model is a student."""
    if model.merged and not options.from_scratch:
        raise UserError(
            f"{options.pretrained_model_name_or_path}: is a finished one-step student ({', '.join(model.merged)} merged in) "
            "and cannot be the base of a teacher; pass the model that the LoRAs were made for"
        )


def _prepare(options: Options, model: Checkpoint, mesh: Mesh, data: Data, new: bool) -> session.Task:
    """Checks everything by file headers, then loads the networks and describes the training."""
    networks = Networks(
        model.network("transformer"),
        model.network("vae"),
        mesh,
        options.dtype,
        options.scans(mesh) or not options.adapter,
    )
    check_fit(networks.transformer, networks.vae)
    check_shapes(data.shapes, networks, prepared=bool(options.data_dir))
    null, default = load_texts(options, networks, data.shapes, with_default=False)
    records = _validation_records(options, data, networks, null, default)
    # A resumed run takes its LoRA from the checkpoint.
    loaded = _starting_lora(options, networks) if new and options.checkpoint_path else None

    steps = options.steps(len(data.source), mesh)
    session.announce(options, mesh, data, steps, options.all_notes(steps))
    ((vae, vae_hash),) = networks.load([networks.vae])
    transformer = _load_transformer(options, networks, loaded, new)
    if new and data.shapes.latent_hr:
        check_latents(*first_sample(open_sets(options.data_dir)), networks, vae)
    texts = place_text(null, networks), place_text(default, networks) if default else None
    base = FlowBase(transformer.frozen, vae, *texts)
    network = networks.mmdit(options.gradient_checkpointing)
    loss = FlowLoss(network, networks.autoencoder(), options.config(model.shift()), options.adapter)
    trainer = Trainer(
        objective_of(loss.of_batch),
        options.optimizer_config(steps),
        {NETWORK: options.learning_rate},
        dynamic_scale=options.dynamic_scale,
    )
    step = Step(trainer, mesh, base, options.seed, transformer.beginning, split=not options.adapter)
    validation = TeacherValidation(
        loss, mesh, base, records, options.sampling_steps, options.sampling_guidance
    )
    export = (
        partial(teacher_files, networks)
        if options.adapter
        else partial(model_files, networks, model.shift(), to_host(transformer.frozen))
    )
    return session.Task(
        step=step,
        validate=lambda state: validation(state.averaged()),
        files=lambda _: export,
        export=LORA if options.adapter else MODEL,
        identity={
            "train": options.train,
            "rank": options.rank if options.adapter else None,
            "schedule's shift": model.shift(),
            **options.kept(),
            "transformer": transformer.digest,
            "autoencoder": vae_hash,
            "null prompt": text_hash(null),
            "default prompt": text_hash(default) if default else "none",
        },
        agreed={"validation samples": content_of(records)},
        losses=("flow",),
        counts={},
        curves=CURVES,
        memory_remedies=MEMORY_REMEDIES,
        how_to_use=partial(_how_to_use, options),
    )


def _validation_records(
    options: Options, data: Data, networks: Networks, null: PromptEmbeds, default: PromptEmbeds | None
) -> list[Record]:
    """The samples to validate on; refuses those that do not fit the networks or the prompts."""
    source = _validation_source(options, data)
    shapes = SampleShapes.of_source(source)
    prepared = bool(options.data_dir or options.validation_dir)
    check_shapes(shapes, networks, what="validation images", prepared=prepared)
    if shapes.prompt is None and default is None:
        raise UserError("the validation images have no prompts, but the training images do")
    if shapes.prompt:
        flags = f"--null_embedding_dir {options.null_embedding_dir}, with --validation_dir"
        check_tokens(shapes.prompt[0], flags, null)
    return pick(source, shapes, options.num_validation_images, say)


def _validation_source(options: Options, data: Data) -> Source:
    """Opens the samples to validate on: those of --validation_dir, or the training samples, but with images."""
    if options.validation_dir:
        return open_sets([options.validation_dir])
    return open_sets(options.data_dir) if options.data_dir else data.source


def _starting_lora(options: Options, networks: Networks) -> Tree:
    """Loads the LoRA of --checkpoint_path."""
    assert options.checkpoint_path is not None
    path = teacher_file(options.checkpoint_path)
    adapter = load_starting_lora(path, networks, options.rank)
    say(f"starting from {path}")
    return adapter


def _load_transformer(options: Options, networks: Networks, lora: Tree | None, new: bool) -> TransformerStart:
    """Loads or creates the transformer; a resumed run keeps only its frozen part."""
    if options.adapter:
        return start_lora(networks, options.rank, lora)
    if options.from_scratch:
        return start_from_scratch(networks)
    return start_from_base(networks, new)


def _how_to_use(options: Options, path: Path) -> str:
    """Returns the command that distills a checkpoint's teacher, with the weights that were validated, on the same data."""
    made = path / (LORA if options.adapter else MODEL) / ("" if options.ema_decay is None else "ema")
    if options.adapter:
        flags = hints.given(options, *hints.MODEL) | {"use_teacher_lora": True, "teacher_lora_path": made}
    else:
        flags = {"pretrained_model_name_or_path": made}
    flags |= hints.given(options, *hints.DATA, *hints.STEPS)
    return f"distill it: {hints.distilling(options.output_dir, flags)}"
