"""Copies that drills spoil: of a directory in which others write."""

from __future__ import annotations

from pathlib import Path

import pytest

from runbook.errors import OpsError
from tasks.drill import sabotage
from tasks.drill.sabotage import copy_of


def test_what_is_replaced_while_it_is_copied_is_copied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archiver puts a longer piece of the segment in the place of the shorter one, after that was listed."""
    archive, link = tmp_path / "wal", sabotage._link
    archive.mkdir()
    for name in ("1.gz", "2.partial.10.gz", "3.gz"):
        (archive / name).write_text(name)

    def meanwhile(source: str, target: str) -> None:
        if (archive / "2.partial.10.gz").exists():
            (archive / "2.partial.10.gz").rename(archive / "2.partial.20.gz")
        link(source, target)

    monkeypatch.setattr(sabotage, "_link", meanwhile)
    copied = copy_of(archive, tmp_path / "copy")
    assert sorted(path.name for path in copied.iterdir()) == ["1.gz", "2.partial.20.gz", "3.gz"]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(OpsError, match="cannot be copied"):
        copy_of(tmp_path / "nowhere", tmp_path / "copy")


def test_a_column_is_found_under_a_name_that_pg_dump_quotes(tmp_path: Path) -> None:
    (tmp_path / "toc.dat").write_bytes(
        b'\0COPY public.plain ("x,(y", b) FROM stdin;\n\0COPY public."order" (id, "position", "One ""1""") FROM stdin;\n'
    )
    assert [sabotage._place_of(tmp_path, "public", "plain", name) for name in ("x,(y", "b")] == [0, 1]
    places = [sabotage._place_of(tmp_path, "public", "order", name) for name in ("id", "position", 'One "1"')]
    assert places == [0, 1, 2]
    with pytest.raises(OpsError, match=r"has no column order\.posit"):
        sabotage._place_of(tmp_path, "public", "order", "posit")
