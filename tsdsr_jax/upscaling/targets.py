"""Which photographs a run upscales, and the names of their results: the one rule for command line and page."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tsdsr_jax.errors import UserError
from tsdsr_jax.images.search import composed, find_photographs, unread_pictures
from tsdsr_jax.images.writing import FORMAT_OF_SUFFIX, FORMATS, read_made_with
from tsdsr_jax.upscaling.jobs import FileJob
from tsdsr_jax.upscaling.provenance import flags_in


class FoundJobs(NamedTuple):
    """The outcome of a search for photographs.

    Attributes:
      jobs: the photographs and their targets.
      notes: lines about pictures of formats that are not read.
      problems: a line for each folder, link or file that cannot be used because of an error.
    """

    jobs: list[FileJob]
    notes: list[str]
    problems: list[str]


class Naming(NamedTuple):
    """How results are named.

    Attributes:
      format: of the results, one of `FORMATS`.
      scale: appended to the photograph's name, as in cat_x4.png; None: the name stays, as in the original.
      made_with: see `FileJob`.
    """

    format: str = "png"
    scale: float | None = None
    made_with: str = ""

    def name(self, photograph: Path) -> str:
        """The name of a photograph's result, without folders."""
        stem = photograph.stem if self.scale is None else f"{photograph.stem}_x{self.scale:g}"
        return f"{stem}.{self.format}"


PLAIN = Naming()


def format_for(output: Path, format: str | None) -> str:
    """The format of the results: the given one, that of the output file's suffix, or png.

    Raises:
      UserError: the two differ.
    """
    named = FORMAT_OF_SUFFIX.get(output.suffix.lower()) if is_file_name(output) else None
    if format and named and format != named:
        raise UserError(
            f"--output_dir {output}: ends in {output.suffix}, but --format is {format}; drop one of them"
        )
    return format or named or "png"


def is_file_name(output: Path) -> bool:
    """Whether an output path names a result, not a folder."""
    return output.suffix.lower() in FORMAT_OF_SUFFIX and not output.is_dir()


def find_jobs(
    sources: Sequence[Path], output: Path, naming: Naming = PLAIN, *, overwrite: bool = False
) -> FoundJobs:
    """The photographs of some files and folders (`find_photographs`), each with its target.

    If `output` is a file's name, a single photograph becomes this file. Otherwise it is a folder, and the tree below each
    folder is kept. If targets would coincide (a.jpg, a.png), the photographs' own suffixes become part of the names
    (a_jpg.png).

    Args:
      overwrite: whether results that exist will be replaced.

    Raises:
      UserError: a path does not exist or holds no images, two results would get one name, or results would be written
        among the photographs.
    """
    if is_file_name(output):
        return FoundJobs([_single_job(sources, output, naming)], [], [])
    _refuse_other_formats(output)
    found = FoundJobs([], [], [])
    files: dict[Path, Path] = {}  # file -> the folder that its target's path is relative to
    for source in sources:
        if source.is_dir():
            search = find_photographs(source, output)
            files |= {file: source for file in search.files if file not in files}
            found.notes.extend(unread_pictures(search.unread))
            found.problems.extend(search.problems)
        elif source.exists():
            files.setdefault(source, source.parent)
        else:
            raise UserError(f"{source}: no such file or folder")
    names = [file.relative_to(root) for file, root in files.items()]
    targets = _distinct_targets(list(files), [output / name.parent / naming.name(name) for name in names])
    _check_targets(list(files), targets, output if overwrite else None)
    for file, name, target in zip(files, names, targets, strict=True):
        found.jobs.append(FileJob(file, target, naming.made_with, name.as_posix()))
    return found


def _single_job(sources: Sequence[Path], target: Path, naming: Naming) -> FileJob:
    if len(sources) > 1 or sources[0].is_dir():
        raise UserError(
            f"--output_dir {target}: is the name of one result, but there may be several; give a folder's name"
        )
    (source,) = sources
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if os.path.realpath(source) == os.path.realpath(target):
        raise UserError(f"{target}: is the photograph itself; choose another --output_dir")
    return FileJob(source, target, naming.made_with, source.name)


def _refuse_other_formats(output: Path) -> None:
    """Refuses the name of a picture that cannot be written, which would become a folder's."""
    named = unread_pictures([output]) or output.suffix.lower() in (".gif", ".jfif", ".jpe")
    if named and not output.is_dir():
        raise UserError(
            f"--output_dir {output}: results cannot have the suffix {output.suffix}; write one of {', '.join(FORMATS)}"
        )


def _check_targets(files: Sequence[Path], targets: Sequence[Path], replaced_in: Path | None) -> None:
    """Refuses targets that are photographs, or that two photographs share.

    Args:
      replaced_in: the output folder, if results in it are replaced.
    """
    photographs = {os.path.realpath(file) for file in files}
    taken: dict[str, Path] = {}
    for file, target in zip(files, targets, strict=True):
        # Where photographs lie in the output folder, or below it, other files in it may be photographs, too.
        foreign = (
            replaced_in is not None
            and target.exists()
            and Path(os.path.realpath(file)).is_relative_to(os.path.realpath(replaced_in))
            and not flags_in(read_made_with(target))
        )
        if foreign or os.path.realpath(target) in photographs:
            raise UserError(
                f"{target}: lies among the photographs, and the result would replace it; choose another --output_dir"
            )
        other = taken.setdefault(_as_one_name(target), file)
        if other != file:
            raise UserError(
                f"{other} and {file}: both results would be {target}; upscale them separately, into different --output_dir"
            )


def _as_one_name(target: Path) -> str:
    """The same for paths that some file system does not tell apart: by case, or by the Unicode form of é."""
    return composed(str(target)).casefold()


def _distinct_targets(files: Sequence[Path], targets: list[Path]) -> list[Path]:
    """Puts the file's own suffix into the name (a_jpg.png) wherever targets coincide."""
    plain = targets
    while True:
        taken = Counter(map(_as_one_name, targets))
        renamed = [
            target.with_name(f"{first.stem}_{file.suffix[1:]}{target.suffix}")
            if taken[_as_one_name(target)] > 1
            else target
            for file, first, target in zip(files, plain, targets, strict=True)
        ]
        # Repeat until nothing changes: a new name may be another file's plain one (a.jpg, a.png, a_jpg.bmp).
        if renamed == targets:
            return targets
        targets = renamed
