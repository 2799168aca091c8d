"""A report as one HTML file: thumbnails, numbers, and a viewer that compares pictures under a movable divider.

The file needs no network and allows none. Thumbnails come first, so that a page of many megabytes shows at once; the full
pictures follow as inert text, which a browser decodes when one is opened. The page itself is in `report_page/`.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import json
import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import IO, Literal

import numpy as np
from PIL import Image

from tsdsr_jax.atomic import replacing
from tsdsr_jax.devices import cores
from tsdsr_jax.errors import UserError, first_line
from tsdsr_jax.images.files import Photo, read_photo

# By this an older report is known as ours, and may be replaced.
_MARK = '<meta name="generator" content="tsdsr_jax report">'
_PICTURES = "<!-- pictures -->\n"

# Measured on 16 photographs of DRealSR, 512 x 512, per megapixel on one core:
#   lossless WebP, method 0   0.04 s   1.09 MB             WebP quality 98    0.09 s   0.24 MB   45.2 dB
#                  method 1   0.08 s   1.01 MB                  quality 95    0.08 s   0.18 MB   44.0 dB
#                  method 4   0.30 s   0.97 MB             JPEG quality 92    0.01 s   0.25 MB   44.8 dB
# WebP with loss halves the colours' resolution: at coloured edges single values are off by 80, by 24 in a JPEG of equal
# size without subsampling. So results of 512 x 512 are stored exactly, and larger ones as such a JPEG.
_LOSSLESS = {"format": "WEBP", "lossless": True, "method": 1, "quality": 20}
# Not `optimize`: Pillow then gives the encoder a byte per pixel, which noise does not fit into.
_LOSSY = {"format": "JPEG", "quality": 92, "subsampling": 0}
_LOSSLESS_PIXELS = 2**19
_SHOWN_PIXELS = 2**22
_SHOWN_SIDE = 16383  # WebP's limit
_THUMBNAIL_SIDE = 320
_THUMBNAIL = {"format": "WEBP", "quality": 75, "method": 2}
# The files were made, or read, by the run that is reported; the size of a picture is its business.
_MAX_PIXELS = 2**31

_ENCODINGS = (
    f"Pictures of up to {_LOSSLESS_PIXELS / 1e6:.1f} megapixels, and those with transparency, are stored without loss at 8 "
    f"bits per channel; larger ones as JPEG of quality {_LOSSY['quality']}, above {_SHOWN_PIXELS / 1e6:.1f} megapixels "
    "scaled down. The viewer says which with each picture. This file is complete in itself and loads nothing from elsewhere."
)

PixelSize = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """One picture of an entry, such as the input, a method's result or the reference."""

    title: str
    path: Path


@dataclass(frozen=True)
class Column:
    """One number per entry.

    Attributes:
      name: its key in `Comparison.values`. Of "method · PSNR" what comes before the dot becomes a column of its table.
      better: the direction in which it improves; None where it has none.
      decimals: how many are shown.
    """

    name: str
    better: Literal["higher", "lower"] | None
    decimals: int = 4


