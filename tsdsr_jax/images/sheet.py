"""Contact sheets: pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN, _TITLE = 8, 26
_FONT_SIZES = range(15, 7, -1)  # the largest at which all titles fit their columns is used
_BACKGROUND, _INK = (24, 24, 24), (235, 235, 235)


def comparison_sheet(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], cell_width: int = 384
) -> Image.Image:
    """Lays out one row per photograph and one titled column per method.

    Args:
      rows: pictures of each photograph, as many as there are titles. All pictures of a row are shown at the same size;
        smaller ones (a low-resolution input) are enlarged without smoothing, so that their pixels are visible.
      titles: one per column.
      cell_width: width of a column in pixels.
    """
    font = _title_font(titles, cell_width)
    heights = [max(round(cell_width * p.height / p.width) for p in row) for row in rows]
    width = len(titles) * (cell_width + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, _TITLE + sum(h + _MARGIN for h in heights) + _MARGIN), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((_MARGIN + column * (cell_width + _MARGIN), 5), title, _INK, font)
    top = _TITLE
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            enlarging = picture.width < cell_width
            method = Image.Resampling.NEAREST if enlarging else Image.Resampling.LANCZOS
            cell = picture.convert("RGB").resize((cell_width, height), method)
            sheet.paste(cell, (_MARGIN + column * (cell_width + _MARGIN), top))
        top += height + _MARGIN
    return sheet


def _title_font(titles: Sequence[str], width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    fonts = [ImageFont.load_default(size=size) for size in _FONT_SIZES]
    fitting = (font for font in fonts if all(font.getlength(title) <= width for title in titles))
    return next(fitting, fonts[-1])
