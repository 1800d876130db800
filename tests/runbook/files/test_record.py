"""Records of what a run changes, for the run after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from runbook.errors import OpsError
from runbook.files import record


@dataclass(frozen=True)
class Taken:
    """As a runbook's own: texts, numbers, tuples of others."""

    name: str
    parts: tuple[Taken, ...] = ()
    settings: dict[str, int] = field(default_factory=dict)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "new" / "record.json"
    assert record.read(path, Taken, "") is None
    told = Taken("面接", (Taken("a"), Taken("b", settings={"x": 1})))
    record.write(path, told)
    assert record.read(path, Taken, "") == told
    assert "面接" in path.read_text(encoding="utf-8"), "readable for people"


@pytest.mark.parametrize("content", [b"", b'{"name": "a", "par', b"[]", b"{}", b'{"name": "\xff"}'])
def test_a_damaged_one_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(OpsError, match=rf"^{path} cannot be read: \w+ — look at it$"):
        record.read(path, Taken, "look at it")


def test_one_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "reports").write_text("a file")
    with pytest.raises(
        OpsError, match="record.json cannot be written: .* — free disk space there, or correct its owner"
    ):
        record.write(tmp_path / "reports" / "record.json", Taken("a"))
