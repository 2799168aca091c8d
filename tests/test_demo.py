"""`make demo`'s script, into a temporary folder."""

import numpy as np
from PIL import Image

from examples import demo


def test_the_demo_runs_the_real_scripts_and_draws_its_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    demo.main()
    assert "RANDOM weights" in capsys.readouterr().out
    names = {path.stem for path in demo.PHOTOS.iterdir() if path.suffix != ".md"}
    assert {path.stem for path in (tmp_path / "results").iterdir()} == names
    for path in (tmp_path / "results").iterdir():
        source = next(demo.PHOTOS.glob(f"{path.stem}.*"))
        with Image.open(path) as result, Image.open(source) as photo:
            assert result.size == (4 * photo.width, 4 * photo.height)
            assert np.asarray(result).std() > 10
    with Image.open(tmp_path / "comparison.png") as sheet:
        assert min(sheet.size) > 1000