@dataclass(frozen=True)
class Comparison:
    """One card of the page.

    Attributes:
      name: unique; links to the open image carry it.
      layers: the viewer starts with the first on the left and the second on the right. Different sizes are shown at one.
      values: by a column's name; None or NaN: there is none.
      facts: further lines, such as {"size": "128×128 → 512×512"}.
    """

    name: str
    layers: tuple[Layer, ...]
    values: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """A table of finished texts; the first of each row names it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def check_report_path(path: Path) -> None:
    """Refuses a place where no report can be written, or one that holds something else.

    Raises:
      UserError: not .html or .htm, a folder, a file that is not a report of ours, or a folder that cannot be written.
    """
    # os.path rather than Path's methods: those raise below a folder that may not be searched.
    if os.path.isdir(path):
        raise UserError(
            f"{path}: is a folder; name a file in it for the report, such as {path / 'report.html'}"
        )
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path}: a report is a web page; give it a name that ends in .html")
    if os.path.lexists(path) and not _is_ours(path):
        raise UserError(f"{path}: exists and is no report of ours; remove it, or name another file")
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written, {folder} is no writable folder; name another place")


def write_report(
    path: Path,
    title: str,
    entries: Sequence[Comparison],
    columns: Sequence[Column] = (),
    summary: Summary | None = None,
    notes: Sequence[str] = (),
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Writes the page; complete, or not at all.

    Pictures pass through a few at a time, so memory grows with their thumbnails only. A picture that cannot be read is
    replaced by the reason.

    Args:
      path: where to, see `check_report_path`.
      title: heading of the page.
      entries: in the order of the page before it is sorted.
      columns: the values to show, in this order.
      summary: a table above the pictures.
      notes: sentences at the top, such as what could not be computed.
      progress: called after each entry.

    Raises:
      UserError: the path is refused, or cannot be written.
    """
    check_report_path(path)
    with replacing(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as pictures:
        cards, data = [], []
        for index, (entry, encoded) in enumerate(_encoded(entries)):
            cards.append(_card(index, entry, encoded, columns))
            data.append(_entry_data(entry, encoded, columns))
            _write_pictures(pictures, index, encoded)
            progress()
        head, tail = _page(title, cards, data, columns, summary, notes)
        pictures.seek(0)
        with open(temporary, "wb") as file:
            file.write(head.encode())
            shutil.copyfileobj(pictures, file, 2**20)
            file.write(tail.encode())


def _is_ours(path: Path) -> bool:
    try:
        if not path.is_file():  # reading a pipe or device would wait
            return False
        with open(path, "rb") as file:
            return _MARK.encode() in file.read(1000)
    except OSError as error:
        raise UserError(
            f"{path}: exists and cannot be read ({error.strerror}); remove it, or name another file"
        ) from error


# ---- pictures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Picture:
    """A layer as the page holds it.

    Attributes:
      size: (width, height) of the file, upright.
      encoding: what was done to it, in words.
      type: media type of `data`.
      data: base64.
    """

    size: PixelSize
    encoding: str
    type: str
    data: bytes


@dataclass(frozen=True)
class _Encoded:
    """An entry's layers, or why one cannot be shown; and a thumbnail, data URI and size, if any can."""

    layers: list[_Picture | str]
    thumbnail: tuple[str, PixelSize] | None


def _encoded(entries: Sequence[Comparison]) -> Iterator[tuple[Comparison, _Encoded]]:
    """Reads and encodes in threads, a few entries ahead."""
    threads = min(8, cores())
    waiting: deque[tuple[Comparison, Future[_Encoded]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for entry in entries:
            waiting.append((entry, pool.submit(_encode_entry, entry)))
            if len(waiting) > threads:
                ready, future = waiting.popleft()
                yield ready, future.result()
        for ready, future in waiting:
            yield ready, future.result()


def _encode_entry(entry: Comparison) -> _Encoded:
    """The thumbnail is of the first of the largest layers: a result rather than its input, a method rather than HR."""
    layers: list[_Picture | str] = []
    thumbnail, largest = None, 0
    for layer in entry.layers:
        try:
            photo = read_photo(layer.path, _MAX_PIXELS)
            image = _image(photo)
            layers.append(_encode(image, photo))
        except Exception as error:  # whatever one picture provokes, the others are shown
            layers.append(
                str(error) if isinstance(error, UserError) else f"{layer.path}: {first_line(error)}"
            )
            continue
        if image.width * image.height > largest:
            thumbnail, largest = _thumbnail(image, photo), image.width * image.height
    return _Encoded(layers, thumbnail)


def _image(photo: Photo) -> Image.Image:
    if photo.alpha is None:
        return Image.fromarray(photo.rgb)
    return Image.fromarray(np.dstack([photo.rgb, photo.alpha]))


def _encode(image: Image.Image, photo: Photo) -> _Picture:
    size = image.size
    scale = min(1.0, math.sqrt(_SHOWN_PIXELS / (size[0] * size[1])), _SHOWN_SIDE / max(size))
    words = []
    if scale < 1:
        image = _resized(image, scale)
        words.append(f"shown at {image.width}×{image.height} ({scale:.0%})")
    if photo.alpha is not None or image.width * image.height <= _LOSSLESS_PIXELS:
        settings = _LOSSLESS
        words.append("lossless")
    else:
        settings = _LOSSY
        words.append(f"JPEG quality {_LOSSY['quality']}")
    data = base64.b64encode(_bytes(image, photo, settings))
    return _Picture(size, ", ".join(words), f"image/{settings['format'].lower()}", data)


def _thumbnail(image: Image.Image, photo: Photo) -> tuple[str, PixelSize]:
    small = _resized(image, min(1.0, _THUMBNAIL_SIDE / max(image.size)))
    data = base64.b64encode(_bytes(small, photo, _THUMBNAIL)).decode()
    return f"data:image/webp;base64,{data}", small.size


def _resized(image: Image.Image, scale: float) -> Image.Image:
    sides = [max(1, round(side * scale)) for side in image.size]
    return image.resize(tuple(sides), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _bytes(image: Image.Image, photo: Photo, settings: Mapping[str, object]) -> bytes:
    """Encoded, with the colour profile and nothing else: EXIF tells where a photograph was taken."""
    as_grey = photo.gray and settings["format"] == "JPEG"
    # A profile for grey fits a grey file only, and WebP has none.
    icc = photo.icc if as_grey == photo.gray else None
    buffer = io.BytesIO()
    (image.convert("L") if as_grey else image).save(buffer, icc_profile=icc, **settings)
    return buffer.getvalue()


def _write_pictures(file: IO[bytes], index: int, encoded: _Encoded) -> None:
    """The line's end behind a block tells the page's script that it has arrived in full."""
    for number, picture in enumerate(encoded.layers):
        if isinstance(picture, _Picture):
            opening = f'<script type="text/plain" id="picture-{index}-{number}" data-type="{picture.type}">'
            file.write(opening.encode() + picture.data + b"</script>\n")


# ---- page ----------------------------------------------------------------------------------------


def _page(
    title: str,
    cards: Sequence[str],
    data: Sequence[Mapping[str, object]],
    columns: Sequence[Column],
    summary: Summary | None,
    notes: Sequence[str],
) -> tuple[str, str]:
    """What comes before the pictures, and what comes behind."""
    files = resources.files("tsdsr_jax.evaluation") / "report_page"
    page, style, script = (
        (files / name).read_text("utf-8") for name in ("page.html", "style.css", "script.js")
    )
    head, _, tail = page.partition(_PICTURES)
    described = {
        "entries": data,
        "columns": [{"name": _printable(c.name), "better": c.better} for c in columns],
    }
    return Template(head).substitute(
        mark=_MARK,
        title=_escaped(title),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        notes=_notes(notes),
        summary=_summary(summary),
        sort_options=_sort_options(columns),
        cards="\n".join(cards),
        encodings=_ENCODINGS,
        # Escaped so that nothing in it can end the block.
        data=json.dumps(described).replace("<", "\\u003c"),
    ), tail


def _hash(text: str) -> str:
    """By which the page's policy admits this one style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _printable(text: str) -> str:
    """File names need not be UTF-8; Python keeps their odd bytes as halves of surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _escaped(text: str) -> str:
    return html.escape(_printable(text))


def _notes(notes: Sequence[str], most: int = 5) -> str:
    """A list; what exceeds `most` is folded away."""
    items = [f"<li>{_escaped(note)}</li>" for note in notes]
    if not items:
        return ""
    rest = items[most:]
    folded = f"<details><summary>{len(rest)} more</summary><ul>{''.join(rest)}</ul></details>" if rest else ""
    return f'<ul class="notes">{"".join(items[:most])}{folded}</ul>'


def _summary(summary: Summary | None) -> str:
    if summary is None:
        return ""
    head = "".join(f'<th scope="col">{_escaped(name)}</th>' for name in summary.columns)
    rows = []
    for first, *others in summary.rows:
        cells = "".join(f"<td>{_escaped(text)}</td>" for text in others)
        rows.append(f'<tr><th scope="row">{_escaped(first)}</th>{cells}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" role="region" aria-label="Summary" tabindex="0">{table}</div>'


def _sort_options(columns: Sequence[Column]) -> str:
    named = [f'<option value="{i}">{_escaped(column.name)}</option>' for i, column in enumerate(columns)]
    return '<option value="name">name</option>' + "".join(named)


def _card(index: int, entry: Comparison, encoded: _Encoded, columns: Sequence[Column]) -> str:
    if encoded.thumbnail:
        source, (width, height) = encoded.thumbnail
        picture = f'<img src="{source}" alt="" width="{width}" height="{height}" decoding="async">'
    else:
        picture = '<span class="broken">no picture</span>'
    missing = [
        _escaped(layer.title)
        for layer, picture in zip(entry.layers, encoded.layers, strict=True)
        if isinstance(picture, str)
    ]
    lacking = f'<p class="lacking">{", ".join(missing)}: cannot be shown</p>' if missing else ""
    facts = " · ".join(map(_escaped, entry.facts.values()))
    return (
        f'<li class="card" id="card-{index}"><button type="button">{picture}'
        f'<span class="name">{_escaped(entry.name)}</span></button>'
        f"{f'<p>{facts}</p>' if facts else ''}{lacking}{_values(entry, columns)}</li>"
    )


def _values(entry: Comparison, columns: Sequence[Column]) -> str:
    """A row for each metric, a column for each method that the columns' names put before " · "."""
    methods: dict[str, None] = {}
    metrics: dict[str, dict[str, Column]] = {}
    for column in columns:
        method, _, metric = column.name.rpartition(" · ")
        methods.setdefault(method)
        metrics.setdefault(metric, {})[method] = column
    if not columns:
        return ""
    heads = "".join(f'<th scope="col">{_escaped(method)}</th>' for method in methods)
    head = f"<thead><tr><th></th>{heads}</tr></thead>" if any(methods) else ""
    rows = "".join(_value_row(entry, metric, methods, of) for metric, of in metrics.items())
    return f'<div class="values"><table>{head}<tbody>{rows}</tbody></table></div>'


def _value_row(entry: Comparison, metric: str, methods: Mapping[str, None], of: Mapping[str, Column]) -> str:
    """The best of several methods stands out."""
    better = next(iter(of.values())).better
    numbers = {method: _number(entry.values.get(column.name)) for method, column in of.items()}
    known = [number for number in numbers.values() if number is not None]
    best = (max if better == "higher" else min)(known) if better and len(known) > 1 else None
    cells = []
    for method in methods:
        number = numbers.get(method)
        mark = ' class="best"' if number is not None and number == best else ""
        cells.append(f"<td{mark}>{_shown(number, of[method].decimals) if method in of else ''}</td>")
    arrow = {"higher": " ↑", "lower": " ↓", None: ""}[better]
    return f'<tr><th scope="row">{_escaped(metric)}{arrow}</th>{"".join(cells)}</tr>'


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _shown(number: float | None, decimals: int) -> str:
    if number is None:
        return "–"
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    return f"{number:.{decimals}f}" if abs(number) < 1e9 else f"{number:.{decimals}e}"


def _entry_data(entry: Comparison, encoded: _Encoded, columns: Sequence[Column]) -> dict[str, object]:
    """What the page's script has to know of an entry."""
    layers = []
    for layer, picture in zip(entry.layers, encoded.layers, strict=True):
        about = {"title": _printable(layer.title)}
        if isinstance(picture, _Picture):
            layers.append(about | {"size": picture.size, "encoding": picture.encoding})
        else:
            layers.append(about | {"error": _printable(picture)})
    numbers = [_number(entry.values.get(column.name)) for column in columns]
    # JSON has no infinity; the largest number sorts as well.
    finite = [None if number is None else max(-1.7e308, min(number, 1.7e308)) for number in numbers]
    facts = [(_printable(key), _printable(value)) for key, value in entry.facts.items()]
    return {"name": _printable(entry.name), "layers": layers, "values": finite, "facts": facts}
