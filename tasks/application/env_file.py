"""One variable of the file that the application reads at its start (`backend/.env`): read, and written whole or not at
all. Nothing else of the file is changed, or told: it has passwords."""

from __future__ import annotations

import re
from pathlib import Path

from dotenv import dotenv_values

from blocks.places import Application
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.files import durable
from runbook.guard.permit import Permit
from runbook.kinds import action, probe

SET = "set"


def find_line(application: Application, variable: str, key: str) -> tuple[str, re.Match[str]]:
    """The file's text, and the line that counts, with its value as group 1; `key` is what names the variable.

    Raises:
        OpsError: the file cannot be read, or has no such line.
    """
    path = Path(application.env_file)
    if not application.env_file:
        raise OpsError("[application] names no env_file", f"add the file in which the application reads {variable}")
    try:
        text = path.read_bytes().decode()  # its line ends stay as they are
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OpsError(f"{path} cannot be read: {why}", "correct [application] env_file") from None
    lines = list(re.finditer(rf"^[ \t]*(?:export[ \t]+)?{re.escape(variable)}[ \t]*=[ \t]*(.*)$", text, re.MULTILINE))
    if not lines:
        raise OpsError(f"{path} has no line {variable}=…", f"correct [application] env_file or {key}")
    return text, lines[-1]


def write_text(path: Path, text: str) -> None:
    """Beside it, on disk, then renamed over it; mode and owner stay.

    Raises:
        OpsError: it cannot be written. What was there still is.
    """
    path = path.resolve()  # a link leads on to the one file that others read too
    try:
        with durable.replacing(path) as file:
            file.write(text.encode())
            failpoint("env file: before rename")
    except OSError as error:
        raise OpsError(
            f"{path} cannot be written: {error.strerror}", "let this user write it and its directory"
        ) from None


@probe
def read_variables(application: Application) -> dict[str, str]:
    """All that it sets, for a child's environment and for hiding them; nothing where no file is named.

    Raises:
        OpsError: the file cannot be read.
    """
    path = Path(application.env_file)
    if not application.env_file:
        return {}
    try:
        with path.open(encoding="utf-8") as file:
            found = dotenv_values(stream=file, interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OpsError(f"{path} cannot be read: {why}", "correct [application] env_file, or its rights") from None
    return {name: value for name, value in found.items() if value is not None}


@probe
def read_variable(application: Application, variable: str, key: str) -> str:
    """Its value, without quotes and a comment behind it.

    Raises:
        OpsError: the file cannot be read, or has no such line.
    """
    return _value(find_line(application, variable, key)[1])[0]


@action(idempotent=True)
def set_variable(permit: Permit, application: Application, variable: str, value: str, key: str) -> str:
    """Give it another value, in the same quotes; returns the one before.

    Raises:
        OpsError: the file cannot be read or written, or has no such line.
    """
    permit.require(SET, f"{variable} in {application.env_file}")
    text, line = find_line(application, variable, key)
    before, (start, end) = _value(line)
    if before != value:
        write_text(Path(application.env_file), text[:start] + value + text[end:])
    return before


def _value(line: re.Match[str]) -> tuple[str, tuple[int, int]]:
    """And where in the text that stands."""
    inner = re.match(r"\"([^\"]*)\"|'([^']*)'|((?:(?!\s+#)[^\n\r])*?)(?=\s+#|\s*$)", line[1])
    assert inner  # its last alternative takes anything, nothing too
    group = next(number for number in (1, 2, 3) if inner[number] is not None)
    start = line.start(1)
    return inner[group], (start + inner.start(group), start + inner.end(group))
