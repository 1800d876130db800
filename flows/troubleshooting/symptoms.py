"""Symptom → runbook: the table of start-here, and the deployments that Prefect's search finds by a symptom."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from runbook.language.say import Language
from runbook.next import Next
from runbook.page.markdown import escaped

TABLE = Path(__file__).with_suffix(".toml")
FREQUENT, FIRST_PAGE = 1, 10
"""The place of frequent symptoms, after start-here; and the rows of a page of Prefect's list (3.9.1)."""
START_EN, START_JA = "Start here", "ここから始める"


@dataclass(frozen=True)
class SymptomRow:
    """What somebody sees, in both languages. The first runbook's form opens for it; the others help next."""

    place: int
    """The number at the beginning of its name: the list sorts by it."""
    en: str
    ja: str
    runbooks: tuple[Next, ...]

    @property
    def first(self) -> Next:
        """The runbook to launch."""
        return self.runbooks[0]

    def name_in(self, environment: str, language: Language) -> str:
        """The name of its deployment: frequent symptoms come first in the UI's list, then group by group."""
        return _name(self.place, self.en, self.ja, environment, language)

    def text(self, language: Language) -> str:
        """In one language."""
        return self.ja if language == "ja" else self.en


@dataclass(frozen=True)
class SymptomGroup:
    """What belongs together."""

    number: int
    en: str
    ja: str
    symptoms: tuple[SymptomRow, ...]

    def text(self, language: Language) -> str:
        """In one language."""
        return self.ja if language == "ja" else self.en


def start_name_in(environment: str, language: Language) -> str:
    """The name by which start-here is first in the UI's list."""
    return _name(0, START_EN, START_JA, environment, language)


def _name(number: int, en: str, ja: str, environment: str, language: Language) -> str:
    """In both languages, since the UI's search finds names only; the operators' own first."""
    words = f"{ja} {en}" if language == "ja" else f"{en} {ja}"
    return f"{number} {words} ({environment})"


def read_groups(path: Path = TABLE) -> list[SymptomGroup]:
    """The table of a file, in its order."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    return [
        SymptomGroup(
            group["number"],
            group["en"],
            group["ja"],
            tuple(_symptom(group["number"], one) for one in group["symptom"]),
        )
        for group in content["group"]
    ]


def read_symptoms(path: Path = TABLE) -> list[SymptomRow]:
    """All symptoms, in the table's order."""
    return [symptom for group in read_groups(path) for symptom in group.symptoms]


def _symptom(group: int, given: Mapping[str, object]) -> SymptomRow:
    runbooks = given["runbooks"]
    assert isinstance(runbooks, list)
    following = tuple(Next(one["flow"], parameters=one.get("parameters", {})) for one in runbooks)
    return SymptomRow(FREQUENT if given.get("frequent") else group, str(given["en"]), str(given["ja"]), following)


def table(link: Callable[[Next], str], language: Language) -> str:
    """The table as Markdown. `link` makes the link to a runbook's form; "" where the environment does not have it: a
    symptom that is left without a runbook is left out."""
    return "\n\n".join(part for group in read_groups() if (part := _part(group, link, language)))


def _part(group: SymptomGroup, link: Callable[[Next], str], language: Language) -> str:
    rows = list(_rows(group, link, language))
    columns = "| 症状 | 開く |" if language == "ja" else "| symptom | open |"
    return "\n".join([f"### {escaped(group.text(language))}", "", columns, "|---|---|", *rows]) if rows else ""


def _rows(group: SymptomGroup, link: Callable[[Next], str], language: Language) -> Iterator[str]:
    more_text = "次に" if language == "ja" else "then"
    for one in group.symptoms:
        first, *more = [link(each) for each in one.runbooks]
        if first:
            then = ", ".join(filter(None, more))
            yield f"| {escaped(one.text(language))} | **{first}**{f'<br>{more_text} {then}' if then else ''} |"
