"""What a run notes down before it changes something, so that one after it can put it back: a dataclass as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from runbook.errors import OpsError
from runbook.files import durable

T = TypeVar("T")


def write(path: Path, content: object) -> None:
    """Write a dataclass; its directory is made where it is not there.

    Raises:
        OpsError: it cannot be written. Nothing may be changed then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write(path, TypeAdapter(type(content)).dump_json(content, indent=1).decode(), mode=durable.PRIVATE)
    except OSError as error:
        raise OpsError(
            f"{path} cannot be written: {error.strerror}", "free disk space there, or correct its owner"
        ) from None


def read(path: Path, shape: type[T], hint: str) -> T | None:
    """A record of that shape, or None where there is none; `hint` says what to do with one that is damaged.

    Raises:
        OpsError: it cannot be read.
    """
    try:
        return TypeAdapter(shape).validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise OpsError(f"{path} cannot be read: {type(error).__name__}", hint) from None
