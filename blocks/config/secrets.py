"""Secrets of an environment: variables of the shell, or of a file NAME.env with mode 0600 beside its TOML."""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path

from prefect.blocks.core import Block
from pydantic import Secret, SecretStr

from runbook.errors import OpsError

VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
IN_TEXT = re.compile(r"\$\{(\w+)\}")
PASSWORD_IN_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@", re.IGNORECASE)
OTHERS = stat.S_IRWXG | stat.S_IRWXO
_LINE = re.compile(rf"(?:export\s+)?({VARIABLE.pattern})=(.*)")


def file_of(toml: Path) -> Path:
    """`blue.env` beside `blue.toml`."""
    return toml.with_suffix(".env")


def variables_of(toml: Path) -> Mapping[str, str]:
    """The variables that a TOML can name: the shell's first, then those of the file of secrets, where there is one.

    Raises:
        OpsError: others can read that file, or a line in it is no assignment.
    """
    return ChainMap(dict(os.environ), read_file(file_of(toml)))


def read_file(path: Path) -> dict[str, str]:
    """`NAME=value` lines, quoted as for a shell. `NAME=` without a value is not filled in yet, and left out; `NAME=''`
    is an empty value.

    Raises:
        OpsError: others can read the file, or a line in it is no assignment.
    """
    if not path.exists():
        return {}
    if path.stat().st_mode & OTHERS:
        mode = stat.S_IMODE(path.stat().st_mode)
        raise OpsError(f"{path.name} has the mode {mode:04o}: others can read the secrets in it", f"chmod 600 {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise OpsError(f"{path.name} cannot be read: {type(error).__name__}", "correct the file") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        assigned = _LINE.fullmatch(line.strip())
        try:
            words = shlex.split(assigned[2], comments=False) if assigned else []
        except ValueError:
            assigned = None
        if assigned is None or len(words) > 1:
            raise OpsError(f"{path.name}: line {number} is no assignment", "expected: NAME='value'")
        if words:
            found[assigned[1]] = words[0]
    return found


def missing(
    content: object, variables: Mapping[str, str], key: str = "", *, secret: bool = False
) -> Iterator[tuple[str, str]]:
    """Each variable that is named and not set, and the key that names it. `secret`: a text is the variable's name."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            inner = secret or str(name).endswith("_env")
            yield from missing(value, variables, f"{key}.{name}" if key else str(name), secret=inner)
    elif isinstance(content, list):
        for value in content:
            yield from missing(value, variables, key, secret=secret)
    elif isinstance(content, str):
        named = [content] if secret and VARIABLE.fullmatch(content) else IN_TEXT.findall(content)
        yield from ((variable, key) for variable in named if variable not in variables)


def is_secret(kind: type[Block], field: str) -> bool:
    """Whether a block's field holds a secret."""
    annotation = kind.model_fields[field].annotation if field in kind.model_fields else None
    return isinstance(annotation, type) and issubclass(annotation, (SecretStr, Secret))
