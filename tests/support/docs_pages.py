"""README and the pages in docs/, taken apart: fenced blocks, the commands in them, links, anchors, quoted code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from tsdsr_jax.places import CHECKOUT

PAGES = ("README.md", *sorted(f"docs/{file.name}" for file in (CHECKOUT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Snippet(NamedTuple):
    """A command line, or a block of Python; `line` is where it begins on its page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def read(page: str) -> str:
    return (CHECKOUT / page).read_text()


def snippets(page: str) -> list[Snippet]:
    """Everything on a page that a reader may run, in order; blocks of output are left out."""
    text, found = read(page), []
    for fence in FENCE.finditer(text):
        language, block = fence.groups()
        first = text[: fence.start(2)].count("\n") + 1
        assert language in ("bash", "python", "text"), f"{page}:{first - 1}: say what this block is"
        if language == "python":
            found.append(Snippet(page, first, language, block))
        elif language == "bash":
            found += [Snippet(page, first + line, language, words) for line, words in command_lines(block)]
    return found


def command_lines(block: str) -> Iterator[tuple[int, str]]:
    """(line in the block, command): continued lines joined, comments and empty lines left out."""
    lines = iter(enumerate(block.splitlines()))
    for number, line in lines:
        while line.endswith("\\"):
            line = line[:-1].rstrip() + " " + next(lines)[1].strip()
        line = re.sub(r"(^|\s+)#.*$", "", line)
        if line:
            yield number, line


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", read(page))


def links(page: str) -> list[str]:
    """Targets of links and pictures that lie in this repository, as written."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [target for target in targets if not re.match(r"https?:", target)]


def anchors(page: str) -> set[str]:
    """What GitHub calls a page's headings in links."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def quoted(page: str) -> list[str]:
    """What stands between backquotes in the prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))
