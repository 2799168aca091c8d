"""PyTorch's side of `first_image.py`: loads a diffusers folder, upscales one photograph, writes it.

Arguments: folder with sd3/, prompt/ and photo.png; folder for the result; device; precision; eager or compiled.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from torch_pipeline import DTYPES, PNG_LEVEL, TorchPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import oracle_pipeline as oracle

UPSCALE = 4


@torch.no_grad()
def main(work: Path, target: Path, device: str, precision: str, how: str) -> None:
    dtype = DTYPES[precision]
    networks = TorchPipeline.load(work / "sd3", work / "prompt", device, dtype)
    if how == "compiled":
        networks.compile()
    photo = Image.open(work / "photo.png")
    size = photo.width * UPSCALE, photo.height * UPSCALE
    image = oracle.resize_input(oracle.to_tensor(photo), size).to(device, dtype)
    latents = networks.encode(image, torch.zeros((), device=device, dtype=dtype))
    result = networks.decode(latents - networks.velocity(latents)).cpu().float() / 255
    target.mkdir()
    oracle.to_image(oracle.align_colour(result, photo, "wavelet")).save(
        target / "photo.png", compress_level=PNG_LEVEL
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
