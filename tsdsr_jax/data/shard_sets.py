"""Prepared sets in Grain's ArrayRecord files: a few large files with random access, each prompt stored once.

    ROOT/manifest.json                          counts, settings, versions
    ROOT/samples-00000-of-00012.arrayrecord     lr and hr as lossless WebP, latent_hr, the number of the prompt, the name
    ROOT/prompts-00000-of-00001.arrayrecord     prompt and pooled embeddings in 16 bits, the text

Each record is a safetensors file. Images are lossless WebP: for eight photographs of 512×512 and their degraded versions, it
took 212 kB each instead of 268 kB (PNG of level 3), and 0.7 of PNG's decoding time.

No jax here: Grain's workers import this.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from grain.sources import ArrayRecordDataSource
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tsdsr_jax.atomic import replacing
from tsdsr_jax.data.manifest import MANIFEST, check_complete, read_manifest
from tsdsr_jax.data.record import Record, spread
from tsdsr_jax.errors import UserError
from tsdsr_jax.git_lfs import refuse_pointer
from tsdsr_jax.weights.prompt_files import PromptEmbeds

# Records are compressed already. In larger groups, reading one record would read its whole group.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_PROMPTS_KEPT = 16
# Several threads read. The lock belongs to the module because sources are pickled for workers.
_CACHES = threading.Lock()


def shard_path(root: Path, kind: str, number: int, total: int) -> Path:
    return root / f"{kind}-{number:05d}-of-{total:05d}.arrayrecord"


# --- writing --------------------------------------------------------------------------------------


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Writes one file of records, complete or not at all.

    Raises:
      UserError: it cannot be written.
    """
    # Imported here because only writing needs it.
    from array_record.python.array_record_module import ArrayRecordWriter

    with replacing(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
        try:
            for record in records:
                writer.write(record)
            writer.close()
        except RuntimeError as error:
            raise UserError(f"{path}: cannot be written ({error})") from None


def pack_sample(name: str, lr: bytes, hr: bytes, latent_hr: np.ndarray, prompt: int) -> bytes:
    """Packs one sample into a record.

    Args:
      name: the photograph's name and the crop's number.
      lr, hr: from `pack_image`.
      latent_hr: (h, w, C) float32.
      prompt: index of its prompt within the set.
    """
    images = {"lr": _bytes(lr), "hr": _bytes(hr)}
    return save({"name": _bytes(name.encode()), **images, "latent_hr": latent_hr, "prompt": np.array(prompt)})


def pack_prompt(text: str, embeds: PromptEmbeds) -> bytes:
    return save(
        {"text": _bytes(text.encode()), "prompt_embeds": embeds.prompt, "pooled_embeds": embeds.pooled}
    )


def pack_image(image: np.ndarray) -> bytes:
    """Compresses (H, W, 3) uint8 without loss."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "WEBP", lossless=True, method=0, quality=0, exact=True)
    return file.getvalue()


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def count_records(path: Path) -> int:
    """How many records a file holds.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return len(ArrayRecordDataSource([str(path)]))
    except (RuntimeError, ValueError) as error:
        refuse_pointer(path)
        raise UserError(
            f"{path}: cannot be read ({error}); delete it, and train/prepare.py makes it again"
        ) from None


# --- reading --------------------------------------------------------------------------------------


class PreparedShards:
    """Reads the samples of one set.

    Args:
      root: the set's folder.
      images: whether records have lr and hr; if not, images are not decoded.

    Raises:
      UserError: the set is not finished, or files are missing or damaged.
    """

    def __init__(self, root: Path, images: bool = True):
        self.root, self.images = root, images
        self.manifest = read_manifest(root)
        check_complete(root, self.manifest)
        if not sum(self.manifest["samples"]):
            raise UserError(f"{root}: holds no sample, because none of its photographs could be used")
        self._samples = self._open("samples", sum(self.manifest["samples"]))
        self._prompts = self._open("prompts", self.manifest["prompts"])
        self._prompt_cache: dict[int, PromptEmbeds] = {}

    def _open(self, kind: str, count: int) -> ArrayRecordDataSource:
        total = self.manifest["files"][kind]
        paths = [shard_path(self.root, kind, number, total) for number in range(total)]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise UserError(
                f"{self.root}: {len(missing)} of {total} {kind} files are missing, such as {missing[0]}"
            )
        try:
            source = ArrayRecordDataSource([str(path) for path in paths])
        except (RuntimeError, ValueError) as error:
            for path in paths:
                count_records(path)  # raises an error that names the damaged file
            raise UserError(f"{self.root}: its {kind} files cannot be read ({error})") from None
        if len(source) != count:
            raise UserError(
                f"{self.root}: {len(source)} {kind} in its files, {count} in {MANIFEST}; were files of two sets mixed?"
            )
        return source

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, index: int, epoch: int = 0) -> Record:
        """Reads one sample, the same in every epoch.

        Raises:
          UserError: the record is damaged.
        """
        sample = self._record(self._samples, index, "sample")
        embeds = self._prompt(int(sample["prompt"]))
        lr, hr = (self._image(sample[part], index) if self.images else None for part in ("lr", "hr"))
        return Record(lr, hr, sample["latent_hr"], embeds.prompt, embeds.pooled)

    def _prompt(self, number: int) -> PromptEmbeds:
        with _CACHES:
            found = self._prompt_cache.get(number)
        if found is None:
            record = self._record(self._prompts, number, "prompt")
            found = PromptEmbeds(record["prompt_embeds"], record["pooled_embeds"])
            with _CACHES:
                while len(self._prompt_cache) >= _PROMPTS_KEPT:
                    self._prompt_cache.pop(next(iter(self._prompt_cache)))
                self._prompt_cache[number] = found
        return found

    def _record(self, source: ArrayRecordDataSource, index: int, kind: str) -> dict[str, np.ndarray]:
        try:
            return load(source[index])
        except (RuntimeError, ValueError, SafetensorError) as error:
            raise UserError(f"{self.root}: {kind} {index} cannot be read ({error})") from None

    def _image(self, content: np.ndarray, index: int) -> np.ndarray:
        image = cv2.imdecode(content, cv2.IMREAD_COLOR)
        if image is None:
            raise UserError(f"{self.root}: an image of sample {index} cannot be decoded")
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)

    def name(self, index: int) -> str:
        """The photograph's name, or the sample's number if that cannot be read."""
        try:
            name = self._record(self._samples, index, "sample")["name"].tobytes().decode()
        except UserError:
            name = f"sample {index}"
        return f"{self.root}: {name}"

    def fingerprint(self) -> str:
        """A hash of the manifest's settings and counts, and of sixteen records, evenly spread."""
        told = {key: self.manifest[key] for key in ("settings", "samples", "prompts")}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        for index in spread(len(self)):
            digest.update(self._samples[index])
        return digest.hexdigest()
