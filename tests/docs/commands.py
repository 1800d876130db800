"""What the documentation tells a reader to type: the blocks and the inline code of Markdown files."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "README.ja.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MADE = {"catalogue.md", "coverage.md"}
"""Made from docstrings: they quote the manual's own commands, which are not for typing here."""
SHELL = {"sh", "bash", "shell", "console"}
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL
)
_INDENTED = re.compile(r"(?:^(?: {4}|\t).*\n|^[ \t]*\n(?= {4}))+", re.MULTILINE)
_INLINE = re.compile(r"`((?:make|python|prefect|pip|pytest|mkdocs|uv) [^`]*|[A-Z][A-Z0-9_]+=[^`]+)`")
_ASSIGNED = re.compile(r"[A-Z_][A-Z0-9_]*=.*")
_PLACEHOLDERS = {"NAME": "production", "…": "something", "...": "something"}


@dataclass(frozen=True)
class Block:
    """A block of code of one page."""

    page: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_toml(self) -> bool:
        try:
            return bool(tomllib.loads(self.text))
        except tomllib.TOMLDecodeError:
            return False


@dataclass(frozen=True)
class Command:
    """A line that a reader types: variables before it, and its words."""

    where: str
    text: str
    variables: tuple[tuple[str, str], ...]
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        return self.words[0] if self.words else ""


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a page, and its indented ones."""
    content = path.read_text(encoding="utf-8")
    page, plain = str(path.relative_to(ROOT)), content
    for found in _FENCE.finditer(content):
        yield Block(page, _line(content, found.start()), found["language"], dedent(found["text"]).strip())
        plain = plain.replace(found.group(), "\n" * found.group().count("\n"), 1)
    for found in _INDENTED.finditer(plain):
        before = plain[: found.start()]
        above = (before.splitlines() or [""])[-1]
        apart = found.group().startswith("\n") or not above.strip() or above.startswith("#")
        if not apart or not found.group().strip():
            continue  # a paragraph or an item that goes on
        text = found.group().expandtabs(4)
        begins = found.start() + len(text) - len(text.lstrip("\n"))
        yield Block(page, _line(plain, begins), "", dedent(text).strip())


def inline(path: Path) -> Iterator[Command]:
    """Commands in the middle of a sentence."""
    content = path.read_text(encoding="utf-8")
    for found in _INLINE.finditer(content):
        yield command(f"{path.relative_to(ROOT)}:{_line(content, found.start())}", found[1])


def commands(block: Block) -> Iterator[Command]:
    """The lines of a shell's block."""
    for number, line in enumerate(block.text.replace("\\\n", " ").splitlines(), block.line):
        if text := line.strip().removeprefix("$ "):
            yield from filter(lambda one: one.words or one.variables, [command(f"{block.page}:{number}", text)])


def command(where: str, text: str) -> Command:
    words = [_PLACEHOLDERS.get(word, word) for word in shlex.split(text, comments=True)]
    variables = []
    while words and _ASSIGNED.fullmatch(words[0]):
        name, _, value = words.pop(0).partition("=")
        variables.append((name, value))
    return Command(where, text, tuple(variables), tuple(words))


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
