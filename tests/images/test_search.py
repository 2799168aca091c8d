"""One rule for links: they are followed, files keep all their names, folders have one, and circles end."""

import os
from pathlib import Path

import pytest

from tsdsr_jax.errors import UserError
from tsdsr_jax.images.search import beside, composed, find_photographs


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(root: Path, output: Path | None = None) -> list[str]:
    return [path.relative_to(root).as_posix() for path in find_photographs(root, output).files]


def test_images_of_any_suffix_in_subfolders_but_no_hidden_ones(tmp_path):
    root = touch(
        tmp_path / "in", "b.png", "a/c.JPG", "a/b/d.tiff", "notes.txt", ".hidden.png", ".thumbnails/x.png"
    )
    assert found(root) == ["a/b/d.tiff", "a/c.JPG", "b.png"]


def test_a_linked_folder_is_followed(tmp_path):
    elsewhere, root = touch(tmp_path / "elsewhere", "x.png", "deep/y.png"), touch(tmp_path / "in", "z.png")
    (root / "link").symlink_to(elsewhere)
    assert found(root) == ["link/deep/y.png", "link/x.png", "z.png"]


def test_linked_files_are_found_under_each_name(tmp_path):
    """Two equal files of a store that keeps contents once are two pictures."""
    elsewhere, root = touch(tmp_path / "elsewhere", "x.png"), touch(tmp_path / "in", "z.png", "notes.txt")
    (root / "a.png").symlink_to(root / "z.png")
    (root / "from.png").symlink_to(elsewhere / "x.png")
    (root / "again.png").symlink_to(elsewhere / "x.png")
    (root / "notes.png").symlink_to(root / "notes.txt")  # its name says that it is an image
    assert found(root) == ["a.png", "again.png", "from.png", "notes.png", "z.png"]


def test_circles_end_and_each_folder_is_found_once(tmp_path):
    root = touch(tmp_path / "in", "a/x.png", "b/y.png")
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "self").symlink_to(root / "b")
    (root / "c, which is b").symlink_to(root / "b")
    (root / "loop").symlink_to(root / "loop")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "link to the root").symlink_to(root)
    assert found(root) == ["a/x.png", "b/y.png", "loop.png"]
    (tmp_path / "alias").symlink_to(root)
    assert found(tmp_path / "alias") == ["a/x.png", "b/y.png", "loop.png"]


def test_the_first_name_of_a_folder_counts(tmp_path):
    """Training sets are known by the names of their photographs: this order must stay."""
    root = touch(tmp_path / "in", "z/0.png", "z/1.png", "m.png")
    (root / "a").symlink_to(root / "z")
    (root / "b.png").symlink_to(root / "m.png")
    assert found(root) == ["a/0.png", "a/1.png", "b.png", "m.png"]


def test_a_deep_tree(tmp_path):
    deep = "/".join(["d"] * 400)
    assert found(touch(tmp_path / "in", f"{deep}/x.png")) == [f"{deep}/x.png"]


def test_a_broken_link_is_found_so_that_reading_reports_it(tmp_path):
    root = touch(tmp_path / "in", "a.png")
    (root / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (root / "broken folder").symlink_to(tmp_path / "nowhere")
    assert found(root) == ["a.png", "broken.png"]


def test_results_are_no_photographs(tmp_path):
    root = touch(tmp_path / "in", "a.png", "out/a.png", "out/deep/b.png")
    (root / "latest.png").symlink_to(root / "out" / "a.png")
    (root / "results").symlink_to(root / "out")
    (root / "deep results").symlink_to(root / "out" / "deep")
    assert found(root, root / "out") == ["a.png"]
    # An output folder around the photographs changes nothing.
    (root / "link.png").symlink_to(touch(tmp_path, "other.png") / "other.png")
    names = ["a.png", "deep results/b.png", "latest.png", "link.png", "out/a.png"]
    assert found(root, tmp_path) == names


def test_folders_without_photographs_are_refused(tmp_path):
    with pytest.raises(UserError, match="nothing: no such folder"):
        find_photographs(tmp_path / "nothing")
    touch(tmp_path / "empty", "notes.txt")
    with pytest.raises(UserError, match="no images in it"):
        find_photographs(tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(UserError, match="is also the output folder"):
        find_photographs(tmp_path / "empty", tmp_path / "link")


# --- what is left out -----------------------------------------------------------------------


def test_pictures_of_other_suffixes_are_found_or_named(tmp_path):
    root = touch(
        tmp_path / "in", "a.jfif", "b.JPE", "c.gif", "d.heic", "sub/e.AVIF", "f.CR2", "g.mp4", ".h.heic"
    )
    search = find_photographs(root)
    assert [path.name for path in search.files] == ["a.jfif", "b.JPE", "c.gif"]
    assert search.problems == []
    (line,) = search.left_out()
    assert line.startswith(
        "3 pictures cannot be used (.avif, .cr2, .heic is not read; export as PNG or JPEG): "
    )
    assert all(name in line for name in ("d.heic", "e.AVIF", "f.CR2"))
    # Where there is nothing else, they are the reason.
    with pytest.raises(UserError, match=r"no images in it .*; 1 picture cannot be used \(.heic is not read"):
        find_photographs(touch(tmp_path / "phone", "d.heic"))


def test_what_cannot_be_reached_is_named(tmp_path):
    root = touch(tmp_path / "in", "a.png")
    for name in ("album", "notes.txt", "b.png", "v1.2"):
        (root / name).symlink_to(tmp_path / "nowhere")
    (root / "self").symlink_to(root / "self")
    os.mkfifo(root / "pipe.png")
    search = find_photographs(root)
    assert [path.name for path in search.files] == ["a.png", "b.png"]  # reading reports the link
    told = [line.removeprefix(f"{root}/").split(":")[0] for line in search.problems]
    assert told == ["album", "pipe.png", "self", "v1.2"]
    assert "the link leads nowhere" in search.problems[0] and "not a regular file" in search.problems[1]


def test_an_unreadable_folder_costs_only_itself(tmp_path, monkeypatch):
    root = touch(tmp_path / "in", "a.png", "locked/b.png", "z/c.png")
    scan = os.scandir

    def refuse(path):  # as for anybody but root
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    search = find_photographs(root)
    assert [path.name for path in search.files] == ["a.png", "c.png"]
    assert search.problems == [
        f"{root / 'locked'}: is left out, because the folder cannot be read (Permission denied); check its permissions"
    ]


def test_a_folder_is_known_by_its_inode(tmp_path, monkeypatch):
    """As where one folder is mounted at two places, so that no path tells that it is the same."""
    root = touch(tmp_path / "in", "a/x.png", "b/x.png", "c/x.png")
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: stat(str(path).replace("in/b", "in/a"), **how))
    assert found(root) == ["a/x.png", "c/x.png"]


def test_unicode_forms_of_a_name(tmp_path):
    photo, text = "Caf\u00e9.png", "Cafe\u0301.txt"
    root = touch(tmp_path, photo, text, "plain.png", "plain.txt")
    assert composed(text) == "Caf\u00e9.txt"
    assert beside(root / photo, ".txt") == root / text
    assert beside(root / "plain.png", ".txt") == root / "plain.txt"
    assert beside(root / photo, ".json") is None
