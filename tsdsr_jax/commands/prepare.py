"""Prepares a training set from photographs: crops, degraded versions, latents and prompt embeddings.

    # look at the degradation first; needs no model
    python train/prepare.py --hr_dir PHOTOS --preview degraded.png
    # one random 512×512 crop of each photograph; the default prompt's embedding for all
    python train/prepare.py --hr_dir PHOTOS --output_dir prepared --pretrained_model_name_or_path SD3
        --default_embedding_dir dataset/default
    # captions in a .txt beside each photograph, encoded on a GPU; the work shared by two machines
    python train/prepare.py --hr_dir PHOTOS --output_dir prepared --pretrained_model_name_or_path SD3
        --prompts txt --prompt_device cuda --shard 0/2

Interrupt it whenever you like; the same flags again go on where it was. To train without preparing anything, give the
photographs to train/distill.py --hr_dir.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from tsdsr_jax import cli, hints
from tsdsr_jax.atomic import replacing
from tsdsr_jax.cli import check_writable
from tsdsr_jax.commands.groups import PREPARING
from tsdsr_jax.data.batches import first_sample, read_ahead
from tsdsr_jax.data.crops import Crops, Pairs, Planned, SetLayout, plan
from tsdsr_jax.data.degradation import degrade, to_bytes
from tsdsr_jax.data.options import PairOptions
from tsdsr_jax.data.photos import MAX_PIXELS, Photograph, Photographs, Survey, own_prompt, random_crop
from tsdsr_jax.data.preparation import Embedder, PromptChoice, Prompts, find_prompts, finish
from tsdsr_jax.data.shard_sets import read_manifest
from tsdsr_jax.data.sources import look_at, open_sets
from tsdsr_jax.data.writers import Manifest, SetPlan, Writer, make_writer
from tsdsr_jax.devices import DTYPES, cores, keep_programs, matmul_precision
from tsdsr_jax.errors import UserError
from tsdsr_jax.identity import versions
from tsdsr_jax.images.files import read_photo
from tsdsr_jax.images.sheet import comparison_sheet
from tsdsr_jax.training.checkpoint import Hash
from tsdsr_jax.training.latents import LatentEncoder
from tsdsr_jax.training.networks import Networks, load_text, text_hash
from tsdsr_jax.training.sharding import make_mesh
from tsdsr_jax.weights import prompt_hints
from tsdsr_jax.weights.bundled import is_bundled, prompt_folder
from tsdsr_jax.weights.prompt_files import DEFAULT_PROMPT, PromptEmbeds, load_prompt_embeds
from tsdsr_jax.weights.sd3_folder import Checkpoint, check_fit, open_checkpoint
from tsdsr_jax.weights.text_encoders import EncoderOptions, find_encoders

PREVIEW_DRAWS = 3
SHEET_MARK = ("Comment", "degraded samples by tsdsr_jax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(PairOptions):
    hr_dir: tuple[Path, ...]
    """Folder of photographs, searched with its subfolders; repeat for several."""
    output_dir: Path | None = None
    """Folder for the set."""
    pretrained_model_name_or_path: cli.PathOrName | None = None
    """SD3, whose autoencoder makes the latents: a diffusers folder, a hub id, or a folder written by convert/sd3.py."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    variant: str | None = None
    """File-name variant of the weights, such as fp16."""

    layout: SetLayout = "shards"
    """A few large files that hold each prompt once, or the original's folders, one file per sample and kind."""
    crops: Crops = "random"
    """Random crops, as many as fit side by side, or whole photographs; training takes one size."""
    crops_per_photo: int = 1
    """Of --crops random."""
    samples_per_file: int = 256
    """Of --layout shards; an interrupted run makes at most so many again."""
    seed: int = 0
    """Of crops, degradations and latents."""
    batch_size: int = 4
    """Images per device that are encoded together."""
    dataloader_num_workers: int | None = None
    """Processes that crop and degrade; 0: threads. Default: one per core."""
    shard: str = "0/1"
    """Share the work between machines: i/n is the i-th of n, from 0."""

    prompts: PromptChoice = "default"
    """TSD-SR's default prompt for all; the .txt beside each photograph; or that where there is one, else the default."""
    default_embedding_dir: Path | None = None
    """Embeddings of the default prompt; without, it is encoded. Default with weights/tiny: its own."""
    text_encoder_path: cli.PathOrName | None = None
    """A folder or hub id with SD3's text encoders, if the model's has none."""
    no_t5: bool = False
    """Leave T5 out: zeros take its place, as in SD3's pipeline."""
    prompt_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Of the text encoders; embeddings are stored in float16."""
    prompt_device: str = "cpu"
    """Where the text encoders run: cpu, cuda or cuda:N."""
    prompt_batch_size: int = 8
    """Texts per forward pass."""
    max_sequence_length: int = 256
    """T5 tokens."""

    preview: Path | None = None
    """Write a sheet of degraded samples here, and do nothing else."""
    preview_photos: int = 6
    """Photographs on it."""

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
        if self.dataloader_num_workers is not None:
            return self.dataloader_num_workers
        return cores()


def main() -> None:
    options = cli.parse(Options, description=__doc__, groups=PREPARING)
    check(options)
    model = find_model(options)
    options = completed(options, model)
    if options.prompt_device != "cpu":
        # The text encoders are PyTorch's and share the GPU; JAX would take three quarters of it at its first word.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    found = look_at(options.hr_dir, options.crop().minimum, tqdm.write, options.output_dir)
    if options.preview:
        preview(options, found)
    else:
        prepare(options, model, found)


def find_model(options: Options) -> Checkpoint | None:
    """None for a preview without one."""
    name = options.pretrained_model_name_or_path
    return open_checkpoint(name, options.revision, options.variant) if name else None


def completed(options: Options, model: Checkpoint | None) -> Options:
    """With the defaults that depend on the model."""
    options = options.fitted(model.longest_side) if model else options
    if options.default_embedding_dir is None and is_bundled(options.pretrained_model_name_or_path):
        prompt = prompt_folder(options.pretrained_model_name_or_path, "default")
        return dataclasses.replace(options, default_embedding_dir=prompt)
    return options


def check(options: Options) -> None:
    """Refuses flags that cannot work, before anything is looked at."""
    options.check_crop()
    cli.share(options.shard)
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
        check_sheet(options.preview)
    else:
        for name in ("output_dir", "pretrained_model_name_or_path"):
            if getattr(options, name) is None:
                raise UserError(f"--{name} must be given, unless for a --preview")
        check_writable(options.output_dir)


def check_sheet(path: Path) -> None:
    """Refuses to write the sheet over anything but an earlier one."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--preview {path}: expected a name that ends in .png")
    if path.exists():
        try:
            with Image.open(path) as image:
                earlier = image.info.get(SHEET_MARK[0]) == SHEET_MARK[1]
        except OSError:
            earlier = False
        if not earlier:
            raise UserError(
                f"--preview {path}: is there already and no sheet of this program; choose another name"
            )


