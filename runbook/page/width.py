"""A finished page for the Prefect UI, in which nothing is wider than a phone: no reader scrolls sideways.

The UI (3.9.1) ignores styles and breaks no long word: a wide table or a block of code makes the whole page scroll. Text
is as wide as a phone's window there, or 65 characters: a table that fits the phone fits a desk. Widths are estimates.
The .md file and the JSON file keep the report as it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from runbook.page.markdown import escaped

PHONE = 330.0
"""Pixels for text in a window of 390 px with a scroll bar."""
TEXT, CELL = 16.0, 14.0
"""Sizes of the letters; those of headings are larger than they are, since they are bold."""
HEADINGS = {"#": 39.0, "##": 26.0, "###": 22.0, "####": 17.0}
INDENT, GAP = 34.0, 16.0
"""Pixels that a list is indented by, and between two columns."""
LEAST_JOINED, MOST_FIRST = 150.0, 170.0
"""Pixels for a column into which others are joined, and for a first column whose words are broken."""
BREAK = "\u200b"
"""Allows a line break within a word. It is invisible, but copied with the word: as few as possible."""

_PIECE = re.compile(
    r"(?P<image>!\[[^\]]*\]\([^)]*\))"
    r"|(?P<target>\]\([^()\s]*\))"
    r"|(?P<tag></?[a-z][^<>]*>)"
    r"|(?P<url>https?://(?:(?!&[lg]t;)[^\s<>()|`])+)"
    r"|(?P<code>(?<!`)(?P<fence>`+)(?!`).+?(?<!`)(?P=fence)(?!`))"
    r"|(?P<letter>&#?\w+;|\\.|.)",
    re.DOTALL,
)
_LONG = re.compile(r"\S{10}")
_CELLS = re.compile(r"(?<!\\)\|")
_RULE = re.compile(r"[|:\- ]+")
_FENCE = re.compile(r"(`{3,})[^`]*")
_GOOD_ENDS = frozenset("/_.,:;=&@)]}")
_NARROW, _WIDE = frozenset("iljtfrI.,:;|'!()[]{}\"*-/ "), frozenset("mwMW@%&")


def fit(page: str) -> str:
    """The page with long words broken, the columns of wide tables joined, and code blocks as lines that wrap."""
    lines, fitted = iter(page.split("\n")), list[str]()
    table: list[str] = []
    for line in lines:
        if line.startswith("|"):
            table.append(line)
            continue
        fitted += _table(table)
        table = []
        fitted += _code(lines, opened[1]) if (opened := _FENCE.fullmatch(line)) else [_line(line)]
    return "\n".join([*fitted, *_table(table)])


def _line(line: str) -> str:
    """A heading, a list item or a paragraph."""
    if not _LONG.search(line):
        return line
    first = line.partition(" ")[0]
    size = HEADINGS.get(first, TEXT)
    return _broken(line, size, PHONE - (INDENT if first in ("-", "1.") else 0))


def _code(lines: Iterator[str], fence: str) -> Iterator[str]:
    """The block up to its closing fence, as text of fixed width."""
    while (line := next(lines, fence)) != fence:
        indent = len(line) - len(line.lstrip())
        text = "&nbsp;" * indent + escaped(line.strip()).replace("`", r"\`")
        yield f"<samp>{_broken(text, TEXT, PHONE, fixed=True)}</samp><br>"
    yield ""


def _table(lines: Sequence[str]) -> list[str]:
    heading, *rows = [[cell.strip() for cell in _CELLS.split(line.strip().strip("|"))] for line in lines] or [[]]
    if not rows or not _RULE.fullmatch(lines[1]) or any(len(row) != len(heading) for row in rows):
        return [_line(line) for line in lines]
    rows[0] = heading
    least = [max(_longest(row[number]) for row in rows) for number in range(len(heading))]
    if sum(least) + GAP * (len(least) - 1) <= PHONE:
        return list(lines)
    kept = _kept(least)
    rows = [_joined(row, heading, kept) for row in rows]
    limits = _limits([*least[:kept], LEAST_JOINED])
    cells = [[_broken(cell, CELL, limit) for cell, limit in zip(row, limits, strict=True)] for row in rows]
    shown = ["| " + " | ".join(row) + " |" for row in cells]
    return [shown[0], "|" + "---|" * len(limits), *shown[1:]]


def _kept(least: Sequence[float]) -> int:
    """How many columns stay as they are; the others are joined into one."""
    fitting = (
        number for number in range(len(least) - 1, 1, -1) if sum(least[:number]) + GAP * number + LEAST_JOINED <= PHONE
    )
    return next(fitting, min(1, len(least) - 1))


def _joined(row: Sequence[str], heading: Sequence[str], kept: int) -> list[str]:
    """`db 0 | *keys* 200 · *memory* 12.1 kB`. A single column that is left keeps its heading."""
    left = list(zip(heading, row, strict=True))[kept:]
    if len(left) == 1:
        return list(row)
    named = ((f"*{name}* {value}" if name else value) for name, value in left if value)
    return [*row[:kept], "" if row is heading else " · ".join(named)]


def _limits(least: Sequence[float]) -> list[float]:
    """Pixels for each column; the last has what the others leave."""
    *first, last = least
    room = PHONE - GAP * len(first)
    if sum(first) + min(last, LEAST_JOINED) > room and first:
        first = [min(first[0], max(MOST_FIRST, room - last)), *first[1:]]
    return [*first, room - sum(first)]


class _Piece(NamedTuple):
    """What is drawn or left out as a whole: a letter, an entity, a tag, the address of a link."""

    source: str
    width: float
    ends: bool
    """A line may end after it as it is."""


def _longest(text: str) -> float:
    """Pixels of the longest part of a cell in which no line can end."""
    widest = run = 0.0
    for piece in _pieces(text, CELL):
        run = 0.0 if piece.ends else run + piece.width
        widest = max(widest, run)
    return widest


def _broken(text: str, size: float, most: float, *, fixed: bool = False) -> str:
    """The text with breaks in words that are wider than `most` pixels: after a sign if there is one, or anywhere."""
    if not _LONG.search(text):
        return text
    parts, began, good, run, after = list[str](), 0, 0, 0.0, 0.0
    for piece in _pieces(text, size, fixed=fixed):
        if piece.ends:
            parts.append(piece.source)
            began = good = len(parts)
            run = after = 0.0
            continue
        if piece.width and run + piece.width > most:
            at, left = (good, run - after) if good > began else (len(parts), 0.0)
            parts.insert(at, BREAK)
            began = good = at + 1
            run = after = left
            after = 0.0
        parts.append(piece.source)
        run += piece.width
        if piece.source[-1:] in _GOOD_ENDS and piece.width:
            good, after = len(parts), run
    return "".join(parts)


def _pieces(text: str, size: float, *, fixed: bool = False) -> Iterator[_Piece]:
    """The parts of a line of Markdown."""
    for found in _PIECE.finditer(text):
        source = found[0]
        match found.lastgroup:
            case "image":
                yield _Piece(source, 0, True)
            case "target":
                yield _Piece(source, 0, False)
            case "tag":
                yield _Piece(source, 0, source.startswith("<br"))
            case "url":
                yield from _address(source, size)
            case "code" | "fence":
                fence = found["fence"]
                yield _Piece(fence, size * 0.5, False)
                yield from (_letter(one, size * 0.875, fixed=True) for one in source[len(fence) : -len(fence)])
                yield _Piece(fence, size * 0.5, False)
            case _:
                hyphen = source == "-" and text[found.end() : found.end() + 1].isalpha()
                letter = _letter(source, size, fixed=fixed)
                yield letter._replace(ends=True) if hyphen else letter


def _address(url: str, size: float) -> Iterator[_Piece]:
    """A bare address is a link in the UI, which a break would change: it gets the whole address as its target."""
    letters = [_letter(one, size) for one in url]
    width = sum(one.width for one in letters)
    yield from (
        [_Piece(url, width, False)]
        if width < LEAST_JOINED
        else [_Piece("[", 0, False), *letters, _Piece(f"]({url})", 0, False)]
    )


def _letter(source: str, size: float, *, fixed: bool = False) -> _Piece:
    """A letter, an escaped one or an entity, with its width."""
    letter = source[-1] if source.startswith("\\") else source
    if letter.isspace() or letter in ("—", "…", BREAK):
        return _Piece(source, 0, True)
    if unicodedata.east_asian_width(letter[0]) in "WF":
        return _Piece(source, size, True)
    return _Piece(source, size * (0.61 if fixed else _ems(letter)), False)


def _ems(letter: str) -> float:
    if letter[0] in _NARROW:
        return 0.36
    return 0.92 if letter[0] in _WIDE else 0.7 if letter.isupper() else 0.6
