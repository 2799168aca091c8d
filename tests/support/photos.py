"""Where the tests find real photographs.

The development data lies beside the checkout in `shared/data`; a user's clone does not have it, so every test
that asks for photographs skips there and says so.
"""

from pathlib import Path

import pytest
from PIL import Image

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NO_DATA = f"the development photographs are not on this machine ({DATA} does not exist)"


def data_folder(*parts: str) -> Path:
    """`DATA/parts…`; skips the calling test where the data is absent."""
    folder = DATA.joinpath(*parts)
    if not folder.is_dir():
        pytest.skip(NO_DATA if not DATA.is_dir() else f"no folder {folder}")
    return folder


def photos(n: int, size: tuple[int, int] | None = None) -> list[Image.Image]:
    """`n` RGB photographs spread evenly over the BSDS500 test set, each time the same ones.

    With `size` = (width, height) each is cropped to it around its centre; uncropped they are (481, 321) or
    (321, 481).
    """
    paths = sorted(data_folder("bsds500", "test").glob("*.jpg"))
    if n > len(paths):
        raise ValueError(f"asked for {n} photographs, there are {len(paths)}")
    chosen = [Image.open(paths[i * len(paths) // n]).convert("RGB") for i in range(n)]
    return [centre_crop(image, size) for image in chosen] if size else chosen


def centre_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle (width, height) = `size` of `image`."""
    (width, height), (crop_width, crop_height) = image.size, size
    if crop_width > width or crop_height > height:
        raise ValueError(f"cannot crop {size} from an image of {image.size}")
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return image.crop((left, top, left + crop_width, top + crop_height))
