"""Values on a page of Markdown: shown as they are, whatever is in them. Only `link` makes a link."""

from __future__ import annotations

import re
from html import escape, unescape

# Inside a word `_` marks nothing. A backtick makes code at most, which holds no link; hints use it.
_MARKS = re.compile(r"[\\*\[\]~|]|(?<!\w)_|_(?!\w)")
_ESCAPED = re.compile(r"\\([\\*\[\]~|_])")
_LINK = re.compile(r"((?<!\\)\[(?:[^\[\]\\]|\\.)*\]\([^()\s]*\))")
_FENCE = re.compile(r"^`{3,}", re.MULTILINE)
_ours = set[str]()
LITERAL = (
    r"!?\[(?:[^\[\]\\]|\\.)*\]\([^()\s]*\)|</?[a-z][^<>]*>|https?://[^\s<>()|`]+"
    r"|(?<!`)(?P<fence>`+)(?!`).+?(?<!`)(?P=fence)(?!`)"
)
"""Of a page's line: links, pictures, tags, addresses and code."""


def escaped(text: str) -> str:
    """A value in one line of a page: no emphasis, image, HTML, cell or link begins or ends in it, but for what `link`
    made in this process."""
    parts = _LINK.split(text) if "](" in text else [text]
    return "".join(part if part in _ours else _escaped(part) for part in parts)


def plain(text: str) -> str:
    """The value again, of what `escaped` made."""
    return unescape(_ESCAPED.sub(r"\1", text))


def link(text: str, address: str) -> str:
    """A link of our own: `escaped` leaves it as it is."""
    made = f"[{_escaped(text)}]({address})"
    _ours.add(made)
    return made


def code(text: str) -> str:
    """A value as code within a line."""
    fence = "`" * (_longest(text) + 1)
    inside = " ".join(text.split())
    return f"{fence} {inside} {fence}" if inside.startswith("`") or inside.endswith("`") else f"{fence}{inside}{fence}"


def fenced(text: str, language: str = "") -> str:
    """A block of code, whose fence is longer than any in the text."""
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def before_fence(text: str) -> tuple[str, str]:
    """A text divided where its first block of code begins."""
    found = _FENCE.search(text)
    return (text[: found.start()], text[found.start() :]) if found else (text, "")


def _escaped(text: str) -> str:
    return escape(_MARKS.sub(r"\\\g<0>", text), quote=False)


def _longest(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
