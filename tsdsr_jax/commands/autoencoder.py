"""Trains an autoencoder on photographs: SD3's, or a smaller one of the same architecture.

python train/autoencoder.py --vae_dir vae --from_scratch --hr_dir PHOTOS --output_dir runs/vae --max_train_steps 20000

Checkpoints contain the autoencoder in diffusers' layout, with a scaling factor measured on the validation photographs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tsdsr_jax import cli, hints
from tsdsr_jax.commands.groups import TRAINING
from tsdsr_jax.data.batches import SampleShapes
from tsdsr_jax.data.options import CropOptions
from tsdsr_jax.data.record import Record
from tsdsr_jax.data.sources import Data, open_images
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.discriminator import DISCRIMINATOR, PatchDiscriminator, new_discriminator_params
from tsdsr_jax.models.lpips import LPIPS, Network, minimum_side
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig
from tsdsr_jax.pretraining.adversarial import AdversarialAutoencoder
from tsdsr_jax.pretraining.autoencoder import (
    AutoencoderConfig,
    AutoencoderLoss,
    Frozen,
    new_autoencoder_params,
)
from tsdsr_jax.pretraining.autoencoder_validation import AutoencoderValidation
from tsdsr_jax.training import session
from tsdsr_jax.training.agreement import content_of
from tsdsr_jax.training.checkpoint import MODEL, Export, Files, to_host
from tsdsr_jax.training.loop import explained_memory
from tsdsr_jax.training.networks import load_networks
from tsdsr_jax.training.options import AdversarialOptions, OptimizerOptions, RunOptions
from tsdsr_jax.training.resume import find_start
from tsdsr_jax.training.session import say
from tsdsr_jax.training.sharding import global_array, placement, replicated
from tsdsr_jax.training.step import NETWORK, Beginning, Parts, Step, Trainer, TrainState, objective_of
from tsdsr_jax.training.summary import Curve
from tsdsr_jax.training.validation import pick
from tsdsr_jax.weights.lpips_files import load_lpips
from tsdsr_jax.weights.sd3_folder import TORCH_STEM, NetworkFiles, torch_config
from tsdsr_jax.weights.tensor_files import TensorStream
from tsdsr_jax.weights.torch_names import base_tensors

CURVES = (
    Curve("loss", ("autoencoder",), log_scale=True),
    Curve("L1 and gradients", ("l1", "gradient"), log_scale=True),
    Curve("divergence", ("kl", "validation_kl")),
    Curve("validation: PSNR (dB)", ("validation_psnr",)),
    Curve("standard deviation of the latents", ("latent_deviation",)),
    Curve("adversarial: logits", ("logits_real", "logits_rebuilt")),
    Curve("adversarial: losses", ("adversarial", "discriminator")),
    Curve(
        "gradient norm",
        ("gradient_norm", "network_gradient_norm", "discriminator_gradient_norm"),
        log_scale=True,
    ),
)
MEMORY_REMEDIES = (
    "--gradient_checkpointing, a smaller --train_batch_size with --gradient_accumulation_steps, smaller crops"
)

# Makes the key of a new discriminator from the run's.
_DISCRIMINATOR = 2**31

# The scaling factor is measured on at least this many photographs, if there are enough.
MEASURED = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RunOptions, OptimizerOptions, AdversarialOptions, CropOptions):
    hr_dir: tuple[Path, ...]
    """Folder of photographs, including its subfolders; repeat the flag for several folders."""
    vae_dir: Path
    """The autoencoder: a checkpoint's vae folder, with config.json and weights. A new scaling factor is measured."""
    from_scratch: bool = False
    """Start from new weights; only config.json of the folder is read."""
    validation_dir: Path | None = None
    """Folder of photographs to validate on. Default: the first training photographs."""
    lambda_gradient: float = 1.0
    """Weight of the difference of image gradients, at three scales."""
    lambda_kl: float = 1e-6
    """Weight of the KL divergence of the latents from the standard normal distribution."""
    lambda_lpips: float = 0.0
    """Weight of LPIPS; if it is above 0, --lpips_path is needed."""
    lpips_path: Path = hints.LPIPS_FILE
    """LPIPS weights written by convert/lpips.py."""
    learning_rate: float = 1e-4
    """Peak learning rate."""

    train: Literal["all", "decoder"] = "all"
    """Train the whole autoencoder, or its decoder alone: latents then stay what a transformer was trained on."""
    latent_noise: float = 0.0
    """Add noise to latents before they are decoded, of up to this share of their standard deviation, such as 0.15. Then
    small errors in latents make small errors in pictures."""
    lambda_adv: float = 0.0
    """Weight of an adversarial loss on patches, relative to the other losses, such as 0.5; 0 trains without."""

    def check(self) -> None:
        """Raises UserError for flags that cannot work, before anything is loaded."""
        super().check()
        self.check_crop()
        self.check_optimizer()
        self.check_adversarial()
        cli.at_least(self, 0, "learning_rate", "lambda_gradient", "lambda_kl", "lambda_lpips", "latent_noise")
        if self.train == "decoder" and self.from_scratch:
            raise UserError(
                "--train decoder keeps the encoder of --vae_dir, so it cannot begin --from_scratch"
            )

    def kept_here(self) -> dict[str, Any]:
        """Returns what decides on the form of the state, where it is not the default."""
        found: dict[str, Any] = {"train": self.train} if self.train != "all" else {}
        return found | self.kept_discriminator()


