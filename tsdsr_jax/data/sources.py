"""Which samples a run sees, from its flags: prepared sets, or photographs degraded on the way."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from tsdsr_jax import hints
from tsdsr_jax.data.batches import SampleShapes, first_sample
from tsdsr_jax.data.folder_sets import PreparedFolder
from tsdsr_jax.data.options import CropOptions, DataOptions, PairOptions
from tsdsr_jax.data.photos import Photographs, Survey, left_out, survey
from tsdsr_jax.data.record import Record, Source
from tsdsr_jax.data.shard_sets import PreparedShards, is_sharded
from tsdsr_jax.errors import UserError
from tsdsr_jax.images.search import find_photographs
from tsdsr_jax.weights.prompt_files import load_prompt_embeds
from tsdsr_jax.weights.text_encoders import has_encoders

# What a run needs of its samples.
Parts = Literal["pairs", "latents"]


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained on.

    Attributes:
      source: the samples.
      shapes: what each looks like.
      identity: what a resumed run must agree in.
    """

    source: Source
    shapes: SampleShapes
    identity: Mapping[str, Any]


def open_data(
    options: DataOptions, seed: int, parts: Parts, note: Callable[[str], object], output: Path | None = None
) -> Data:
    """The samples of `--data_dir` or `--hr_dir`.

    Args:
      options: the flags.
      seed: of crops and degradations.
      parts: whether images and their degraded versions are needed, or latents only.
      note: told what is left out.
      output: the run's own folder, whose pictures are no photographs.

    Raises:
      UserError: nothing there, or nothing that can be used.
    """
    if options.data_dir:
        source = open_sets(options.data_dir, parts)
        identity = {}
    else:
        source = _open_photographs(options, seed, parts, note, output)
        # Without pairs nothing is degraded.
        identity = crop_identity(options) | (pair_identity(options) if parts == "pairs" else {})
    return Data(source, SampleShapes.of_source(source), identity | content_identity(source))


def open_images(
    roots: Sequence[Path],
    options: CropOptions,
    seed: int,
    note: Callable[[str], object],
    output: Path | None = None,
) -> Data:
    """Crops of photographs, without anything else; arguments and errors as of `open_data`."""
    found = look_at(roots, options.crop().minimum, note, output)
    degradation = options.degradation()
    source = Photographs(
        found.photographs, options.crop(), degradation, seed, with_lr=False, own_prompts=False
    )
    identity = crop_identity(options) | content_identity(source)
    return Data(source, SampleShapes.of_source(source), identity)


def crop_identity(options: CropOptions) -> dict[str, str]:
    crop = options.crop()
    return {
        "crops": f"{crop.height}×{crop.width} of photographs of at least {crop.minimum}² pixels",
        "sharpening": str(options.sharpen_gt),
    }


def pair_identity(options: PairOptions) -> dict[str, str]:
    return {"jpeg": options.jpeg, "degradation": options.degradation_strength}


def content_identity(source: Source) -> dict[str, str]:
    return {"data set": f"{len(source)} samples", "data set's content": source.fingerprint()}


def open_sets(roots: Sequence[Path], parts: Parts = "pairs") -> Source:
    """One or several prepared sets of either layout as one.

    Raises:
      UserError: missing, unfinished, or made differently from each other.
    """
    images = parts == "pairs"
    sets = [
        PreparedShards(root, images) if is_sharded(root) else PreparedFolder(root, images) for root in roots
    ]
    if len(sets) == 1:
        return sets[0]
    first = SampleShapes.of_source(sets[0])
    for root, source in zip(roots[1:], sets[1:], strict=True):
        if difference := first.difference(first_sample(source)[1]):
            raise UserError(f"{root}: cannot be joined with {roots[0]}: {difference}")
    return Joined(sets)


class Joined:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[Source, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which], index - (int(self._ends[which - 1]) if which else 0)

    def read(self, index: int, epoch: int = 0) -> Record:
        source, index = self._locate(index)
        return source.read(index, epoch)

    def name(self, index: int) -> str:
        source, index = self._locate(index)
        return source.name(index)

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(source.fingerprint() for source in self.sources).encode()).hexdigest()


def look_at(
    roots: Sequence[Path], minimum: int, note: Callable[[str], object], output: Path | None = None
) -> Survey:
    """`survey` with a progress bar; tells what is left out. Images below `output` are none of the photographs."""
    found_below = [(path, root) for root in roots for path in find_photographs(root, output)]
    # A folder may be given twice, or lie in another.
    files = list({os.path.realpath(path): (path, root) for path, root in reversed(found_below)}.values())[
        ::-1
    ]
    with tqdm(total=len(files), desc="looking at photographs", leave=False, disable=None) as bar:
        found = survey(files, minimum, bar.update)
    for line in left_out(found, minimum):
        note(line)
    return found


def _open_photographs(
    options: DataOptions, seed: int, parts: Parts, note: Callable[[str], object], output: Path | None
) -> Photographs:
    crop = options.crop()
    found = look_at(options.hr_dir, crop.minimum, note, output)
    source = Photographs(found.photographs, crop, options.degradation(), seed, with_lr=parts == "pairs")
    if lacking := [
        photo.name for photo, prompt in zip(found.photographs, source.prompts, strict=True) if not prompt
    ]:
        if len(lacking) < len(source):
            source.default = load_prompt_embeds(options.default_embedding_dir)
            note(
                f"{len(lacking)} of {len(source)} photographs have no prompt embedding beside them and get the default "
                f"prompt's: {', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}"
            )
        texts = sum(photo.path.with_suffix(".txt").is_file() for photo in found.photographs)
        if texts:
            read = f"{texts} photographs have a .txt beside them, which is read only when a set is prepared"
            note(f"{read}{_how_to_prepare(options, output, whole=texts == len(source))}")
    return source


def _how_to_prepare(options: DataOptions, output: Path | None, whole: bool) -> str:
    """The command that prepares the photographs with their texts, where the model can encode them."""
    flags = hints.given(options, *hints.MODEL, "hr_dir", *hints.CROPS)
    if output is None or not has_encoders(flags.get("pretrained_model_name_or_path", "")):
        return ", by train/prepare.py --prompts txt and a model with text encoders"
    prompts = "txt" if whole else "txt_or_default"
    target = hints.new_folder(output, "set")
    return f": {hints.command('train/prepare.py', **flags, prompts=prompts, output_dir=target)}"
