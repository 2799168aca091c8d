"""Writing a prepared training set, in either layout, so that it can be interrupted and shared between machines.

What is written is complete or absent, and what is there is not made again: whole files of shards, single samples of folders.
The manifest keeps the settings, which a later run must share, and says when all is done; machines share an output folder and
need not know of each other.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

from tsdsr_jax.atomic import replacing
from tsdsr_jax.cli import Share
from tsdsr_jax.data.crops import SetLayout
from tsdsr_jax.data.folder_sets import HR_FOLDER, LATENT_FOLDER, LR_FOLDER
from tsdsr_jax.data.preparation import Finished, Prompts
from tsdsr_jax.data.shard_sets import (
    FORMAT,
    MANIFEST,
    count_records,
    has_manifest,
    pack_prompt,
    pack_sample,
    read_manifest,
    shard_path,
    write_shard,
)
from tsdsr_jax.errors import UserError
from tsdsr_jax.identity import mismatches
from tsdsr_jax.weights.prompt_files import TORCH_POOLED_FOLDER, TORCH_PROMPT_FOLDER, PromptEmbeds
from tsdsr_jax.weights.torch_pickle import write_tensor

TEXT_FOLDER = "prompt_txt"
PROMPTS_PER_FILE = 1024
# Neighbours of one machine, where several share the work in folders.
_RUN = 64
_STALE_SECONDS = 24 * 3600
Embed = Callable[[Sequence[str]], list[PromptEmbeds]]


class SetPlan(NamedTuple):
    """What is to be written.

    Attributes:
      names: of all samples, in order.
      prompt_of: the number of each sample's prompt.
      prompts: the texts.
    """

    names: list[str]
    prompt_of: list[int]
    prompts: Prompts


class Writer(Protocol):
    """One layout."""

    def pending(self, problems: Mapping[int, str]) -> list[int]:
        """Positions of this part's samples that are still to be made, in the order in which `add` wants them; those that had
        problems before are tried again.
        """
        ...

    def write_prompts(self, embed: Embed, progress: Callable[[int], object]) -> None:
        """Embeds and writes this part's prompts that are not there yet."""
        ...

    def add(self, sample: Finished) -> None: ...

    def close(self) -> None:
        """Waits until all is written."""
        ...

    def missing(self, problems: Mapping[int, str]) -> int:
        """Samples or files that some part still has to write, apart from samples with problems."""
        ...

    def counts(self) -> dict[str, Any]:
        """The layout's entries in the manifest."""
        ...


