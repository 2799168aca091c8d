"""Opens the samples that a run's flags name: prepared sets, or photographs that are degraded during training."""

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
from tsdsr_jax.data.manifest import is_sharded
from tsdsr_jax.data.options import CropOptions, DataOptions, PairOptions
from tsdsr_jax.data.photos import CropConfig, Photographs, Survey, left_out, survey
from tsdsr_jax.data.record import Record, Source
from tsdsr_jax.data.shard_sets import PreparedShards
from tsdsr_jax.data.sizes import Found, KnownSize, KnownSizes
from tsdsr_jax.errors import UserError
from tsdsr_jax.exchange import from_first, of_everyone, shared_out
from tsdsr_jax.images.search import beside, composed, find_photographs
from tsdsr_jax.weights.prompt_files import load_prompt_embeds
from tsdsr_jax.weights.text_encoders import has_encoders

# What a run needs from its samples.
Parts = Literal["pairs", "latents"]


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
      source: the samples.
      shapes: their shapes.
      identity: settings that must stay the same when the run resumes.
    """

    source: Source
    shapes: SampleShapes
    identity: Mapping[str, Any]


def open_data(
    options: DataOptions, seed: int, parts: Parts, note: Callable[[str], object], output: Path | None = None
) -> Data:
    """Opens the samples of `--data_dir` or `--hr_dir`.

    Args:
      options: the flags.
      seed: seed of crops and degradations.
      parts: `pairs`: images and their degraded versions; `latents`: only what latents need.
      note: called with messages about photographs that are left out.
      output: the run's output folder; images in it are ignored.

    Raises:
      UserError: there are no samples that can be used.
    """
    if options.data_dir:
        source: Source = open_sets(options.data_dir, parts)
        identity: dict[str, str] = {}
    else:
        source = _open_photographs(options, seed, parts, note, output)
        # Without pairs, nothing is degraded.
        identity = crop_identity(options) | (pair_identity(options) if parts == "pairs" else {})
        if prompts := _prompts_of(source):
            identity["photographs' prompts"] = prompts
    return Data(source, SampleShapes.of_source(source), identity | content_identity(source))


def open_images(
    roots: Sequence[Path],
    options: CropOptions,
    seed: int,
    note: Callable[[str], object],
    output: Path | None = None,
) -> Data:
    """Opens crops of photographs, undegraded and without prompts; see `open_data` for arguments and errors."""
    found = look_at(roots, options.crop(), note, output)
    degradation = options.degradation()
    source = Photographs(
        found.photographs, options.crop(), degradation, seed, with_lr=False, own_prompts=False
    )
    identity = crop_identity(options) | content_identity(source)
    return Data(source, SampleShapes.of_source(source), identity)


def crop_identity(options: CropOptions) -> dict[str, str]:
    crop = options.crop()
    small = {"leave_out": "", "enlarge": ", smaller ones enlarged", "mirror": ", smaller ones mirrored"}
    side = ", longer side {} to {}".format(*crop.side) if crop.side else ""
    return {
        "crops": f"{crop.height}×{crop.width} of photographs of at least {crop.minimum}² pixels{small[crop.small]}{side}",
        "sharpening": str(options.sharpen_gt),
    }


def pair_identity(options: PairOptions) -> dict[str, str]:
    return {"jpeg": options.jpeg, "degradation": options.degradation_strength}


def content_identity(source: Source) -> dict[str, str]:
    return {"data set": f"{len(source)} samples", "data set's content": source.fingerprint()}


def open_sets(roots: Sequence[Path], parts: Parts = "pairs") -> Source:
    """Opens one or several sets, of either layout, as one.

    Raises:
      UserError: a set is missing or not finished, or the sets' samples differ in shape.
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
    """Several sources, one after another."""

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
    roots: Sequence[Path], crop: CropConfig, note: Callable[[str], object], output: Path | None = None
) -> Survey:
    """Finds and surveys photographs, with a progress bar. Calls `note` about those that are left out or changed, and ignores
    images below `output`."""
    searches = [(root, find_photographs(root, output)) for root in roots]
    for line in dict.fromkeys(line for _, search in searches for line in search.left_out()):
        note(line)
    found_below = [(path, root) for root, search in searches for path in search.files]
    # A folder may be given twice, or be part of another.
    files = list({os.path.realpath(path): (path, root) for path, root in reversed(found_below)}.values())[
        ::-1
    ]
    found = survey(files, _sizes(files), crop)
    for line in left_out(found, crop):
        note(line)
    return found


