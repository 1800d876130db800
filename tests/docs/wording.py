"""Words of the writing guide that this project's texts do not use, and the check of `make lint`.

Checked: the pages, and the texts of the code. Of code those are string literals and the docstrings of flows, which the
Prefect UI shows; other docstrings and comments are for developers.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.docs.commands import MADE, PAGES, ROOT

CODE = ("flows", "tasks", "blocks", "runbook", "deployments")

# A word → a better one. Few false alarms matter more than a complete list.
WORDS = {
    r"told": "reported, shown, printed, informed",
    r"tells": "reports, shows, prints, warns",
    r"of (its|their|our|one's) own": "separate, dedicated, its own … (before the noun)",
    r"(is|are|was|were) (not )?well|well again|not well": "healthy, unhealthy, recovered",
    r"(ends?|ended|go(es)?|went) well": "succeeds",
    r"put right": "fixed",
    r"who(m)?ever": "name the person",
    r"whatever (is|was|has|goes|runs|stands|differs|it)": "name the thing",
    r"(the|no|enough|its) room": "free disk space",
    r"(comes?|came|coming|brings?|brought|bringing) back": "restored",
    r"speaks? (TLS|its|the|no)": "uses",
    r"(the|a) second (store|place)|the other (store|place)": "the replica store",
    r"look(s|ed|ing)? (at|into|after)": "check, inspect, monitor",
    r"taken? away|takes away": "deleted",
    r"gone": "missing, deleted, lost",
    r"stands? (in (?!for)|under|there|by)": "is listed, is set",
    r"beside": "alongside, next to; staged copy",
    r"(kept|set|left|stays?|lies) aside": "kept",
    r"account of writes": "write ledger",
    r"in the place of": "instead of",
    r"otherwise than": "another … than",
    r"as such": "(leave it out)",
    r"mend(s|ed|ing)?": "fix",
}
_WORDS = re.compile(r"\b(?:" + "|".join(f"(?:{word})" for word in WORDS) + r")\b", re.IGNORECASE)
_CODE = re.compile(
    r"^(?P<indent> *)```.*?^(?P=indent)```|^(?: {4,}|\t)(?![-*\d]).*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Found:
    """A word in a text, and its place."""

    path: Path
    line: int
    word: str

    @property
    def better(self) -> str:
        return next(better for word, better in WORDS.items() if re.match(word, self.word, re.IGNORECASE))

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: “{self.word}”: write {self.better}"


def in_text(text: str) -> Iterator[tuple[int, str]]:
    """The words in a text, each with the number of line breaks before it."""
    for found in _WORDS.finditer(re.sub(r"\s", " ", text)):
        yield text.count("\n", 0, found.start()), found.group()


def in_page(path: Path) -> Iterator[Found]:
    """Of a Markdown page, without its code."""
    content = _CODE.sub(lambda found: re.sub(r"[^\n]", "_", found.group()), path.read_text(encoding="utf-8"))
    for line, word in in_text(content):
        yield Found(path, line + 1, word)


def in_module(path: Path) -> Iterator[Found]:
    """Of a Python module: its string literals, and the docstrings of its flows."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    shown = {node.body[0] for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and _is_flow(node)}
    hidden = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and node not in shown}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in hidden:
            for line, word in in_text(node.value):
                yield Found(path, node.lineno + line, word)


def _is_flow(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(one).partition("(")[0] == "flow" for one in node.decorator_list)


def pages() -> list[Path]:
    """The pages that people write, and the changelog."""
    return [*(path for path in PAGES if path.name not in MADE), ROOT / "CHANGELOG.md"]


def in_folder(folder: str) -> list[Found]:
    """Of a folder of code."""
    return [found for path in sorted((ROOT / folder).rglob("*.py")) for found in in_module(path)]


def main() -> int:
    """Print each such word with its place; exit code 1 if there is one."""
    wrong = [found for path in pages() for found in in_page(path)]
    wrong += [found for folder in CODE for found in in_folder(folder)]
    for found in wrong:
        print(found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
