"""Catalogues of gettext (`ja/*.po`), and how a finished text finds its message.

A report is composed in English: `f"{database} goes back to {at}"`. Its page looks for the message of which a text was
made, `{database} goes back to {at}`, and puts the same values into the translation. So the flows have one language, a
translator has all messages in files that every editor of .po files knows, and what is missing stays English.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

DIRECTORY = Path(__file__).parent
LIST = ", "
SEPARATORS = (" — ", "; ", ". ", ": ", LIST)
"""Between clauses that were joined to one text, outermost first."""
FEWEST_LETTERS = 4
"""A message of values and hardly a letter, such as `{name}: {value}`, would fit everything: unless they are numbers, as
in `{number} row`."""
FEW_WORDS = 2
"""A message of few words, such as `write {value}`, also fits what a program printed: half a translation misleads."""
MOST_CHARACTERS, MOST_JOINED = 2000, 4
MOST_REMEMBERED = 10_000
_SPAN = r"-?(?:about |less than )?[\d.,]+ (?:ms|s|min|h|d)(?: \d+ (?:s|min|h))?"
ANYWHERE = ("nothing", "everything", "never", "none", "unknown", "nobody", "chosen", "available", "accepted")
"""Words that are nobody's name."""
KINDS = {
    **dict.fromkeys(("len", "count", "sum"), re.compile(r"-?[\d.,]+")),
    "number": re.compile(r"-?[\d.,]+(?: [a-z]+)?"),
    **dict.fromkeys(("duration", "rounded", "about"), re.compile(_SPAN)),
    "size": re.compile(r"-?[\d.,]+ [kMGT]?B"),
    "counted": re.compile(r"[\d,]+ .+"),
}
"""What a value may be, by its name: functions of runbook/units.py and Python's own. Others may be anything."""
RATIO = re.compile(r"-?[\d.,]+ ?%")
"""What a value whose name ends in `ratio` may be."""
_NOTE = re.compile(r"(.+?) \((.+)\)")
_CLAUSE = re.compile(r"[;:,.] | \(")
"""Where the second of two values begins that have nothing between them (`{until}{why}`): it is a clause, or empty."""
_PREDICATE = re.compile("[がはにので](?![がはにので])")
"""How the translation of a clause begins that follows a name: `is reserved`, in `app__new is reserved`."""
_NEGATION = re.compile(r"(no|not|none|nothing|nobody|neither|never)\b", re.IGNORECASE)
"""How an unknown value at the start of a text cannot begin: `no replica answers` is not made of `{name} answers`."""
_VALUE = re.compile(r"\{(\w+)\}")
_ENTRY = re.compile(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"(?:\n|$))+)', re.MULTILINE)


def read(language: str) -> dict[str, str]:
    """Message → translation, of every catalogue of a language. What is empty or fuzzy is left out.

    Read here and not by Babel, which only development needs: `deployments.messages` writes them, always in one form.
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

    @cached_property
    def letters(self) -> int:
        """How much of a text it explains."""
        return sum(map(str.isalpha, "".join(self.parts)))

    @cached_property
    def fixed(self) -> int:
        """How many characters of a text it explains."""
        return len("".join(self.parts))

    @cached_property
    def words(self) -> int:
        """How many words of a text it explains."""
        return sum(map(_words, self.parts))

    @cached_property
    def free(self) -> int:
        """How many of its values may be anything."""
        return sum(_kind(name) is None for name in self.names)

    @property
    def is_distinctive(self) -> bool:
        """Whether few other texts fit it."""
        return self.letters >= FEWEST_LETTERS - (self.free == 0)

    @property
    def longest_word(self) -> str:
        """A word that every text made of it has; "" where there is no whole one."""
        ends = (
            r"(?<!^)" * (number > 0) + r"\b[A-Za-z]+\b" + r"(?!$)" * (number < len(self.names))
            for number in range(len(self.parts))
        )
        words = [word for part, end in zip(self.parts, ends, strict=True) for word in re.findall(end, part)]
        return max(words, key=len, default="")

    def values(self, text: str) -> dict[str, str] | None:
        """The values in a text, by name; None where it was not made of this message. Each value ends where the next
        fixed part first follows: a pattern that tries every end takes minutes for a long text."""
        first, *inner, last = self.parts
        if not text.startswith(first) or not text.endswith(last) or len(text) < len(first) + len(last):
            return None
        at, end, found = len(first), len(text) - len(last), list[str]()
        for number, part in enumerate(inner):
            till = self._end_of(number, text, at, end)
            if not text.startswith(part, till, end):
                till = text.find(part, at, end)
            if till < 0:
                return None
            found.append(text[at:till])
            at = till + len(part)
        values = dict(zip(self.names, [*found, text[at:end]], strict=True))
        return values if all(_may_be(name, value) for name, value in values.items()) else None

    def _end_of(self, number: int, text: str, at: int, end: int) -> int:
        """Of a value of a known kind (`7.0 s` has a space, and `backups` may follow its number directly), or of one
        that the next value follows directly."""
        if kind := _kind(self.names[number]):
            found = kind.match(text, at, end)
            return found.end() if found else at
        return at if self.parts[number + 1] else self._end_before(number + 1, text, at, end)

    def _end_before(self, following: int, text: str, at: int, end: int) -> int:
        """Where the value before `following` ends, when nothing is between the two."""
        part = next(filter(None, self.parts[following + 1 : -1]), "")
        limit = max(text.find(part, at, end), at) if part else end
        if kind := _kind(self.names[following]):
            return next((till for till in range(at, limit + 1) if kind.fullmatch(text, till, limit)), at)
        found = _CLAUSE.search(text, at + 1, limit)
        return found.start() if found else limit


def _kind(name: str) -> re.Pattern[str] | None:
    whole = name.rstrip("0123456789")
    return KINDS.get(whole, RATIO if whole.endswith("ratio") else None)


def _may_be(name: str, value: str) -> bool:
    kind = _kind(name)
    return kind is None or bool(kind.fullmatch(value))


class Catalogue:
    """The messages of one language."""

    def __init__(self, messages: Mapping[str, str]) -> None:
        messages = {**_joined(messages), **messages}
        self._whole = {message: text for message, text in messages.items() if not _VALUE.search(message)}
        self._by_word = defaultdict[str, list[Template]](list)
        clauses = {
            f"{{subject}} {message}": f"{{subject}} {text}"
            for message, text in messages.items()
            if _PREDICATE.match(text)
        }
        for message, text in (*messages.items(), *clauses.items()):
            made = Template.of(message, text)
            if made.names and made.is_distinctive:
                self._by_word[made.longest_word].append(made)
        self._known: dict[tuple[str, bool], str] = {}

    def translate(self, text: str, *, words: bool = False) -> str:
        """A text with its values, which are translated likewise; as it is where no message fits. `words`: also one that
        is a single word."""
        found = self._known.get((text, words))  # another thread may clear it
        if found is None:
            if len(self._known) > MOST_REMEMBERED:
                self._known.clear()
            found = self._known[text, words] = self._translated(text, words)
        return found

    def _translated(self, text: str, words: bool) -> str:
        flat = " ".join(text.split())
        is_name = " " not in flat and flat not in ANYWHERE and not words
        if is_name or len(flat) > MOST_CHARACTERS or not re.search("[A-Za-z]", flat):
            return text
        across = list[str]()
        message = self._message(flat, across)
        return message or self._by_parts(flat) or next(iter(across), text)

    def _message(self, text: str, across: list[str]) -> str:
        """The translation of a text that was made of one message; "" where it was not. `across` collects those whose
        values are more than one clause."""
        if text in self._whole:
            return self._whole[text]
        for template, values in self._fits(text):
            if (made := self._filled(template, values)) is not None:
                if not _spans_clauses(template, values):
                    return made
                across.append(made)
        return ""

    def _fits(self, text: str) -> Iterator[tuple[Template, dict[str, str]]]:
        """The messages of which a text may be made, those that explain most of it first; a number is rather one of a
        message that expects a number."""
        candidates = [one for word in {"", *re.findall(r"[A-Za-z]+", text)} for one in self._by_word.get(word, ())]
        for template in sorted(candidates, key=lambda one: (-one.letters, -one.fixed, one.free, one.parts)):
            if (values := template.values(text)) is not None:
                yield template, values

    def _filled(self, template: Template, values: Mapping[str, str]) -> str | None:
        """The translation with its values; None where more of the text would stay English than becomes Japanese."""
        made = {name: self.translate(value) for name, value in values.items()}
        unknown = [value for name, value in values.items() if made[name] == value]
        if not template.parts[0] and unknown[:1] == [values[template.names[0]]] and _NEGATION.match(unknown[0]):
            return None
        if max(map(_words, unknown), default=0) > max(FEW_WORDS, template.words):
            return None
        most = max(template.words, 1)  # `{text}, from {place}` also fits `point in time, from …`
        if most <= FEW_WORDS and any(" " in value and _words(value) >= most for value in unknown):
            return None
        return _VALUE.sub(lambda found: made.get(found[1], found[0]), template.translation)

    def _by_parts(self, text: str) -> str:
        """Joined clauses, each translated; "" where none could be. A list is translated as a whole or not at all."""
        for separator in filter(_outside_brackets(text).__contains__, SEPARATORS):
            parts = _split(text, separator)
            if separator == LIST:
                made = [self.translate(part) for part in parts]
                if any(new == part and " " in part for new, part in zip(made, parts, strict=True)):
                    continue
            else:
                made = list(self._joined(parts, separator))
            if made != parts:
                return _sentences(made) if separator == ". " else separator.join(made)
        if found := _NOTE.fullmatch(text):
            name, note = self.translate(found[1], words=True), self.translate(found[2])
            return f"{name} ({note})" if (name, note) != found.groups() else ""
        return ""

    def _joined(self, parts: Sequence[str], separator: str) -> Iterator[str]:
        """Each part translated. A message may have the separator in it: the most parts that make one are one."""
        at = 0
        while at < len(parts):
            ends = range(min(len(parts), at + MOST_JOINED), at + 1, -1)
            found = ((self._message(separator.join(parts[at:end]), []), end) for end in ends if end - at < len(parts))
            made, at = next((one for one in found if one[0]), (self.translate(parts[at]), at + 1))
            yield made


def _joined(messages: Mapping[str, str]) -> dict[str, str]:
    """The clauses that are appended to others, `, from the copies`, without what joins them."""
    return {message[2:]: text.lstrip("、,;。 ") for message, text in messages.items() if message[:2] in ("; ", LIST)}


def _spans_clauses(template: Template, values: Mapping[str, str]) -> bool:
    """Whether a value is more than one clause: `API error rate: 8 of 20 requests failed` is not made of
    `{failed} of {number} requests failed`, but its second clause is. The value at the end may have a colon."""
    inner = template.names if template.parts[-1] else template.names[:-1]
    if any(": " in values[name] for name in inner):
        return True
    found = values.values()
    return any(end in _outside_brackets(one) for end in SEPARATORS[:3] for one in found) or any(
        one.endswith((":", ";")) or one.count("(") != one.count(")") for one in found
    )


def _outside_brackets(text: str) -> str:
    """The text with what is in brackets masked: a note has clauses of its own. As it is where brackets do not match."""
    found, depth = list[str](), 0
    for letter in text:
        depth -= letter == ")"
        found.append("_" if depth > 0 else letter)
        depth += letter == "("
    return text if depth else "".join(found)


def _split(text: str, separator: str) -> list[str]:
    """At each separator that is not in brackets."""
    ends, at = _outside_brackets(text).split(separator), 0
    parts = list[str]()
    for end in ends:
        parts.append(text[at : at + len(end)])
        at += len(end) + len(separator)
    return parts


def _words(text: str) -> int:
    return len(re.findall(r"(?<!\S)(?!(?:ms|min)\b)[a-z]{2,}(?!\S)", text))


def _sentences(parts: Sequence[str]) -> str:
    """Japanese sentences end with their own full stop."""
    ends = ["。" if re.search(r"[ぁ-んァ-ヶ一-龥」]$", part) else ". " for part in parts]
    return "".join(part + end for part, end in zip(parts[:-1], ends, strict=False)) + parts[-1]
