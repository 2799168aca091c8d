"""Prepares a training set from photographs: crops, degraded versions, latents and prompt embeddings.

    # look at the degradation first; needs no model
    python train/prepare.py --hr_dir PHOTOS --preview degraded.png
    # one random 512×512 crop of each photograph; the default prompt's embedding for all
    python train/prepare.py --hr_dir PHOTOS --output_dir prepared --pretrained_model_name_or_path SD3
        --default_embedding_dir dataset/default
    # captions in a .txt beside each photograph, encoded on a GPU; two machines share the work
    python train/prepare.py --hr_dir PHOTOS --output_dir prepared --pretrained_model_name_or_path SD3
        --prompts txt --prompt_device cuda --shard 0/2

You can interrupt it at any time; run the same command again to continue. To train without preparing a set, give the
photographs to train/distill.py --hr_dir.
"""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from tsdsr_jax import cli, hints
from tsdsr_jax.cli import check_writable
from tsdsr_jax.commands.groups import PREPARING
from tsdsr_jax.compile_watch import CompileWatch, say_above_bar
from tsdsr_jax.data import preparation
from tsdsr_jax.data.batches import SampleShapes
from tsdsr_jax.data.crops import Crops, Planned, SetLayout, plan
from tsdsr_jax.data.manifest import read_manifest
from tsdsr_jax.data.manifest_writer import ManifestWriter
from tsdsr_jax.data.options import PairOptions
from tsdsr_jax.data.photos import CROP_STEP, CropConfig, Photographs, Survey, own_prompt
from tsdsr_jax.data.preview import PREVIEW_DRAWS, check_preview_path, write_preview_sheet
from tsdsr_jax.data.set_prompts import Embedder, PromptChoice, Prompts, find_prompts
from tsdsr_jax.data.sources import look_at, open_sets
from tsdsr_jax.data.writers import SetPlan, SetWriter, make_writer
from tsdsr_jax.devices import DTYPES, cores, matmul_precision
from tsdsr_jax.errors import UserError
from tsdsr_jax.identity import versions
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.program_cache import keep_programs
from tsdsr_jax.storage import is_copy
from tsdsr_jax.training.checkpoint import Hash
from tsdsr_jax.training.latents import LatentEncoder
from tsdsr_jax.training.networks import Networks, load_text, text_hash
from tsdsr_jax.training.sharding import make_mesh
from tsdsr_jax.weights import prompt_hints
from tsdsr_jax.weights.bundled import is_bundled, prompt_folder
from tsdsr_jax.weights.prompt_files import DEFAULT_PROMPT, PromptEmbeds, load_prompt_embeds
from tsdsr_jax.weights.sd3_folder import Checkpoint, check_fit, open_checkpoint
from tsdsr_jax.weights.text_encoders import EncoderOptions, find_encoders


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    hr_dir: tuple[Path, ...]
    """Folder of photographs, including its subfolders; repeat the flag for several folders."""
    output_dir: Path | None = None
    """Folder to write the set to; required unless you ask for a --preview."""
    pretrained_model_name_or_path: cli.PathOrName | None = None
    """SD3, whose autoencoder makes the latents: a diffusers folder, a hub id, or a folder written by convert/sd3.py; also
    required unless you ask for a --preview."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """Variant of the weight files to read, such as fp16."""

    layout: SetLayout = "shards"
    """shards: a few large files that store each prompt once; folders: the original's, one file per sample and kind."""
    crops: Crops = "random"
    """random: random crops; grid: as many crops as fit side by side; whole: whole photographs. A training run needs samples
    of one size."""
    crops_per_photo: int = 1
    """Number of random crops of each photograph."""
    samples_per_file: int = 256
    """Samples per file of --layout shards; also the most that an interrupted run has to make again."""
    seed: int = 0
    """Seed of crops, degradations and latents."""
    batch_size: int = 4
    """Images per device that are encoded together."""
    dataloader_num_workers: int | None = None
    """Processes that crop and degrade; 0 uses threads. Default: one per core."""
    shard: str | None = None
    """Share the work between machines: i/n makes the i-th of n parts, counted from 0. Default: each process that srun,
    mpirun or torchrun has started makes its part."""

    prompts: PromptChoice = "default"
    """default: TSD-SR's default prompt for all photographs; txt: the text in the .txt beside each; txt_or_default: that text
    if there is one, otherwise the default."""
    default_embedding_dir: Path | None = None
    """Folder with the default prompt's embedding. Default: for weights/tiny, its own; otherwise the prompt is encoded."""
    text_encoder_path: cli.PathOrName | None = None
    """A folder or hub id with SD3's text encoders, if the model has none."""
    no_t5: bool = False
    """Leave out T5 and use zeros in its place, as SD3's pipeline can."""
    prompt_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Precision of the text encoders; embeddings are stored in float16."""
    prompt_device: str = "cpu"
    """Where the text encoders run: cpu, cuda or cuda:N."""
    prompt_batch_size: int = 8
    """Texts that are encoded together."""
    max_sequence_length: int = 256
    """Number of T5 tokens."""

    preview: Path | None = None
    """Write only a sheet of degraded samples, to this PNG file."""
    preview_photos: int = 6
    """Number of photographs on the sheet."""

    def smallest_crop(self) -> CropConfig:
        """What every photograph must hold: a crop, or, if samples are whole photographs, the smallest possible sample."""
        if self.crops != "whole" or self.preview:
            return self.crop()
        return dataclasses.replace(self.crop(), height=CROP_STEP, width=CROP_STEP)

    def encoder_options(self) -> EncoderOptions:
        return EncoderOptions(
            dtype=self.prompt_dtype,
            device=self.prompt_device,
            max_sequence_length=self.max_sequence_length,
            batch_size=self.prompt_batch_size,
            use_t5=not self.no_t5,
            variant=self.variant,
        )

    @property
    def workers(self) -> int:
        return cores() if self.dataloader_num_workers is None else self.dataloader_num_workers


def main() -> None:
    options = cli.parse(Options, description=__doc__, groups=PREPARING)
    _check(options)
    model = _find_model(options)
    options = _completed(options, model)
    if options.prompt_device != "cpu":
        # The text encoders run in PyTorch on the same GPU, of whose memory JAX would otherwise reserve most.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = look_at(options.hr_dir, options.smallest_crop(), tqdm.write, options.output_dir)
    if options.preview:
        _preview(options, options.preview, found)
    else:
        assert model and options.output_dir, "_check refuses their absence"
        _prepare(options, options.output_dir, model, found)


def _check(options: Options) -> None:
    """Refuses flags that cannot work, before any file is read."""
    options.check_crop()
    part = cli.share(options.shard)
    if options.crops != "random" and len(set(options.photo_side)) > 1:
        raise UserError(
            f"--photo_side {' '.join(map(str, options.photo_side))}: expected one number with --crops {options.crops}"
        )
    options.encoder_options()
    cli.at_least(
        options,
        1,
        "crops_per_photo",
        "samples_per_file",
        "batch_size",
        "preview_photos",
        "max_sequence_length",
    )
    cli.at_least(options, 0, "seed", "dataloader_num_workers")
    if options.preview is not None:
        check_preview_path(options.preview)
        return
    for name in ("output_dir", "pretrained_model_name_or_path"):
        if getattr(options, name) is None:
            raise UserError(f"--{name} is required, except with --preview")
    if options.output_dir is not None:
        check_writable(options.output_dir)
        if part.of > 1 and is_copy(options.output_dir):
            raise UserError(
                f"--output_dir {options.output_dir}: several processes cannot write one set in a store; give a folder on a "
                "file system that they share, and copy it there"
            )


def _find_model(options: Options) -> Checkpoint | None:
    """The model; None for a preview without one."""
    name = options.pretrained_model_name_or_path
    return open_checkpoint(name, options.revision, options.variant) if name else None


def _completed(options: Options, model: Checkpoint | None) -> Options:
    """Fills in the defaults that depend on the model."""
    options = options.fitted(model.longest_side) if model else options
    if options.default_embedding_dir is None and is_bundled(options.pretrained_model_name_or_path):
        prompt = prompt_folder(options.pretrained_model_name_or_path, "default")
        return dataclasses.replace(options, default_embedding_dir=prompt)
    return options


def _preview(options: Options, path: Path, found: Survey) -> None:
    shown = write_preview_sheet(
        path,
        found.photographs,
        options.preview_photos,
        options.crop(),
        options.degradation(),
        options.seed,
        tqdm.write,
    )
    print(f"{path}: {shown} photographs, each degraded {PREVIEW_DRAWS} times")


# --- the set --------------------------------------------------------------------------------------


def _prepare(options: Options, output: Path, model: Checkpoint, found: Survey) -> None:
    check_fit(model.network("transformer"), model.network("vae"))
    photographs = Photographs(
        found.photographs, options.smallest_crop(), options.degradation(), options.seed, own_prompts=False
    )
    samples = plan(found.photographs, options.crops, options.smallest_crop(), options.crops_per_photo)
    _note_sizes(options, samples)
    prompts = find_prompts(found.photographs, options.prompts)
    known = _known_prompts(options, model)
    settings = _settings(options, photographs, samples, prompts, known, model)
    part = cli.share(options.shard)
    manifest = ManifestWriter(output, options.layout, settings, part)
    manifest.check()
    names = [f"{found.photographs[sample.photograph].name}#{sample.number}" for sample in samples]
    set_plan = SetPlan(names, [prompts.of[sample.photograph] for sample in samples], prompts)
    writer = make_writer(options.layout, output, set_plan, part, options.samples_per_file)
    _note_quirks(options, output, found)
    # Texts first: their encoders, in PyTorch, need the memory that JAX takes later.
    embed = Embedder(known, lambda: _encoders(options), options.encoder_options())
    preparation.write_prompts(writer, manifest, len(prompts.texts), embed)
    if pending := writer.pending(manifest.problems()):
        manifest.begin()
        planned = preparation.PlannedPairs(photographs, samples, options.layout, options.workers)
        _write_samples(options, pending, planned, model, writer, manifest)
    if _report(options, output, found, writer, manifest, len(samples)):
        print(_how_to_use(options, output, model))


def _note_sizes(options: Options, samples: list[Planned]) -> None:
    sizes = {(sample.box.height, sample.box.width) for sample in samples if sample.box}
    if len(sizes) > 1:
        tqdm.write(
            f"note: --crops {options.crops} gives {len(sizes)} different sizes; a training run uses only the samples that "
            "have the size of the first, and stops if more than --max_bad_samples have another"
        )


def _note_quirks(options: Options, output: Path, found: Survey) -> None:
    if beside := sum(own_prompt(photograph.path) is not None for photograph in found.photographs):
        tqdm.write(
            f"note: {beside} photographs have an embedding beside them, which only train/distill.py --hr_dir reads; to "
            "encode the texts beside them, use --prompts txt"
        )
    if options.layout == "folders" and "gt" in str(output.resolve() / "gt").removesuffix("gt"):
        tqdm.write(
            f'note: {output}: the original\'s loader replaces "gt" anywhere in a path, so it cannot read a set in such a '
            "folder; this project can"
        )


def _known_prompts(options: Options, model: Checkpoint) -> dict[str, PromptEmbeds]:
    """The default prompt's embedding, if its folder is given."""
    if options.default_embedding_dir is None:
        return {}
    config = model.network("transformer").config
    assert isinstance(config, MMDiTConfig)
    return {DEFAULT_PROMPT: load_text(options, "default", config)}


