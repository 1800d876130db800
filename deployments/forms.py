"""What the Prefect UI shows of a flow, in an environment's language: its title, its description, its fields' help.

All are in the flow's docstring, in English except for the manual's title. runbook/language/ja/forms.po has the
translations. Its messages are the description's paragraphs and list items, and the fields' help.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from runbook.language.catalogue import read
from runbook.language.say import Language

CATALOGUE = "forms"
HELP = "\nArgs:\n"
SECTION = re.compile(r"§\d+(?:\.\d+)?|付録[ABC]")
_PIECE = re.compile(r"^(- |\d+\. )?(\S.*?)(?=\n\s*\n|\n- |\n\d+\. |\Z)", re.DOTALL | re.MULTILINE)
_FIELD = re.compile(r"^ {4}(\w+): +((?:\S.*)(?:\n {8,}\S.*)*)", re.MULTILINE)
_NAMES = {
    **{name: name.upper() for name in ("ai", "api", "rto", "rpo", "wal", "dr")},
    **{"postgres": "PostgreSQL", "redis": "Redis", "prefect": "Prefect", "docker": "Docker"},
}


def title(docstring: str) -> str:
    """The manual's title: the first line."""
    return docstring.partition("\n")[0].strip()


def description(docstring: str) -> str:
    """What lies between the title and the help."""
    return docstring.partition(HELP)[0].partition("\n")[2].strip()


def helps(docstring: str) -> dict[str, str]:
    """Parameter → its help, on one line."""
    return {name: flat(text) for name, text in _FIELD.findall(docstring.partition(HELP)[2])}


def pieces(text: str) -> Iterator[str]:
    """The paragraphs and list items of a description, each on one line: what a translator sees."""
    return (flat(found[2]) for found in _PIECE.finditer(text))


def flat(text: str) -> str:
    """On one line."""
    return " ".join(text.split())


def translated(text: str, language: Language) -> str:
    """A help, or a description piece by piece; what nobody translated stays English."""
    known = _translations(language)
    if not known:
        return text
    return _PIECE.sub(lambda found: (found[1] or "") + known.get(flat(found[2]), found[2]), text)


@functools.cache
def _translations(language: Language) -> Mapping[str, str]:
    return {} if language == "en" else read(language)


def shown(docstring: str, function: str, language: Language) -> str:
    """Title and description, as Markdown. Help is next to the form's fields: `Args:` would be one paragraph."""
    first = title(docstring) if language == "ja" else english_title(docstring, function)
    return f"{first}\n\n{translated(description(docstring), language)}"


def english_title(docstring: str, function: str) -> str:
    """`Full restore (§8.2)` of the function full_restore; the manual's own titles are Japanese."""
    words = " ".join(_NAMES.get(word, word) for word in function.split("_"))
    sections = [section.replace("付録", "appendix ") for section in SECTION.findall(title(docstring))]
    return f"{words[0].upper()}{words[1:]} ({', '.join(sections)})"


def schema_in(schema: Mapping[str, Any], language: Language) -> dict[str, Any]:
    """The schema of a flow's parameters with its help in a language, each on one line."""
    fields = {
        name: {**one, "description": translated(flat(one["description"]), language)} if "description" in one else one
        for name, one in schema.get("properties", {}).items()
    }
    return {**schema, "properties": fields}
