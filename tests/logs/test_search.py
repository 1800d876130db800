"""search_logs on real files: rotated, packed, damaged, half-written, in other encodings, and never a line dropped."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.logs.search import search_logs
from runbook.errors import OpsError
from runbook.report import Report, Status
from tests.fixtures.logfiles import NAME, NOON, every, line


def found(report: Report) -> list[str]:
    """The messages that it shows."""
    (table,) = [item for item in report.evidence if item.name.startswith("The first")]
    return [row[3] for row in table.rows]


def values(report: Report) -> str:
    return " | ".join(f"{finding.name}: {finding.value}" for finding in report.findings)


def test_it_finds_by_each_condition_over_all_rotated_files(logs: Path) -> None:
    day = timedelta(days=1)
    (logs / "app.log.3.xz").write_bytes(lzma.compress(line("oldest", NOON - 3 * day).encode()))
    (logs / "app.log.2.gz").write_bytes(gzip.compress(line("older", NOON - 2 * day, user_id="u1").encode()))
    (logs / "app.log-20260214.bz2").write_bytes(bz2.compress(line("old", NOON - day, level="ERROR").encode()))
    (logs / "app.log").write_text(line("now 日本語", status=503) + line("now too", http={"code": 404}, status=200))
    (logs / "app.log.bak").write_text(line("no part of it"))
    assert set(found(search_logs.fn(NAME))) == {"oldest", "older", "old", "now 日本語", "now too"}
    assert found(search_logs.fn(NAME, level=("ERROR",))) == ["old"]
    assert found(search_logs.fn(NAME, user=("u1",))) == ["older"]
    assert found(search_logs.fn(NAME, text="日本")) == ["now 日本語"]
    assert found(search_logs.fn(NAME, regex='"status": 50[0-9]')) == ["now 日本語"]
    assert found(search_logs.fn(NAME, fields=("status>=500",))) == ["now 日本語"]
    assert found(search_logs.fn(NAME, fields=("http.code=404", "message~too$"))) == ["now too"]
    assert found(search_logs.fn(NAME, module=("nothing",))) == []
    assert search_logs.fn(NAME).status is Status.OK


def test_a_day_is_the_operators_own_and_times_are_compared_with_their_zones(logs: Path) -> None:
    (logs / "app.log").write_text(
        line("15th 00:30 in Tokyo, 14th in UTC", NOON - timedelta(hours=20, minutes=30))
        + '{"timestamp": "2026-02-15T23:59:59+09:00", "message": "late on the 15th"}\n'
        + '{"timestamp": "2026-02-15 14:59:59,5", "message": "naive: UTC, as the manual writes it"}\n'
        + '{"timestamp": "2026-02-15T15:00:00Z", "message": "16th in Tokyo"}\n'
        + '{"timestamp": "soon", "message": "no time"}\n'
    )
    report = search_logs.fn(NAME, since="2026-02-15", until="2026-02-16")
    assert [text.split(",")[0].split(":")[0] for text in found(report)] == ["15th 00", "late on the 15th", "naive"]
    assert "lines without a time: 1" in values(search_logs.fn(NAME))
    with pytest.raises(OpsError, match="since “yesterday” is no time"):
        search_logs.fn(NAME, since="yesterday")


def test_the_hour_that_comes_twice_is_two(logs: Path) -> None:
    """Europe, 2026-10-25: 03:00 is 02:00 once more."""
    toml = logs.parent / "trial.toml"
    toml.write_text(toml.read_text().replace("Asia/Tokyo", "Europe/Berlin"))
    midnight = datetime(2026, 10, 25, 0, 50, tzinfo=UTC)
    (logs / "app.log").write_text(
        "".join(line("x", at) for at in (midnight, *every(1, 2, midnight + timedelta(minutes=20))))
    )
    report = search_logs.fn(NAME)
    (table,) = [item for item in report.evidence if item.name.startswith("By hour")]
    assert list(map(tuple, table.rows)) == [("2026-10-25 02:00 +01:00", "2"), ("2026-10-25 02:00 +02:00", "1")]
    assert report.facts["found"] == "3 lines, from 2026-10-25 02:50:00 to 2026-10-25 02:10:01 Europe/Berlin"


def test_what_is_no_json_is_counted_and_shown_and_the_rest_is_found(logs: Path) -> None:
    lines = [
        line("first").encode(),
        b"Traceback (most recent call last):\n",
        b"\n",
        b"[1, 2]\n",
        b'"text"\n',
        '{"message": "シフトJIS"}\n'.encode("cp932"),
        b'{"a": "\x00"}\n',
        b'{"level": "INFO"} and more\n',
        line("x" * 1_000_000).encode(),
        line("last", level="ERROR").encode(),
        b'{"timestamp": "2026-02-15T12:0',
    ]
    (logs / "app.log").write_bytes(b"".join(lines))
    report = search_logs.fn(NAME)
    assert "lines that are not JSON objects: 6" in values(report), "the half-written last one is told apart"
    assert "half-written line" in report.facts
    assert report.status is Status.WARN
    assert {text[:5] for text in found(report)} == {"first", "last", "xxxxx"}
    (bad,) = [item for item in report.evidence if "not JSON objects" in item.name]
    assert ("app.log", "2", "Traceback (most recent call last):") in bad.rows
    assert found(search_logs.fn(NAME, level=("ERROR",))) == ["last"]


def test_a_damaged_packed_file_is_told_with_what_could_be_read(logs: Path) -> None:
    content = bytearray(
        gzip.compress("".join(line(f"m{number}", user_id=str(os.urandom(9))) for number in range(5000)).encode())
    )
    (logs / "app.log").write_text(line("now"))
    (logs / "app.log.1.gz").write_bytes(bytes(content[: len(content) // 2]))
    report = search_logs.fn(NAME)
    assert "app.log.1.gz is whole: damaged, read up to there" in values(report)
    content[-8] ^= 0xFF  # its checksum: every byte of the content is there
    (logs / "app.log.1.gz").write_bytes(bytes(content))
    report = search_logs.fn(NAME)
    assert "app.log.1.gz is whole: damaged, read up to there: CRC" in values(report)
    assert report.facts["found"].startswith("5,001 lines")
    (logs / "app.log.2.zst").write_bytes(b"packed")
    assert "app.log.2.zst is whole: packed as zst" in values(search_logs.fn(NAME))


def test_secrets_and_addresses_of_people_are_in_no_report_and_no_file(logs: Path) -> None:
    (logs / "app.log").write_text(
        line(
            "connect postgresql://grc:hunter2@db/x", password="hunter3", headers={"Authorization": "Bearer hunter4567"}
        )
        + line("mail to taro@example.com, token=hunter5", total_tokens=321)
        + "plain: password=hunter6\n"
    )
    report = search_logs.fn(NAME)
    evidence = Path(report.facts["evidence"].partition(": ")[0])
    assert evidence.stat().st_mode & 0o777 == 0o600
    kept = [json.loads(text) for text in evidence.read_text().splitlines()]
    assert {entry.get("total_tokens") for entry in kept} == {None, 321}
    everything = evidence.read_text() + str(report.as_json())
    assert "hunter" not in everything
    assert "taro@" not in everything


def test_the_file_holds_as_many_as_were_asked_for_and_all_are_counted(logs: Path) -> None:
    (logs / "app.log").write_text("".join(line(f"m{at:%H%M%S}", at) for at in every(1, 3000)))
    report = search_logs.fn(NAME, first=2000)
    assert report.facts["found"].startswith("3,000 lines")
    assert ": 2,000 lines" in report.facts["evidence"]


def test_bad_input_is_one_sentence(logs: Path) -> None:
    with pytest.raises(OpsError, match="there is no log .*app.log"):
        search_logs.fn(NAME)
    (logs / "app.log").write_text(line("x"))
    with pytest.raises(OpsError, match="“status” is not a condition"):
        search_logs.fn(NAME, fields=("status",))
    with pytest.raises(OpsError, match="DuckDB refuses the search: .*missing"):
        search_logs.fn(NAME, regex="(")
    (logs / "app.log").write_bytes(b'{"message": "' + b"x" * (40 << 20) + b'"}\n')
    with pytest.raises(OpsError, match="longer than 16 MiB"):
        search_logs.fn(NAME)