def _settings(
    options: Options,
    photographs: Photographs,
    samples: list[Planned],
    prompts: Prompts,
    known: dict[str, PromptEmbeds],
    model: Checkpoint,
) -> dict[str, Any]:
    """Everything that decides the set's content, as JSON returns it."""
    digest = Hash()
    for path, array in model.network("vae").leaves():
        digest.add(path, array)
    encoders = options.text_encoder_path or options.pretrained_model_name_or_path
    crop = dataclasses.asdict(options.crop())
    # The photographs' fingerprint tells; sets made before there was a choice go on.
    for name, default in (("small", "leave_out"), ("side", None)):
        if crop[name] == default:
            del crop[name]
    settings = {
        "photographs": photographs.fingerprint(),
        "samples": len(samples),
        "seed": options.seed,
        "crops": options.crops,
        "crop": crop,
        "crops_per_photo": options.crops_per_photo if options.crops == "random" else None,
        "samples_per_file": options.samples_per_file if options.layout == "shards" else None,
        "degradation": dataclasses.asdict(options.degradation()),
        "autoencoder": digest.value(),
        "prompts": prompts.fingerprint(),
        "default prompt": text_hash(known[DEFAULT_PROMPT]) if known else None,
        "text encoders": None
        if set(prompts.texts) <= known.keys()
        else f"{encoders}, {options.prompt_dtype}, {options.max_sequence_length} tokens"
        + ", no T5" * options.no_t5,
    }
    return json.loads(json.dumps(settings))


