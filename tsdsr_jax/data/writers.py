"""Writes a prepared set in either layout, so that the work can be interrupted and shared between machines.

What is written is complete or absent and is never made again: a whole file in `shards`, a single sample in `folders`.
Machines that share an output folder need not know of each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tsdsr_jax.atomic import replacing
from tsdsr_jax.cli import Share
from tsdsr_jax.data.crops import SetLayout
from tsdsr_jax.data.folder_sets import HR_FOLDER, LATENT_FOLDER, LR_FOLDER
from tsdsr_jax.data.set_prompts import Prompts
from tsdsr_jax.data.shard_sets import count_records, pack_prompt, pack_sample, shard_path, write_shard
from tsdsr_jax.weights.prompt_files import TORCH_POOLED_FOLDER, TORCH_PROMPT_FOLDER, PromptEmbeds
from tsdsr_jax.weights.torch_pickle import write_tensor

TEXT_FOLDER = "prompt_txt"
PROMPTS_PER_FILE = 1024
# In folders, machines take turns in runs of this many samples.
_RUN = 64
Embed = Callable[[Sequence[str]], list[PromptEmbeds]]


class FinishedSample(NamedTuple):
    """A sample ready to be written.

    Attributes:
      position: its place in the plan.
      lr, hr: compressed images.
      latent_hr: (h, w, C) float32.
      problem: why it cannot be made; then the other fields are empty.
    """

    position: int
    lr: bytes
    hr: bytes
    latent_hr: np.ndarray
    problem: str


class SetPlan(NamedTuple):
    """What a finished set contains.

    Attributes:
      names: the samples' names, in order.
      prompt_of: for each sample, the index of its prompt.
      prompts: the texts.
    """

    names: list[str]
    prompt_of: list[int]
    prompts: Prompts


class SetWriter(Protocol):
    """Writes one layout."""

    def pending(self, problems: Mapping[int, str]) -> list[int]:
        """Positions of the samples that this part still has to make, in the order in which `add` expects them.

        They include samples that could not be made before.
        """
        ...

    def write_prompts(self, embed: Embed, progress: Callable[[int], object]) -> None:
        """Embeds and writes the prompts that this part still lacks."""
        ...

    def add(self, sample: FinishedSample) -> None: ...

    def close(self) -> None:
        """Waits until everything is written."""
        ...

    def missing(self, problems: Mapping[int, str]) -> int:
        """The number of samples or files that are still to be written, by any part, not counting samples with problems."""
        ...

    def counts(self) -> dict[str, Any]:
        """The layout's entries in the manifest."""
        ...


class ShardWriter:
    """Writes ArrayRecord files of `per_file` planned samples each.

    Args:
      root: the set's folder.
      plan: all samples.
      part: this machine's share of the files.
      per_file: planned samples per file; samples that cannot be made are left out of it.
    """

    def __init__(self, root: Path, plan: SetPlan, part: Share, per_file: int):
        self.root, self.plan, self.part, self.per_file = root, plan, part, per_file
        self.files = -(-len(plan.names) // per_file)
        self.prompt_files = -(-len(plan.prompts.texts) // PROMPTS_PER_FILE)
        self._records: list[bytes] = []
        self._pool = ThreadPoolExecutor(1)
        self._writing: list[Future[None]] = []

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
                # One record at a time, because the embeddings of a file take 2.7 GB.
                records = (pack_prompt(*pair) for pair in zip(texts, embed(texts), strict=True))
                write_shard(shard_path(self.root, "prompts", number, self.prompt_files), records)
            progress(len(texts))

    def add(self, sample: FinishedSample) -> None:
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
            _settle(self._writing, most=1)
            self._writing.append(self._pool.submit(write_shard, path, records))

    def close(self) -> None:
        _settle(self._writing)
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
    """Writes the original's folders: one file per sample and kind, named by number because the original sorts by it.

    Args:
      root: the set's folder.
      plan: all samples.
      part: this machine's share of the samples.
    """

    def __init__(self, root: Path, plan: SetPlan, part: Share):
        self.root, self.plan, self.part = root, plan, part
        # Folders may hold other files, such as those that file managers leave.
        self._planned = {_name(position) for position in range(len(plan.names))}
        self._pool = ThreadPoolExecutor(4)
        self._writing: list[Future[None]] = []

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
        """Names of the samples whose images and latents all exist."""
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

    def add(self, sample: FinishedSample) -> None:
        if not sample.problem:
            _settle(self._writing, most=16)
            self._writing.append(self._pool.submit(self._write, sample))

    def _write(self, sample: FinishedSample) -> None:
        latent = sample.latent_hr.transpose(2, 0, 1)[None]
        write_tensor(self._file(LATENT_FOLDER, sample.position, ".pt"), latent)
        # lr last, because readers take the files in its folder as the list of samples.
        for folder, content in ((HR_FOLDER, sample.hr), (LR_FOLDER, sample.lr)):
            with replacing(self._file(folder, sample.position, ".png")) as temporary:
                temporary.write_bytes(content)

    def close(self) -> None:
        _settle(self._writing)
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


def make_writer(layout: SetLayout, root: Path, plan: SetPlan, part: Share, per_file: int) -> SetWriter:
    return ShardWriter(root, plan, part, per_file) if layout == "shards" else FolderWriter(root, plan, part)


def _settle(writing: list[Future[None]], most: int = 0) -> None:
    """Waits until at most `most` writes are running; re-raises their errors."""
    while len(writing) > most:
        writing.pop(0).result()
