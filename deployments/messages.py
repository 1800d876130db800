"""Catalogues of translations (gettext's .po files), from the sources: `make messages`.

A message is a text as the source has it, with the names of an f-string's values in braces: `{database} goes back to
{time}`. Translators edit runbook/language/<language>/<folder>.po with any editor of .po files, Poedit for example.
Messages that changed keep their translation as a suggestion (fuzzy), which is not shown; deleted messages are removed.

forms.po has what the Prefect UI shows of the flows: the paragraphs of their descriptions, and the help of their fields.
checklists.po is made of flows/routine/checklists/*.toml, which have both languages: edit those.
"""

from __future__ import annotations

import ast
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po

from deployments import forms
from deployments.generated import ROOT, with_table, write_or_check
from flows.routine.checklist import texts
from runbook.drivers import exit_code
from runbook.language.catalogue import ANYWHERE

LANGUAGE = "ja"
PAGE = ROOT / "docs" / "languages.md"
OWN = ROOT / "runbook" / "language"
"""Its patterns are no texts."""
MADE = "<!-- Made by `make messages`: edit runbook/language. -->"
VERBS = frozenset(
    [
        "require",
        "prefer",
        "passed",
        "warn",
        "fail",
        "fact",
        "table",
        "plan",
        "state_is",
        "Change",
        "PlannedStep",
        "Check",
        "State",
        "Evidence",
        "Finding",
        "Requirement",
        "say",
        "label",
    ]
)
"""Calls whose texts are messages even if they are one word."""
UNSEEN = frozenset(["debug", "info", "warning", "error", "execute", "run", "getattr", "add_argument"])
"""Calls whose texts are no part of a report: the log stays English."""
_CODE = re.compile(
    r"^(SELECT|WITH|ALTER|CREATE|DROP|INSERT|UPDATE|DELETE|SET|SHOW|FROM|WHERE|AND|LOCK|COPY)\b|^[-/<.#]|\n"
)


def messages(path: Path) -> Iterator[str]:
    """Each text of a module that a report may show."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = set(_unseen(tree))
    short = set(_arguments_of_verbs(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from _counted(node)
        if not isinstance(node, ast.Constant | ast.JoinedStr) or id(node) in unseen:
            continue
        text = " ".join(template(node).split())
        is_seen = _is_phrase(text) or id(node) in short or text in ANYWHERE
        if is_seen and re.search("[a-z]{3}", _literal(text)) and not _CODE.search(text):
            yield text


def template(node: ast.Constant | ast.JoinedStr) -> str:
    """A text with its values named in braces; "" for what is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    found: list[str] = []
    seen: dict[str, int] = {}
    for part in node.values:
        if isinstance(part, ast.Constant):
            found.append(str(part.value))
        elif isinstance(part, ast.FormattedValue):
            name = _name(part.value)
            seen[name] = seen.get(name, 0) + 1
            found.append(f"{{{name}{seen[name] if seen[name] > 1 else ''}}}")
    return "".join(found)


def _name(value: ast.expr) -> str:
    match value:
        case ast.Name():
            return value.id.strip("_")
        case ast.Attribute():
            return value.attr.strip("_")
        case ast.Call() if isinstance(value.func, ast.Name | ast.Attribute):
            return _name(value.func)
        case _:  # `len(names) - most` is a number
            called = {_name(one.func) for one in ast.walk(value) if isinstance(one, ast.Call)}
            return next((name for name in ("len", "sum") if name in called), "value")


def _is_phrase(text: str) -> bool:
    """Two words, or one with a value."""
    words = re.findall("[a-z]{2,}", _literal(text))
    return " " in text and (len(words) > 1 or ("{" in text and any(len(one) > 3 for one in words)))


def _literal(text: str) -> str:
    return re.sub(r"\{\w+\}", "", text)


