import numpy as np
from PIL import Image

from tsdsr_jax.images.sheet import comparison_sheet


def solid(color: tuple[int, int, int], width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def test_each_picture_stands_in_its_cell_at_its_rows_size():
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    rows = [[solid(red, 10, 20), solid(green, 40, 80)], [solid(blue, 40, 20), solid(red, 10, 5)]]
    sheet = np.asarray(comparison_sheet(rows, ["input", "result"], cell_width=40))
    for color, cells in ((red, 40 * 80 + 40 * 20), (green, 40 * 80), (blue, 40 * 20)):
        assert (sheet == color).all(-1).sum() == cells


def test_a_small_input_is_enlarged_without_smoothing():
    checker = Image.fromarray(np.indices((4, 4)).sum(0).astype(np.uint8) % 2 * 255)
    sheet = np.asarray(comparison_sheet([[checker]], [""], cell_width=40))
    cell = sheet[26:66, 8:48]
    assert set(np.unique(cell)) == {0, 255}
    assert (cell[0, :10] == cell[0, 0]).all() and (cell[0, 0] != cell[0, 10]).all()


def test_long_titles_stay_within_narrow_columns():
    rows = [[solid((0, 0, 0), 96, 96)] * 3]
    sheet = comparison_sheet(rows, ["photograph", "target (sharpened)", "degraded 1"], cell_width=96)
    titles = np.asarray(sheet)[:26]
    margins = np.r_[0:8, 104:112, 208:216, 312:320]
    background = titles[0, 0]
    assert (titles[:, margins] == background).all() and (titles[:, 112:208] != background).any()
