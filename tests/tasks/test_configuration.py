"""The files of a data directory that belong to the server's configuration: found, noted and put into a copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from blocks.postgres.server import Postgres
from tasks.cluster import configuration
from tasks.cluster.configuration import (
    live_configuration,
    load_configuration,
    note_of,
    place_configuration,
    read_configuration,
    save_configuration,
)
from tasks.postgres.server.new_cluster import create_cluster
from tests.fixtures.servers import PostgresServer

FILES = {
    "postgresql.conf": "include 'site/one.conf'\nssl_ca_file = 'ca.pem' # text\narchive_command = 'ship.sh %p'\n"
    "external_pid_file = 'server.pid'\nlog_directory = 'log'\ninclude_dir = 'conf.d'\nssl_key_file = 'secret.key'\n",
    "postgresql.auto.conf": "work_mem = '7MB'\n",
    "pg_hba.conf": "local @admins all trust\ninclude more_hba.conf\n",
    **dict.fromkeys(("admins", "more_hba.conf", "ca.pem", "ship.sh", "conf.d/a.conf", "site/one.conf"), "x\n"),
    **dict.fromkeys(("server.pid", "log/today", "unnamed", "PG_VERSION", "base/1/112", "postmaster.pid"), "x\n"),
}
OWN = {name for name in FILES if name not in ("server.pid", "log/today", "unnamed", "PG_VERSION", "postmaster.pid")}


def filled(data: Path) -> Path:
    for name, text in FILES.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(text)
    (data / "ship.sh").chmod(0o700)
    (data / "secret.key").symlink_to("/etc/ssl/private/server.key")
    return data


def test_what_the_configuration_includes_or_names_is_carried_over_and_nothing_else(tmp_path: Path) -> None:
    """A link stays one: its content may be another user's. A file that only the copy names does not return."""
    live, copy = filled(tmp_path / "data"), filled(tmp_path / "copy")
    (live / "conf.d/a.conf").write_text("new\n")
    (copy / "conf.d/removed.conf").write_text("old\n")
    (copy / "site/one.conf").unlink()
    found = read_configuration(live)
    assert set(found.files) == OWN - {"base/1/112"} | {"secret.key"}
    note = note_of(live)
    save_configuration(note, found, live)
    assert note.stat().st_mode & 0o777 == 0o600
    noted = load_configuration(note)
    assert noted == found
    place_configuration(noted, copy, live)
    assert (copy / "conf.d/a.conf").read_text() == "new\n"
    assert not (copy / "conf.d/removed.conf").exists()
    assert (copy / "site/one.conf").read_text() == "x\n"
    assert (copy / "ship.sh").stat().st_mode & 0o777 == 0o700
    assert str((copy / "secret.key").readlink()) == "/etc/ssl/private/server.key"


def test_a_note_of_a_directory_that_was_renamed_back_is_not_used(tmp_path: Path) -> None:
    live = filled(tmp_path / "data")
    save_configuration(note_of(live), read_configuration(live), tmp_path / "data.superseded_20260101_000000")
    assert load_configuration(note_of(live)) is None


def test_the_note_counts_where_the_live_directory_is_missing_or_empty(tmp_path: Path) -> None:
    live, kept = filled(tmp_path / "data"), tmp_path / "data.superseded_20260101_000000"
    secret = SecretStr("")
    block = Postgres(database="app", user="app", password=secret, admin_password=secret, data_directory=str(live))
    found = live_configuration(block)
    assert found is not None
    save_configuration(note_of(live), found, kept)
    live.rename(kept)
    assert live_configuration(block) == found
    live.mkdir()
    assert live_configuration(block) == found
    (live / "PG_VERSION").write_text("18\n")
    assert live_configuration(block) != found, "another server's"


def test_an_unreadable_file_is_named_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration, "MOST_BYTES", 3)
    found = read_configuration(filled(tmp_path / "data"))
    assert "pg_hba.conf" in found.skipped
    assert "pg_hba.conf" in found.missing


def test_a_new_cluster_in_the_place_of_a_damaged_one_keeps_its_configuration() -> None:
    server = PostgresServer()
    try:
        server.initdb()
        with (server.data / "postgresql.conf").open("a") as file:
            file.write("cluster_name = 'site'\n")
        create_cluster.work(server.block())
        server.start()
        assert server.sql("SHOW cluster_name") == [("site",)]
        assert not note_of(server.data).exists()
    finally:
        server.remove()
