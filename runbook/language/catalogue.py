"""Catalogues of gettext (`ja/*.po`), and how a finished text finds its message.

A report is composed in English: `f"{database} goes back to {at}"`. Its page looks for the message of which a text was
made, `{database} goes back to {at}`, and puts the same values into the translation. So the flows have one language, a
translator has all messages in files that every editor of .po files knows, and what is missing stays English.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DIRECTORY = Path(__file__).parent
SEPARATORS = ("; ", ". ", ": ", ", ")
"""Between clauses that were joined to one text, outermost first."""
MOST_DEPTH = 6
FEWEST_LETTERS = 4
"""A message of values and hardly a letter, such as `{name}: {value}`, would fit everything."""
MOST_REMEMBERED = 10_000
_VALUE = re.compile(r"\{(\w+)\}")
_ENTRY = re.compile(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"(?:\n|$))+)', re.MULTILINE)


def read(language: str) -> dict[str, str]:
    """Message → translation, of every catalogue of a language. What is empty or fuzzy is left out.

    Read here and not by Babel, which needs seconds for them: `deployments.messages` writes them, always in one form.
    """
    found: dict[str, str] = {}
    for path in sorted((DIRECTORY / language).glob("*.po")):
        for block in path.read_text(encoding="utf-8").split("\n\n"):
            if (entry := _ENTRY.search(block)) and not re.search(r"^#,.*\bfuzzy\b", block, re.MULTILINE):
                message, translation = map(_unquoted, entry.groups())
                if message and translation:
                    found[message] = translation
    return found


def _unquoted(lines: str) -> str:
    return "".join(ast.literal_eval(line) for line in lines.splitlines())


@dataclass(frozen=True)
class Template:
    """A message with values: its fixed parts, and the names of the values between them."""

    parts: tuple[str, ...]
    names: tuple[str, ...]
    translation: str

    @classmethod
    def of(cls, message: str, translation: str) -> Template:
        pieces = _VALUE.split(message)
        return cls(tuple(pieces[::2]), tuple(pieces[1::2]), translation)

    @property
    def letters(self) -> int:
        """How much of a text it explains."""
        return sum(map(str.isalpha, "".join(self.parts)))

    @property
    def fixed(self) -> int:
        """Its characters between the values."""
        return len("".join(self.parts))

    @property
    def longest(self) -> str:
        return max(self.parts, key=len)

    def values(self, text: str) -> dict[str, str] | None:
        """The values in a text, by name; None where it was not made of this message."""
        first, *inner, last = self.parts
        if not text.startswith(first) or not text.endswith(last) or len(text) < len(first) + len(last):
            return None
        at, end, found = len(first), len(text) - len(last), list[str]()
        for part in inner:
            next_at = text.find(part, at, end) if part else at
            if next_at < 0:
                return None
            found.append(text[at:next_at])
            at = next_at + len(part)
        return dict(zip(self.names, [*found, text[at:end]], strict=True))


class Catalogue:
    """The messages of one language."""

    def __init__(self, messages: Mapping[str, str]) -> None:
        self._whole = {message: text for message, text in messages.items() if not _VALUE.search(message)}
        made = [Template.of(*one) for one in messages.items() if _VALUE.search(one[0])]
        able = [(one.longest, one) for one in made if one.letters >= FEWEST_LETTERS]
        self._templates: Sequence[tuple[str, Template]] = sorted(able, key=lambda one: (-one[1].letters, -one[1].fixed))
        self._known: dict[tuple[str, bool], str] = {}

    def translate(self, text: str, *, words: bool = False) -> str:
        """A text with its values, which are translated likewise; as it is where no message fits. `words`: also one that
        is a single word."""
        if (text, words) not in self._known:
            if len(self._known) > MOST_REMEMBERED:
                self._known.clear()
            self._known[text, words] = self._translated(text, words, MOST_DEPTH)
        return self._known[text, words]

    def _translated(self, text: str, words: bool, depth: int) -> str:
        flat = " ".join(text.split())
        if not depth or not re.search("[A-Za-z]", flat) or not (words or " " in flat):
            return text
        if flat in self._whole:
            return self._whole[flat]
        fits = list(self._fits(flat))
        within_clause = [one for one in fits if not _spans_clauses(*one)]
        if within_clause:
            return self._filled(*within_clause[0], depth)
        return self._by_parts(flat, depth) or (self._filled(*fits[0], depth) if fits else text)

    def _fits(self, text: str) -> Iterator[tuple[Template, dict[str, str]]]:
        """The messages of which a text may be made, those that explain most of it first."""
        for longest, template in self._templates:
            if longest in text and (values := template.values(text)) is not None:
                yield template, values

    def _filled(self, template: Template, values: Mapping[str, str], depth: int) -> str:
        made = {name: self._translated(value, False, depth - 1) for name, value in values.items()}
        return _VALUE.sub(lambda found: made.get(found[1], found[0]), template.translation)

    def _by_parts(self, text: str, depth: int) -> str:
        """Joined clauses, each translated; "" where none could be."""
        for separator in filter(text.__contains__, SEPARATORS):
            parts = text.split(separator)
            made = [self._translated(part, True, depth - 1) for part in parts]
            if made != parts:
                return _sentences(made) if separator == ". " else separator.join(made)
        return ""


def _spans_clauses(template: Template, values: Mapping[str, str]) -> bool:
    """Whether a value is more than one clause: `{failed} of {number} requests failed` is no message of
    `API error rate: 8 of 20 requests failed`, but of its second clause. The value at the end may have a colon."""
    inner = template.names if template.parts[-1] else template.names[:-1]
    if any(": " in values[name] for name in inner):
        return True
    return any("; " in one or ". " in one or one.count("(") != one.count(")") for one in values.values())


def _sentences(parts: Sequence[str]) -> str:
    """Japanese sentences end with their own full stop."""
    ends = ["。" if re.search(r"[ぁ-んァ-ヶ一-龥」]$", part) else ". " for part in parts]
    return "".join(part + end for part, end in zip(parts[:-1], ends, strict=False)) + parts[-1]
