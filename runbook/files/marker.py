"""What a run has begun and not completed: a file on this host, until a run completes it or undoes it."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Self

from pydantic import TypeAdapter

from runbook.errors import OpsError
from runbook.files import durable, record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


@dataclass(frozen=True, kw_only=True)
class UnfinishedRun:
    """When an unfinished run began, and which process it was. A subclass adds what the next run needs to continue the
    change or to undo it."""

    started: str = field(default_factory=_now)
    run: str = field(default_factory=_this_process)

    @classmethod
    def parse(cls, content: bytes | str) -> Self:
        """Also content of earlier versions: `since` was `started`, `process` was `run`, and unknown keys are ignored.

        Raises:
            ValueError: it is damaged.
        """
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("not an object")
        earlier = {"started": found.get("since", "unknown"), "run": f"process {found.get('process', 'unknown')}"}
        return TypeAdapter(cls).validate_python({**earlier, **found})

    def dump(self) -> str:
        """What `parse` reads."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class Marker(UnfinishedRun):
    """An unfinished run, noted in a file. A subclass sets the file's name, and `HINT`: the next step where it is
    damaged."""

    FILE: ClassVar[str]
    HINT: ClassVar[str]

    @classmethod
    def find(cls, directory: Path) -> Self | None:
        """The marker of an unfinished run; None without one.

        Raises:
            OpsError: the file is damaged or cannot be read. A change must not begin then: it might reverse a half-done
                one.
        """
        path = directory / cls.FILE
        try:
            return cls.parse(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OpsError(f"{path} cannot be read: {type(error).__name__}", cls.HINT) from None

    def write(self, directory: Path) -> None:
        """Return when the file and its name are on disk. Call it before the change.

        Raises:
            OpsError: it cannot be written. Nothing may be changed then.
        """
        record.write(directory / self.FILE, self)

    @classmethod
    def remove(cls, directory: Path) -> None:
        """The change is complete, or undone. After a power cut the file is not there again.

        Raises:
            OpsError: it cannot be removed.
        """
        path = directory / cls.FILE
        try:
            path.unlink(missing_ok=True)
            if directory.exists():
                durable.sync(directory)
        except OSError as error:
            raise OpsError(f"{path} cannot be removed: {error.strerror}", "remove it by hand") from None