def main() -> None:
    options = cli.parse(Options, description=__doc__, groups=TRAINING)
    options.check()
    files = NetworkFiles(options.vae_dir, "vae")
    _check_crop(options, _config_of(files))
    mesh = options.start()
    start = find_start(options)
    data = open_images(options.hr_dir, options, options.seed, say, options.output_dir)
    with explained_memory(MEMORY_REMEDIES):
        task = _prepare(options, files, mesh, data, new=start is None)
    session.train(options, task, data, mesh, start)


def _config_of(files: NetworkFiles) -> VAEConfig:
    config = files.config
    assert isinstance(config, VAEConfig)
    return config


def _check_crop(options: Options, config: VAEConfig) -> None:
    """Raises UserError for crops that the autoencoder or LPIPS cannot take."""
    sides = options.crop().height, options.crop().width
    given = " ".join(map(str, options.crop_size or (sides[0],)))
    if any(side % config.factor for side in sides):
        raise UserError(
            f"--crop_size {given}: expected multiples of {config.factor}, the autoencoder's downsampling factor"
        )
    if options.lambda_lpips and min(sides) < minimum_side("alex"):
        raise UserError(
            f"--crop_size {given}: too small for LPIPS, which needs {minimum_side('alex')} pixels"
        )


def _prepare(options: Options, files: NetworkFiles, mesh: Mesh, data: Data, new: bool) -> session.Task:
    """Loads the weights and describes the training."""
    lpips = load_lpips(options.lpips_path) if options.lambda_lpips else None
    start, digest = _starting_params(options, files, mesh, new)
    steps = options.steps(len(data.source), mesh)
    session.announce(
        options,
        mesh,
        data,
        steps,
        options.notes() + options.warmup_notes(steps) + options.adversarial_notes(steps),
    )
    config = _config_of(files)
    loss = _make_loss(options, config, mesh, lpips[0] if lpips else None)
    whole = replicated(mesh)
    frozen = Frozen(
        jax.tree.map(lambda leaf: global_array(leaf, whole), lpips[1] if lpips else {}), start.fixed
    )
    trainer = _trainer(options, loss, steps)
    step = Step(trainer, mesh, frozen, options.seed, start.beginning, split=True)
    measured = max(options.num_validation_images, MEASURED)
    records = _validation_records(options, data, measured)
    validation = AutoencoderValidation(loss, mesh, records, options.num_validation_images, start.fixed)
    return session.Task(
        step=step,
        validate=lambda state: validation(state.averaged()),
        files=partial(_export, config, validation, to_host(start.fixed)),
        export=MODEL,
        identity=options.kept() | options.kept_here() | {"autoencoder": digest},
        agreed={
            "LPIPS": content_of(lpips[1] if lpips else {}),
            "validation samples": content_of(records),
        },
        losses=("autoencoder", "l1", *(("adversarial",) if options.lambda_adv else ())),
        counts={},
        curves=CURVES,
        memory_remedies=MEMORY_REMEDIES,
        how_to_use=partial(_how_to_use, options),
    )


def _how_to_use(options: Options, path: Path) -> str:
    """Says where a checkpoint's autoencoder is, with the weights that were validated."""
    made = path / MODEL if options.ema_decay is None else path / MODEL / "ema"
    return f"the autoencoder is in {made / 'vae'}; put it beside a transformer's folder"