def _sizes(files: Sequence[Found]) -> list[KnownSize | str]:
    """Reads the photographs' sizes, with a progress bar. Several processes read a share each."""
    _check_same(files)
    known = KnownSizes([root for _, root in files])

    def look(share: Sequence[Found]) -> list[KnownSize | str]:
        with tqdm(total=len(share), desc="reading photographs' sizes", leave=False, disable=None) as bar:
            return known.look(share, bar.update)

    # JSON knows no named tuples.
    sizes = [size if isinstance(size, str) else KnownSize(*size) for size in shared_out(files, look)]
    from_first(lambda: known.keep(files, sizes))
    return sizes


def _prompts_of(source: Photographs) -> str | None:
    """A hash of the prompts beside photographs, made by the first process; the others compare some of theirs with its.

    Raises:
      UserError: in every process, if these differ.
    """
    if len(set(of_everyone(source.some_prompts()))) > 1:
        raise UserError("--hr_dir: the processes have different prompt embeddings beside the photographs")
    return from_first(source.prompts_fingerprint)


def _check_same(files: Sequence[Found]) -> None:
    """Raises UserError, in every process, unless all of them have found the same photographs."""
    names = "\n".join(composed(path.relative_to(root).as_posix()) for path, root in files)
    digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
    views = of_everyone([len(files), digest])
    if len({digest for _, digest in views}) > 1:
        counts = ", ".join(f"{count} in process {number}" for number, (count, _) in enumerate(views))
        raise UserError(
            f"--hr_dir: the processes find different photographs ({counts}); all need the same folder"
        )


def _open_photographs(
    options: DataOptions, seed: int, parts: Parts, note: Callable[[str], object], output: Path | None
) -> Photographs:
    crop = options.crop()
    found = look_at(options.hr_dir, crop, note, output)
    source = Photographs(found.photographs, crop, options.degradation(), seed, with_lr=parts == "pairs")
    if lacking := [
        photo.name for photo, prompt in zip(found.photographs, source.prompts, strict=True) if not prompt
    ]:
        if len(lacking) < len(source):
            assert options.default_embedding_dir, "`prompted` sets its default"
            source.default = load_prompt_embeds(options.default_embedding_dir)
            note(
                f"{len(lacking)} of {len(source)} photographs have no prompt embedding beside them and get the default "
                f"prompt's: {', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}"
            )
        texts = sum(beside(photo.path, ".txt") is not None for photo in found.photographs)
        if texts:
            read = f"{texts} photographs have a .txt beside them, which is used only when a set is prepared"
            note(f"{read}{_how_to_prepare(options, output, whole=texts == len(source))}")
    return source


def _how_to_prepare(options: DataOptions, output: Path | None, whole: bool) -> str:
    """Returns the command that prepares a set with these texts, if the model can encode them."""
    flags = hints.given(options, *hints.MODEL, "hr_dir", *hints.CROPS)
    if output is None or not has_encoders(flags.get("pretrained_model_name_or_path", "")):
        return ", by train/prepare.py --prompts txt with a model that has text encoders"
    prompts = "txt" if whole else "txt_or_default"
    target = hints.new_folder(output, "set")
    return f": {hints.command('train/prepare.py', **flags, prompts=prompts, output_dir=target)}"