# --- the sheet ------------------------------------------------------------------------------------


def preview(options: Options, found: Survey) -> None:
    """Photographs spread evenly, each with its sharpened version and a few degraded ones."""
    count = min(options.preview_photos, len(found.photographs))
    rows = []
    for index in range(count):
        crop = first_crop(options, found.photographs[index * len(found.photographs) // count :], index)
        generator = np.random.default_rng([options.seed, index, 1])
        pairs = [degrade(crop, generator, options.degradation()) for _ in range(PREVIEW_DRAWS)]
        images = to_bytes(crop), pairs[0].hr, *(pair.lr for pair in pairs)
        rows.append([Image.fromarray(image) for image in images])
    target = "target (sharpened)" if options.sharpen_gt else "target"
    titles = ["photograph", target, *(f"degraded {draw + 1}" for draw in range(PREVIEW_DRAWS))]
    sheet, mark = comparison_sheet(rows, titles, cell_width=min(384, options.crop().width)), PngInfo()
    mark.add_text(*SHEET_MARK)
    with replacing(options.preview) as temporary:
        sheet.save(temporary, format="png", pnginfo=mark)
    print(f"{options.preview}: {count} photographs, {PREVIEW_DRAWS} draws each")


def first_crop(options: Options, photographs: Sequence[Photograph], index: int) -> np.ndarray:
    """A random crop, float32 in [0, 1], of the first of them that can be read."""
    for photograph in photographs:
        try:
            photo = read_photo(photograph.path, MAX_PIXELS).rgb
        except UserError as error:
            tqdm.write(f"left out: {error}")
            continue
        generator = np.random.default_rng([options.seed, index])
        return random_crop(photo, options.crop(), generator).astype(np.float32) / 255
    raise UserError("none of the photographs can be read")


# --- the set --------------------------------------------------------------------------------------


def prepare(options: Options, model: Checkpoint, found: Survey) -> None:
    check_fit(model.network("transformer"), model.network("vae"))
    photographs = Photographs(
        found.photographs, options.crop(), options.degradation(), options.seed, own_prompts=False
    )
    samples = plan(found.photographs, options.crops, options.crop(), options.crops_per_photo)
    note_sizes(options, samples)
    prompts = find_prompts(found.photographs, options.prompts)
    known = known_prompts(options, model)
    settings = describe(options, photographs, samples, prompts, known, model)
    manifest = Manifest(options.output_dir, options.layout, settings, cli.share(options.shard))
    manifest.check()
    set_plan = SetPlan(names(found, samples), [prompts.of[sample.photograph] for sample in samples], prompts)
    writer = make_writer(
        options.layout, options.output_dir, set_plan, cli.share(options.shard), options.samples_per_file
    )
    note_quirks(options, found)
    # Texts first: their encoders, PyTorch's, need the memory that JAX would take.
    write_prompts(options, writer, prompts, known, manifest)
    write_samples(options, photographs, samples, model, writer, manifest)
    if report(options, found, writer, manifest, len(samples)):
        print(how_to_use(options, model))


def names(found: Survey, samples: list[Planned]) -> list[str]:
    """Of all samples: the photograph's, and the crop's number."""
    return [f"{found.photographs[sample.photograph].name}#{sample.number}" for sample in samples]


def note_sizes(options: Options, samples: list[Planned]) -> None:
    sizes = {(sample.box.height, sample.box.width) for sample in samples if sample.box}
    if len(sizes) > 1:
        tqdm.write(
            f"note: --crops {options.crops} gives {len(sizes)} different sizes; a training run takes samples of one size, "
            "that of the first, and ends where more than --max_bad_samples have another"
        )


def note_quirks(options: Options, found: Survey) -> None:
    if beside := sum(own_prompt(photograph.path) is not None for photograph in found.photographs):
        tqdm.write(
            f"note: {beside} photographs have an embedding beside them, which only train/distill.py --hr_dir reads; here "
            "texts are encoded with --prompts txt"
        )
    if options.layout == "folders" and "gt" in str(options.output_dir.resolve() / "gt").removesuffix("gt"):
        tqdm.write(
            f'note: {options.output_dir}: the original\'s loader replaces "gt" anywhere in a path and cannot read a '
            "set below such a folder; this project can"
        )


def known_prompts(options: Options, model: Checkpoint) -> dict[str, PromptEmbeds]:
    """The default prompt's embedding, where its folder is given."""
    if options.default_embedding_dir is None:
        return {}
    config = model.network("transformer").config
    return {DEFAULT_PROMPT: load_text(options, "default", config)}


def describe(
    options: Options,
    photographs: Photographs,
    samples: list[Planned],
    prompts: Prompts,
    known: dict[str, PromptEmbeds],
    model: Checkpoint,
) -> dict[str, Any]:
    """What decides the set's content; as it comes back from JSON."""
    digest = Hash()
    for path, array in model.network("vae").leaves():
        digest.add(path, array)
    encoders = options.text_encoder_path or options.pretrained_model_name_or_path
    settings = {
        "photographs": photographs.fingerprint(),
        "samples": len(samples),
        "seed": options.seed,
        "crops": options.crops,
        "crop": dataclasses.asdict(options.crop()),
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


def write_prompts(
    options: Options, writer: Writer, prompts: Prompts, known: dict[str, PromptEmbeds], manifest: Manifest
) -> None:
    def encoders() -> Path:
        name = options.text_encoder_path or options.pretrained_model_name_or_path
        return find_encoders(name, options.revision, options.variant, not options.no_t5)

    embedder = Embedder(known, encoders, options.encoder_options())

    def embed(texts: Sequence[str]) -> list[PromptEmbeds]:
        embeds = embedder(texts)
        # Only now: flags that turn out not to work leave nothing behind.
        manifest.begin()
        return embeds

    with tqdm(total=len(prompts.texts), desc="prompts", leave=False, disable=None) as bar:
        writer.write_prompts(embed, bar.update)


def write_samples(
    options: Options,
    photographs: Photographs,
    samples: list[Planned],
    model: Checkpoint,
    writer: Writer,
    manifest: Manifest,
) -> None:
    known_bad = manifest.problems()
    pending = writer.pending(known_bad)
    if not pending:
        return
    manifest.begin()
    keep_programs()
    dtype = DTYPES["fp32"]
    with matmul_precision(dtype):
        networks = Networks(model.network("transformer"), model.network("vae"), make_mesh(), dtype)
        ((vae, _),) = networks.load([networks.vae])
        encoder = LatentEncoder(networks, vae, options.batch_size, options.seed)
        pairs = Pairs(photographs, [samples[position] for position in pending], options.layout)
        with (
            closing(read_ahead(pairs, options.workers)) as made,
            tqdm(total=len(pending), desc="samples", unit="sample", smoothing=0.05, disable=None) as bar,
        ):
            try:
                for sample in finish(pending, made, encoder):
                    if sample.problem:
                        tqdm.write(f"left out: {sample.problem}")
                    if sample.problem or sample.position in known_bad:
                        manifest.note_problem(sample.position, sample.problem)
                    writer.add(sample)
                    bar.update()
            finally:
                writer.close()


def report(options: Options, found: Survey, writer: Writer, manifest: Manifest, planned: int) -> bool:
    """Says what there is now; whether it is all."""
    more = {"planned": planned, "small": found.small, "unreadable": found.unreadable, "versions": versions()}
    missing = manifest.finish(writer, more)
    if missing:
        of = cli.share(options.shard).of
        others = "run the same command again" if of == 1 else f"those of the {of - 1} other parts, perhaps"
        print(f"{options.output_dir}: this part is done; {missing} pieces are missing, {others}")
        return False
    made, problems = sum(read_manifest(options.output_dir)["samples"]), manifest.problems()
    size = sum(path.stat().st_size for path in options.output_dir.rglob("*") if path.is_file())
    if not made:
        raise UserError(f"{options.output_dir}: none of the {planned} samples could be made")
    print(
        f"{options.output_dir}: {made} samples, {size / 1e6:.1f} MB, {size / made / 1e6:.2f} MB each"
        + (f"; {len(problems)} could not be made" if problems else "")
    )
    return True


def how_to_use(options: Options, model: Checkpoint) -> str:
    """The command that trains on the set, and before it the one that makes the empty prompt where that is not there."""
    null, made = find_null(options)
    flags = {"data_dir": options.output_dir}
    flags |= hints.given(options, *hints.MODEL, "default_embedding_dir") | {"null_embedding_dir": null}
    if model.merged:  # there is no teacher in it that TSD could learn from
        flags["lambda_tsd"] = 0
    training = hints.distilling(options.output_dir, flags)
    if made:
        return f"train on it: {training}"
    how = prompt_hints.how_to_encode(options, "null", null)
    return f"training needs the empty prompt's embedding in {null}. {how}\nthen train on it: {training}"


def find_null(options: Options) -> tuple[Path, bool]:
    """The folder of the empty prompt's embedding, in the form of the set's prompts, and whether it is there."""
    usual = prompt_folder(options.pretrained_model_name_or_path, "null")
    beside = options.default_embedding_dir.parent / "null" if options.default_embedding_dir else usual
    wanted = first_sample(open_sets([options.output_dir]))[1].prompt.shape
    for folder in (beside, usual):
        with suppress(UserError):
            if load_prompt_embeds(folder).prompt.shape == wanted:
                return folder, True
    return (hints.new_folder(options.output_dir, "null") if usual.exists() else usual), False