def _make_loss(options: Options, config: VAEConfig, mesh: Mesh, lpips: Network | None) -> AutoencoderLoss:
    weights = AutoencoderConfig(
        options.lambda_gradient, options.lambda_kl, options.lambda_lpips, options.latent_noise
    )
    place = placement(mesh) if mesh.shape["fsdp"] > 1 else None
    network = AutoencoderKL(config, options.dtype, remat=options.gradient_checkpointing, placement=place)
    return AutoencoderLoss(network, weights, LPIPS(lpips, options.dtype) if lpips else None)


def _validation_records(options: Options, data: Data, count: int) -> list[Record]:
    source = data.source
    if options.validation_dir:
        source = open_images([options.validation_dir], options, 0, say).source
    return pick(source, SampleShapes.of_source(source), count, say)


def _discriminator(options: Options) -> PatchDiscriminator:
    return PatchDiscriminator(options.discriminator_width, dtype=options.dtype)


def _trainer(options: Options, loss: AutoencoderLoss, steps: int) -> Trainer:
    """Makes the trainer: of the autoencoder alone, or of autoencoder and discriminator."""
    config, rates, objective = (
        options.optimizer_config(steps),
        {NETWORK: options.learning_rate},
        objective_of(loss.of_batch),
    )
    others = {}
    if options.lambda_adv:
        rates[DISCRIMINATOR] = options.learning_rate_adv
        others[DISCRIMINATOR] = options.discriminator_config(config)
        objective = AdversarialAutoencoder(
            loss, _discriminator(options), options.lambda_adv, options.adversarial_start
        )
    return Trainer(objective, config, rates, others=others, dynamic_scale=options.dynamic_scale)


class _Start(NamedTuple):
    """What training begins with: the trained parts, and the parameters that are not trained."""

    beginning: Beginning
    fixed: Tree


def described(config: VAEConfig) -> str:
    """What identifies a new network's sizes when a run is resumed."""
    values = dataclasses.asdict(config) | {"scaling_factor": 1.0}  # measured later, so it identifies nothing
    # Runs of versions that had no such field have attention, and can be resumed.
    if config.mid_block_add_attention:
        del values["mid_block_add_attention"]
    return json.dumps(values, sort_keys=True)


def _starting_params(options: Options, files: NetworkFiles, mesh: Mesh, new: bool) -> tuple[_Start, str]:
    """Creates new parameters or loads the folder's, and hashes them; a resumed run keeps only the trained ones' shapes."""
    config = dataclasses.replace(_config_of(files), scaling_factor=1.0)

    def parts(key: jax.Array, network: Tree) -> Parts:
        if not options.lambda_adv:
            return {NETWORK: network}
        judge = new_discriminator_params(_discriminator(options), jax.random.fold_in(key, _DISCRIMINATOR))
        return {NETWORK: network, DISCRIMINATOR: judge}

    if options.from_scratch:

        def new_network(key: jax.Array, _: Any) -> Parts:
            return parts(key, new_autoencoder_params(config, key))

        return _Start(Beginning(new_network), {}), f"new, {described(config)}"
    ((params, digest),) = load_networks([files], mesh, jnp.float32)
    fixed = {"encoder": params["encoder"]} if options.train == "decoder" else {}
    trained = {name: part for name, part in params.items() if name not in fixed}
    loaded = trained if new else jax.eval_shape(lambda: trained)
    return _Start(Beginning(parts, loaded), fixed), f"{digest}, {described}"


def _export(config: VAEConfig, validation: AutoencoderValidation, fixed: Tree, state: TrainState) -> Export:
    """Measures the scaling factors, and returns what exports the autoencoder with them."""
    factors = {folder: validation.scaling_factor(tree) for folder, tree in state.exported().items()}
    return partial(_autoencoder_files, config, factors, fixed)


def _autoencoder_files(
    config: VAEConfig, factors: Mapping[str, float], fixed: Tree, state: TrainState
) -> Files:
    """Exports the autoencoder in diffusers' layout; its moving average has its own folder."""
    files: dict[str, TensorStream | str] = {}
    for folder, tree in state.exported().items():
        scaled = dataclasses.replace(config, scaling_factor=factors[folder], shift_factor=None)
        files[f"{folder}vae/{TORCH_STEM}.safetensors"] = base_tensors({**fixed, **tree}, config)
        files[f"{folder}vae/config.json"] = json.dumps(torch_config(scaled), indent=2) + "\n"
    return files
