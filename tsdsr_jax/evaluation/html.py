"""Writes a report as one HTML file: thumbnails, values, and a viewer that compares pictures under a slider.

The page needs no network, and its policy forbids any access to it. Thumbnails come first, so that even a file of many
megabytes shows at once. The full pictures follow as inert text, which a browser decodes only when a picture is opened. The
page's HTML, CSS and JavaScript are in `report_page/`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template

from tsdsr_jax.atomic import replacing
from tsdsr_jax.errors import UserError
from tsdsr_jax.evaluation.cards import card, entry_data, escaped, to_unicode
from tsdsr_jax.evaluation.comparison import Column, Comparison, Summary
from tsdsr_jax.evaluation.pictures import ENCODINGS, store_entries, write_pictures

# Marks our reports, which may be replaced.
_MARK = '<meta name="generator" content="tsdsr_jax report">'
_PICTURES = "<!-- pictures -->\n"


def check_report_path(path: Path) -> None:
    """Refuses a path where no report can be written, or that holds something else.

    Raises:
      UserError: the path does not end in .html or .htm, is a folder or a file that is not our report, or cannot be written.
    """
    # Not Path's methods: they raise an error below a folder that may not be searched.
    if os.path.isdir(path):
        raise UserError(
            f"{path}: is a folder; name a file in it for the report, such as {path / 'report.html'}"
        )
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path}: a report is a web page; give it a name that ends in .html")
    if os.path.lexists(path) and not _is_ours(path):
        raise UserError(
            f"{path}: exists and is not a report of this program; remove it, or choose another file"
        )
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"{path}: cannot be written, because {folder} is not a writable folder; choose another place"
        )


def write_report(
    path: Path,
    title: str,
    entries: Sequence[Comparison],
    columns: Sequence[Column] = (),
    summary: Summary | None = None,
    notes: Sequence[str] = (),
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Writes the page, complete or not at all.

    Only a few pictures are in memory at a time, besides all thumbnails. If a picture cannot be read, the page shows the
    reason.

    Args:
      path: the file; see `check_report_path`.
      title: heading of the page.
      entries: what to show, in the page's initial order.
      columns: the values to show, in order.
      summary: a table above the pictures.
      notes: sentences at the top, such as what could not be computed.
      progress: called after each entry.

    Raises:
      UserError: the path is refused, or cannot be written.
    """
    check_report_path(path)
    with replacing(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as pictures:
        cards, data = [], []
        for index, (entry, stored) in enumerate(store_entries(entries)):
            cards.append(card(index, entry, stored, columns))
            data.append(entry_data(entry, stored, columns))
            write_pictures(pictures, index, stored)
            progress()
        head, tail = _page(title, cards, data, columns, summary, notes)
        pictures.seek(0)
        with open(temporary, "wb") as file:
            file.write(head.encode())
            shutil.copyfileobj(pictures, file, 2**20)
            file.write(tail.encode())


def _is_ours(path: Path) -> bool:
    try:
        if not path.is_file():  # opening a pipe or device would block
            return False
        with open(path, "rb") as file:
            return _MARK.encode() in file.read(1000)
    except OSError as error:
        raise UserError(
            f"{path}: exists and cannot be read ({error.strerror}); remove it, or choose another file"
        ) from error


def _page(
    title: str,
    cards: Sequence[str],
    data: Sequence[Mapping[str, object]],
    columns: Sequence[Column],
    summary: Summary | None,
    notes: Sequence[str],
) -> tuple[str, str]:
    """The page before and after the pictures."""
    files = resources.files("tsdsr_jax.evaluation") / "report_page"
    page, style, script = (
        (files / name).read_text("utf-8") for name in ("page.html", "style.css", "script.js")
    )
    head, _, tail = page.partition(_PICTURES)
    described = {
        "entries": data,
        "columns": [{"name": to_unicode(c.name), "better": c.better} for c in columns],
    }
    return Template(head).substitute(
        mark=_MARK,
        title=escaped(title),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        notes=_notes(notes),
        summary=_summary(summary),
        sort_options=_sort_options(columns),
        cards="\n".join(cards),
        encodings=ENCODINGS,
        # Escaped so that nothing in it can end the block.
        data=json.dumps(described).replace("<", "\\u003c"),
    ), tail


def _hash(text: str) -> str:
    """The hash with which the page's content security policy allows a style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _notes(notes: Sequence[str], most: int = 5) -> str:
    """A list of notes; those beyond `most` are collapsed."""
    items = [f"<li>{escaped(note)}</li>" for note in notes]
    if not items:
        return ""
    rest = items[most:]
    folded = f"<details><summary>{len(rest)} more</summary><ul>{''.join(rest)}</ul></details>" if rest else ""
    return f'<ul class="notes">{"".join(items[:most])}{folded}</ul>'


def _summary(summary: Summary | None) -> str:
    if summary is None:
        return ""
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in summary.columns)
    rows = []
    for first, *others in summary.rows:
        cells = "".join(f"<td>{escaped(text)}</td>" for text in others)
        rows.append(f'<tr><th scope="row">{escaped(first)}</th>{cells}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" role="region" aria-label="Summary" tabindex="0">{table}</div>'


def _sort_options(columns: Sequence[Column]) -> str:
    named = [f'<option value="{i}">{escaped(column.name)}</option>' for i, column in enumerate(columns)]
    return '<option value="name">name</option>' + "".join(named)