def _encoders(options: Options) -> Path:
    name = options.text_encoder_path or options.pretrained_model_name_or_path
    assert name, "_check refuses its absence"
    return find_encoders(name, options.revision, options.variant, not options.no_t5)


def _write_samples(
    options: Options,
    pending: list[int],
    planned: preparation.PlannedPairs,
    model: Checkpoint,
    writer: SetWriter,
    manifest: ManifestWriter,
) -> None:
    keep_programs(say_above_bar)
    dtype = DTYPES["fp32"]
    with matmul_precision(dtype), CompileWatch():
        networks = Networks(model.network("transformer"), model.network("vae"), make_mesh(), dtype)
        ((vae, _),) = networks.load([networks.vae])
        encoder = LatentEncoder(networks, vae, options.batch_size, options.seed)
        preparation.write_samples(pending, planned, encoder, writer, manifest)


def _report(
    options: Options, output: Path, found: Survey, writer: SetWriter, manifest: ManifestWriter, planned: int
) -> bool:
    """Prints what has been made. Returns whether the set is complete."""
    more = {
        "planned": planned,
        "small": found.small,
        "smaller_than_crops": found.below_crop,
        "unreadable": found.unreadable,
        "versions": versions(),
    }
    missing = manifest.finish(writer, more)
    if missing:
        of = cli.share(options.shard).of
        others = "run the same command again" if of == 1 else "perhaps from the parts of other machines"
        print(f"{output}: this part is done; {missing} pieces are missing, {others}")
        return False
    made, problems = sum(read_manifest(output)["samples"]), manifest.problems()
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if not made:
        raise UserError(f"{output}: none of the {planned} samples could be made")
    print(
        f"{output}: {made} samples, {size / 1e6:.1f} MB, {size / made / 1e6:.2f} MB each"
        + (f"; {len(problems)} could not be made" if problems else "")
    )
    return True