class ShardWriter:
    """ArrayRecord files of `per_file` planned samples each.

    Args:
      root: the set's folder.
      plan: all samples.
      part: this machine's share of the files.
      per_file: planned samples of a file; those that cannot be made are missing from it.
    """

    def __init__(self, root: Path, plan: SetPlan, part: Share, per_file: int):
        self.root, self.plan, self.part, self.per_file = root, plan, part, per_file
        self.files = -(-len(plan.names) // per_file)
        self.prompt_files = -(-len(plan.prompts.texts) // PROMPTS_PER_FILE)
        self._records: list[bytes] = []
        self._pool = ThreadPoolExecutor(1)
        self._writing: list[Future] = []

    def _positions(self, number: int) -> range:
        return range(number * self.per_file, min((number + 1) * self.per_file, len(self.plan.names)))

    def _mine(self, files: int) -> range:
        return range(self.part.index, files, self.part.of)

    def _lacks(self, kind: str, number: int, total: int) -> bool:
        return not shard_path(self.root, kind, number, total).is_file()

    def pending(self, problems: Mapping[int, str]) -> list[int]:
        files = {position // self.per_file for position in problems}
        wanted = [n for n in self._mine(self.files) if n in files or self._lacks("samples", n, self.files)]
        return [position for number in wanted for position in self._positions(number)]

    def write_prompts(self, embed: Embed, progress: Callable[[int], object]) -> None:
        for number in self._mine(self.prompt_files):
            texts = self.plan.prompts.texts[number * PROMPTS_PER_FILE : (number + 1) * PROMPTS_PER_FILE]
            if self._lacks("prompts", number, self.prompt_files):
                # One record at a time: a file's embeddings are 2.7 GB.
                records = (pack_prompt(*pair) for pair in zip(texts, embed(texts), strict=True))
                write_shard(shard_path(self.root, "prompts", number, self.prompt_files), records)
            progress(len(texts))

    def add(self, sample: Finished) -> None:
        position = sample.position
        if not sample.problem:
            prompt = self.plan.prompt_of[position]
            record = pack_sample(self.plan.names[position], sample.lr, sample.hr, sample.latent_hr, prompt)
            self._records.append(record)
        number = position // self.per_file
        if position == self._positions(number)[-1]:
            path, records, self._records = (
                shard_path(self.root, "samples", number, self.files),
                self._records,
                [],
            )
            settle(self._writing, most=1)
            self._writing.append(self._pool.submit(write_shard, path, records))

    def close(self) -> None:
        settle(self._writing)
        self._pool.shutdown()

    def missing(self, problems: Mapping[int, str]) -> int:
        kinds = (("samples", self.files), ("prompts", self.prompt_files))
        return sum(self._lacks(kind, number, total) for kind, total in kinds for number in range(total))

    def counts(self) -> dict[str, Any]:
        per_file = [count_records(shard_path(self.root, "samples", n, self.files)) for n in range(self.files)]
        files = {"samples": self.files, "prompts": self.prompt_files}
        return {"samples": per_file, "prompts": len(self.plan.prompts.texts), "files": files}


def _name(position: int) -> str:
    return f"{position + 1:07d}"


class FolderWriter:
    """The original's folders: one file per sample and kind, called by number, because the original sorts by it.

    Args:
      root: the set's folder.
      plan: all samples.
      part: this machine's share of the samples.
    """

    def __init__(self, root: Path, plan: SetPlan, part: Share):
        self.root, self.plan, self.part = root, plan, part
        # Folders may hold other files, such as a desktop's.
        self._planned = {_name(position) for position in range(len(plan.names))}
        self._pool = ThreadPoolExecutor(4)
        self._writing: list[Future] = []

    def _file(self, folder: str, position: int, suffix: str) -> Path:
        return self.root / folder / (_name(position) + suffix)

    def _there(self, folder: str) -> set[str]:
        path = self.root / folder
        return {Path(name).stem for name in os.listdir(path)} if path.is_dir() else set()

    def _mine(self) -> list[int]:
        return [
            position
            for position in range(len(self.plan.names))
            if position // _RUN % self.part.of == self.part.index
        ]

    def _made(self) -> set[str]:
        """Names of the samples of which all images and latents are there."""
        return set.intersection(*map(self._there, (LR_FOLDER, HR_FOLDER, LATENT_FOLDER))) & self._planned

    def _prompted(self) -> set[str]:
        return set.intersection(*map(self._there, (TORCH_PROMPT_FOLDER, TORCH_POOLED_FOLDER, TEXT_FOLDER)))

    def pending(self, problems: Mapping[int, str]) -> list[int]:
        made = self._made()
        return [position for position in self._mine() if _name(position) not in made]

    def write_prompts(self, embed: Embed, progress: Callable[[int], object]) -> None:
        there = self._prompted()
        by_text: dict[int, list[int]] = {}
        for position in self._mine():
            by_text.setdefault(self.plan.prompt_of[position], []).append(position)
        lacking = {
            number: positions for number, positions in by_text.items()
            if any(_name(position) not in there for position in positions)
        }  # fmt: skip
        progress(len(by_text) - len(lacking))
        numbers = sorted(lacking)
        for start in range(0, len(numbers), PROMPTS_PER_FILE):
            chunk = numbers[start : start + PROMPTS_PER_FILE]
            texts = [self.plan.prompts.texts[number] for number in chunk]
            for number, text, embeds in zip(chunk, texts, embed(texts), strict=True):
                for position in lacking[number]:
                    self._write_prompt(position, text, embeds)
                progress(1)

    def _write_prompt(self, position: int, text: str, embeds: PromptEmbeds) -> None:
        with replacing(self._file(TEXT_FOLDER, position, ".txt")) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        write_tensor(self._file(TORCH_PROMPT_FOLDER, position, ".pt"), embeds.prompt[None])
        write_tensor(self._file(TORCH_POOLED_FOLDER, position, ".pt"), embeds.pooled[None])

    def add(self, sample: Finished) -> None:
        if not sample.problem:
            settle(self._writing, most=16)
            self._writing.append(self._pool.submit(self._write, sample))

    def _write(self, sample: Finished) -> None:
        latent = sample.latent_hr.transpose(2, 0, 1)[None]
        write_tensor(self._file(LATENT_FOLDER, sample.position, ".pt"), latent)
        # lr last: which samples there are is what lies in its folder.
        for folder, content in ((HR_FOLDER, sample.hr), (LR_FOLDER, sample.lr)):
            with replacing(self._file(folder, sample.position, ".png")) as temporary:
                temporary.write_bytes(content)

    def close(self) -> None:
        settle(self._writing)
        self._pool.shutdown()

    def missing(self, problems: Mapping[int, str]) -> int:
        there = self._made() & self._prompted()
        return sum(
            _name(position) not in there
            for position in range(len(self.plan.names))
            if position not in problems
        )

    def counts(self) -> dict[str, Any]:
        return {
            "samples": [len(self._made())],
            "prompts": len(self.plan.prompts.texts),
            "files": {},
        }


def make_writer(layout: SetLayout, root: Path, plan: SetPlan, part: Share, per_file: int) -> Writer:
    return ShardWriter(root, plan, part, per_file) if layout == "shards" else FolderWriter(root, plan, part)


def settle(writing: list[Future], most: int = 0) -> None:
    """Waits until at most so many are under way; raises what one of them raised."""
    while len(writing) > most:
        writing.pop(0).result()


# --- the manifest ---------------------------------------------------------------------------------


class Manifest:
    """A set's manifest and its list of samples that could not be made.

    Args:
      root: the set's folder.
      layout: of the set.
      settings: what all runs on it must share.
      part: this machine's share.
    """

    def __init__(self, root: Path, layout: SetLayout, settings: Mapping[str, Any], part: Share):
        self.root, self.layout, self.settings, self.part = root, layout, dict(settings), part

    def check(self) -> None:
        """Refuses a folder that holds another set, or something else.

        Raises:
          UserError: saying what differs.
        """
        names = os.listdir(self.root) if self.root.is_dir() else []
        if has_manifest(self.root):
            self._check(read_manifest(self.root))
        elif any(not name.startswith(".") for name in names):
            raise UserError(
                f"{self.root}: is not empty and holds no training set of train/prepare.py; choose another --output_dir"
            )

    def begin(self) -> None:
        """Writes it before the first piece is, unless another machine has; then that is checked."""
        self.check()
        if not has_manifest(self.root):
            self._write({"complete": False}, new=True)
            # Another machine may have been faster.
            self._check(read_manifest(self.root))

    def _check(self, found: Mapping[str, Any]) -> None:
        theirs = {"layout": found.get("layout")} | found.get("settings", {})
        differing = mismatches(theirs, {"layout": self.layout} | self.settings)
        if differing:
            listed = "".join(f"\n  {line}" for line in differing)
            raise UserError(
                f"{self.root}: holds a training set made otherwise; choose another --output_dir, or give the flags that it "
                f"was made with. What differs:{listed}"
            )

    def _write(self, entries: Mapping[str, Any], new: bool = False) -> None:
        content = {"format": FORMAT, "layout": self.layout, **entries, "settings": self.settings}
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        path = self.root / MANIFEST
        if not new:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            return
        # Written under another name and linked, so that of two machines that begin together one wins.
        own = self.root / f".{uuid4().hex}.part"
        with replacing(own) as temporary:
            temporary.write_text(text, encoding="utf-8")
        try:
            os.link(own, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        finally:
            own.unlink(missing_ok=True)

    def note_problem(self, position: int, message: str) -> None:
        """Remembers a sample that cannot be made; without a message, that it can."""
        # Begins with the line's end, in case a kill has cut the last one.
        line = "\n" + json.dumps({"sample": position, "problem": message})
        try:
            with open(self.root / f"problems-{self.part}.jsonl", "a", encoding="ascii") as file:
                file.write(line)
        except OSError as error:
            raise UserError(f"{self.root}: cannot be written ({error.strerror})") from None

    def problems(self) -> dict[int, str]:
        """Position -> message, of all machines."""
        found: dict[int, str] = {}
        for path in sorted(self.root.glob("problems-*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
            for line in path.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # empty, or cut off by a kill; then its sample is made again
                found[entry["sample"]] = entry["problem"]
        return {position: message for position, message in found.items() if message}

    def _sweep(self) -> None:
        """Removes what killed runs have left; what is younger than a day may be another machine's work."""
        for path in self.root.rglob(".*.part"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()

    def finish(self, writer: Writer, more: Mapping[str, Any]) -> int:
        """Completes the manifest if nothing is missing; returns how much is."""
        self.begin()
        problems = self.problems()
        missing = writer.missing(problems)
        if not missing:
            self._sweep()
            left_out = [problems[position] for position in sorted(problems)]
            self._write({"complete": True, **writer.counts(), "damaged": left_out, **more})
        return missing
