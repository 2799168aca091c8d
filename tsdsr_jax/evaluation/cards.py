"""The cards of a report: one per entry, with its thumbnail and a table of its values."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from tsdsr_jax.evaluation.comparison import Column, Comparison
from tsdsr_jax.evaluation.pictures import StoredEntry, StoredPicture


def to_unicode(text: str) -> str:
    """Replaces bytes of file names that are not UTF-8; Python represents them as single surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def escaped(text: str) -> str:
    return html.escape(to_unicode(text))


def card(index: int, entry: Comparison, stored: StoredEntry, columns: Sequence[Column]) -> str:
    """The HTML of an entry's card."""
    if stored.thumbnail:
        source, (width, height) = stored.thumbnail
        picture = f'<img src="{source}" alt="" width="{width}" height="{height}" decoding="async">'
    else:
        picture = '<span class="broken">no picture</span>'
    missing = [
        escaped(layer.title)
        for layer, picture in zip(entry.layers, stored.layers, strict=True)
        if isinstance(picture, str)
    ]
    lacking = f'<p class="lacking">{", ".join(missing)}: cannot be shown</p>' if missing else ""
    facts = " · ".join(map(escaped, entry.facts.values()))
    return (
        f'<li class="card" id="card-{index}"><button type="button">{picture}'
        f'<span class="name">{escaped(entry.name)}</span></button>'
        f"{f'<p>{facts}</p>' if facts else ''}{lacking}{_values(entry, columns)}</li>"
    )


def _values(entry: Comparison, columns: Sequence[Column]) -> str:
    """A table of the values: a row for each metric, a column for each method named before " · "."""
    methods: dict[str, None] = {}
    metrics: dict[str, dict[str, Column]] = {}
    for column in columns:
        method, _, metric = column.name.rpartition(" · ")
        methods.setdefault(method)
        metrics.setdefault(metric, {})[method] = column
    if not columns:
        return ""
    heads = "".join(f'<th scope="col">{escaped(method)}</th>' for method in methods)
    head = f"<thead><tr><th></th>{heads}</tr></thead>" if any(methods) else ""
    rows = "".join(_value_row(entry, metric, methods, of) for metric, of in metrics.items())
    return f'<div class="values"><table>{head}<tbody>{rows}</tbody></table></div>'


def _value_row(entry: Comparison, metric: str, methods: Mapping[str, None], of: Mapping[str, Column]) -> str:
    """One metric's row, with the best of several methods highlighted."""
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
    return f'<tr><th scope="row">{escaped(metric)}{arrow}</th>{"".join(cells)}</tr>'


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _shown(number: float | None, decimals: int) -> str:
    if number is None:
        return "–"
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    return f"{number:.{decimals}f}" if abs(number) < 1e9 else f"{number:.{decimals}e}"


def entry_data(entry: Comparison, stored: StoredEntry, columns: Sequence[Column]) -> dict[str, object]:
    """The data that the page's script needs for an entry."""
    layers: list[dict[str, object]] = []
    for layer, picture in zip(entry.layers, stored.layers, strict=True):
        title = to_unicode(layer.title)
        if isinstance(picture, StoredPicture):
            layers.append({"title": title, "size": picture.size, "encoding": picture.encoding})
        else:
            layers.append({"title": title, "error": to_unicode(picture)})
    numbers = [_number(entry.values.get(column.name)) for column in columns]
    # JSON has no infinity; a very large number sorts the same.
    finite = [None if number is None else max(-1.7e308, min(number, 1.7e308)) for number in numbers]
    facts = [(to_unicode(key), to_unicode(value)) for key, value in entry.facts.items()]
    return {"name": to_unicode(entry.name), "layers": layers, "values": finite, "facts": facts}