# --- what to do next ------------------------------------------------------------------------------


def _how_to_use(options: Options, output: Path, model: Checkpoint) -> str:
    """The command that trains on the set, and first the one that encodes the empty prompt if it is missing."""
    null, found = _find_null(options, output)
    flags: dict[str, Any] = {"data_dir": output}
    flags |= hints.given(options, *hints.MODEL, "default_embedding_dir") | {"null_embedding_dir": null}
    if model.merged:  # a merged model contains no teacher for TSD
        flags["lambda_tsd"] = 0
    training = hints.distilling(output, flags)
    if found:
        return f"train on it: {training}"
    how = prompt_hints.how_to_encode(options, "null", null)
    return f"training needs the empty prompt's embedding in {null}. {how}\nthen train on it: {training}"


def _find_null(options: Options, output: Path) -> tuple[Path, bool]:
    """The folder for the empty prompt's embedding, in the shape of the set's prompts, and whether it is there."""
    usual = prompt_folder(options.pretrained_model_name_or_path, "null")
    beside = options.default_embedding_dir.parent / "null" if options.default_embedding_dir else usual
    wanted = SampleShapes.of_source(open_sets([output])).prompt
    for folder in (beside, usual):
        with suppress(UserError):
            if load_prompt_embeds(folder).prompt.shape == wanted:
                return folder, True
    return (hints.new_folder(output, "null") if usual.exists() else usual), False
