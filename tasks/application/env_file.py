"""Read and change one variable of the application's env file (`backend/.env`). Writes are atomic. The rest of the file
is neither changed nor shown: it contains passwords."""

from __future__ import annotations

import re
from pathlib import Path

from dotenv import dotenv_values

from blocks.places import Application
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.files import durable
from runbook.guard.permit import Act
from runbook.kinds import action, probe

SET = "set"


def find_line(application: Application, variable: str, key: str) -> tuple[str, re.Match[str]]:
    """The file's text, and the last line of the variable with its value as group 1; `key`: the TOML key of its name.

    Raises:
        OpsError: the file cannot be read, or has no such line.
    """
    path = Path(application.env_file)
    if not application.env_file:
        raise OpsError("[application] names no env_file", f"add the file that has the application's {variable}")
    try:
        text = path.read_bytes().decode()  # keep its line ends
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OpsError(f"{path} cannot be read: {why}", "correct [application] env_file") from None
    lines = list(re.finditer(rf"^[ \t]*(?:export[ \t]+)?{re.escape(variable)}[ \t]*=[ \t]*(.*)$", text, re.MULTILINE))
    if not lines:
        raise OpsError(f"{path} has no line {variable}=…", f"correct [application] env_file or {key}")
    return text, lines[-1]


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically and durably; mode and owner are kept.

    Raises:
        OpsError: it cannot be written; the old content is kept.
    """
    path = path.resolve()  # write the target of a link, which others read too
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
    """All variables of the file, for a child process and for masking; none if no file is configured.

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
        raise OpsError(f"{path} cannot be read: {why}", "correct [application] env_file, or its permissions") from None
    return {name: value for name, value in found.items() if value is not None}


@probe
def read_variable(application: Application, variable: str, key: str) -> str:
    """The variable's value, without quotes and trailing comment.

    Raises:
        OpsError: the file cannot be read, or has no such line.
    """
    return _value(find_line(application, variable, key)[1])[0]


@action(of=lambda application, variable: Act(SET, f"{variable} in {application.env_file}"), idempotent=True)
def set_variable(application: Application, variable: str, key: str, value: str) -> str:
    """Set another value, in the same quotes; returns the old one.

    Raises:
        OpsError: the file cannot be read or written, or has no such line.
    """
    text, line = find_line(application, variable, key)
    before, (start, end) = _value(line)
    if before != value:
        write_text(Path(application.env_file), text[:start] + value + text[end:])
    return before


def _value(line: re.Match[str]) -> tuple[str, tuple[int, int]]:
    """The value, and its position in the text."""
    inner = re.match(r"\"([^\"]*)\"|'([^']*)'|((?:(?!\s+#)[^\n\r])*?)(?=\s+#|\s*$)", line[1])
    assert inner  # its last alternative matches any text
    group = next(number for number in (1, 2, 3) if inner[number] is not None)
    start = line.start(1)
    return inner[group], (start + inner.start(group), start + inner.end(group))