def _unseen(tree: ast.AST) -> Iterator[int]:
    """Docstrings, the parts of an f-string, what is logged, and what compares or subscripts."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant()):
                yield id(node.value)
            case ast.JoinedStr():
                yield from (id(part) for part in node.values)
                formats = [part.format_spec for part in node.values if isinstance(part, ast.FormattedValue)]
                yield from (id(inner) for one in formats if one for inner in ast.walk(one))
            case ast.Call() if _called(node) in UNSEEN:
                yield from (id(one) for argument in node.args for one in ast.walk(argument))
            case ast.Compare() | ast.Subscript():
                yield from (id(one) for one in ast.iter_child_nodes(node))


def _arguments_of_verbs(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node) in VERBS:
            texts = [*node.args, *(one.value for one in node.keywords if one.arg in ("value", "expected"))]
            lists = [inner for one in texts if isinstance(one, ast.Tuple | ast.List) for inner in one.elts]
            yield from (id(one) for one in (*texts, *lists))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):  # columns = ("phase", "box")
            yield from map(id, node.value.elts if "columns" in ast.unparse(node.targets[0]).lower() else ())


def _counted(node: ast.Call) -> Iterator[str]:
    """`{number} backup` and `{number} backups` of `counted(number, "backup")`."""
    nouns = [one.value for one in node.args[1:] if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    if _called(node) == "counted" and nouns:
        yield from (f"{{number}} {noun}" for noun in (*nouns, f"{nouns[0]}s")[:2] if len(noun) > 2)


def _called(node: ast.Call) -> str:
    match node.func:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return ""


def catalogue(folder: str, language: str, known: set[str]) -> Catalog:
    """The messages of a folder that no other one has (`known`), with the translations that there are."""
    found = Catalog(locale=language)
    sources = (one for one in (ROOT / folder).rglob("*.py") if OWN not in one.parents)
    for source in sorted(sources):
        for text in messages(source):
            if text not in known:
                found.add(text, locations=[(str(source.relative_to(ROOT)), 0)])
    known.update(str(one.id) for one in found if one.id)
    return _updated(po_path(folder, language), found, language)


def forms_catalogue(language: str) -> Catalog:
    """What the Prefect UI shows of every flow, except for its title. A message names the first flow that has it."""
    found = Catalog(locale=language)
    for source in sorted((ROOT / "flows").rglob("*.py")):
        for docstring in _docstrings_of_flows(source):
            for text in (*forms.pieces(forms.description(docstring)), *forms.helps(docstring).values()):
                found.add(text, locations=[] if text in found else [(str(source.relative_to(ROOT)), 0)])
    return _updated(po_path(forms.CATALOGUE, language), found, language)


def checklists_catalogue(language: str) -> Catalog:
    """The texts of the checklists, with the translations that their files have."""
    found = Catalog(locale=language, fuzzy=False)
    for name in texts.NAMES:
        chosen = texts.checklist(name)
        pairs = [(chosen.en, chosen.ja)]
        for phase in chosen.phases:
            pairs += [(phase.en, phase.ja), (phase.heading, phase.heading_ja)]
            pairs += [(phase.short, phase.ja.partition(": ")[2])] if phase.minutes else []
            for box in phase.boxes:
                finding = (f"{phase.en}: {box.en}", f"{phase.ja}: {box.ja}")
                pairs += [(box.en, box.ja), (box.how, box.how_ja), finding]
        for english, translation in pairs:
            found.add(english, translation)
    return found


def _docstrings_of_flows(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            named = (one.func if isinstance(one, ast.Call) else one for one in node.decorator_list)
            if any(isinstance(one, ast.Name) and one.id == "flow" for one in named):
                yield ast.get_docstring(node) or ""


def _updated(path: Path, found: Catalog, language: str) -> Catalog:
    """The messages found, with the translations that the file has."""
    made = Catalog(locale=language, fuzzy=False)
    if path.exists():
        with path.open("rb") as file:
            made = read_po(file, locale=language)
    made.update(found, no_fuzzy_matching=False)
    made.obsolete.clear()
    return made


def folders() -> list[str]:
    """One catalogue each: `runbook`, `flows/recovery`, and `flows` for the modules that lie in no folder of it."""
    inner = [one for layer in ("flows", "tasks") for one in sorted((ROOT / layer).iterdir()) if any(one.rglob("*.py"))]
    return ["runbook", "blocks", *(str(one.relative_to(ROOT)) for one in inner if one.is_dir()), "flows", "tasks"]


def po_path(folder: str, language: str) -> Path:
    """`runbook/language/ja/flows-recovery.po`."""
    return OWN / language / f"{folder.replace('/', '-')}.po"


def written(made: Catalog) -> str:
    """The text of a .po file, without dates: the same messages make the same file."""
    file = io.BytesIO()
    write_po(file, made, width=120, omit_header=True, include_lineno=False, ignore_obsolete=True)
    head = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=utf-8\\n"\n\n'
    return head + file.getvalue().decode()


def catalogues() -> dict[str, Catalog]:
    """Every catalogue, by its name."""
    known = set[str]()
    made = {folder: catalogue(folder, LANGUAGE, known) for folder in folders()}
    return made | {forms.CATALOGUE: forms_catalogue(LANGUAGE), "checklists": checklists_catalogue(LANGUAGE)}


def files() -> dict[Path, str]:
    """Each catalogue, and the page that states how much is translated."""
    made, shares = dict[Path, str](), list[str]()
    for folder, found in catalogues().items():
        made[po_path(folder, LANGUAGE)] = written(found)
        messages = [one for one in found if one.id]
        if messages:
            translated = sum(bool(one.string) and not one.fuzzy for one in messages)
            shares.append(f"| {folder} | {len(messages):,} | {translated / len(messages):.0%} |")
    table = "\n".join(["| catalogue | messages | translated |", "|---|---|---|", *shares])
    return {**made, PAGE: with_table(PAGE, MADE, table)}


def main() -> int:
    """The command line: 0 when the catalogues are current."""
    return write_or_check(files, __doc__ or "", "make messages")


if __name__ == "__main__":
    sys.exit(exit_code(main))
