"""A primary and its standby on two hosts, each with a worker of its own that reads the same TOML: two network namespaces
(processes and files of the other host are not looked at, as they would not be there)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

from lab.processes import OsAccount, run
from lab.state.base import CHECKOUT
from runbook.wait import until
from tests.fixtures.postgres.clusters import LOGIN, NAME
from tests.fixtures.postgres.templates import Template, new_directory
from tests.fixtures.servers import binaries

pytestmark = pytest.mark.system
ADDRESSES = {"a": "10.213.77.1", "b": "10.213.77.2"}
ROLES = {"a": "postgres", "b": "standby"}
PERSON = "山田太郎 iDRACで電源断"
RUN = """
import sys
from flows.recovery.postgres.failover import postgres_failover, rejoin_standby
from runbook.errors import OpsError
flow = {"failover": postgres_failover, "rejoin": rejoin_standby}[sys.argv[1]]
try:
    report = flow.fn(sys.argv[2], confirm=sys.argv[2], **dict(word.split("=") for word in sys.argv[3:]))
    print(report.sentence())
except OpsError as error:
    report = getattr(error, "report", None)
    for found in report.findings if report else ():
        print(found.status, found.name, found.value, found.hint)
    sys.exit(f"{error.message} | {error.hint}")
"""
SETTINGS = """
listen_addresses = '*'
port = 5432
unix_socket_directories = ''
wal_log_hints = on
shared_buffers = 32MB
dynamic_shared_memory_type = mmap
wal_retrieve_retry_interval = 500ms
"""
SUPERVISOR = """
[inet_http_server]
port = {address}:9001
username = ops
password = {password}
[supervisord]
nodaemon = true
logfile = {root}/supervisord.log
pidfile = {root}/supervisord.pid
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl = http://{address}:9001
username = ops
password = {password}
[program:postgresql]
command = {programs}/postgres -D {data}
user = {user}
directory = /
stopsignal = INT
autostart = true
redirect_stderr = true
stdout_logfile = {root}/postgresql.log
"""
TOML = """
name = "pair"
timezone = "Asia/Tokyo"
reports = "{reports}"
[objectives]
rpo = "1h"
rto = "4h"
[services]
kind = "supervisor"
url = "http://{a}:9001"
username = "ops"
password_env = "PAIR_SUPERVISOR_PASSWORD"
[services.names]
postgres = "postgresql"
standby = "postgresql"
[services.hosts]
standby = "http://{b}:9001"
[alerts]
channels = ["file"]
file = "{reports}/alerts.jsonl"
path = [{{ contacts = ["yamada"] }}]
[alerts.contacts.yamada]
role = "SRE"
name = "山田太郎"
"""


@dataclass
class Machine:
    """One of the two: its network, its directory, its supervisor."""

    name: str
    space: str
    root: Path
    passwords: Any
    programs: Path
    supervisord: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        return self.root / "data"

    def inside(self, *argv: str | Path) -> list[str | Path]:
        return ["ip", "netns", "exec", self.space, *argv]

    def boot(self) -> None:
        """Its supervisor starts; what it starts with itself, too."""
        argv = self.inside(sys.executable, "-m", "supervisor.supervisord", "-n", "-c", self.root / "supervisord.conf")
        with (self.root / "supervisord.out").open("ab") as out:
            self.supervisord = subprocess.Popen(argv, cwd=self.root, stdout=out, stderr=out)

    def die(self) -> None:
        """Everything at once, and its cable is cut."""
        run(self.inside("ip", "link", "set", "eth", "down"), cwd=Path("/"))
        if self.supervisord:
            self.supervisord.kill()
            self.supervisord.wait()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if Path(process.cwd()).is_relative_to(self.root):
                    process.kill()
                    process.wait(60)

    def come_back(self) -> None:
        run(self.inside("ip", "link", "set", "eth", "up"), cwd=Path("/"))
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        self.boot()

    def launch(self, what: str, **parameters: str) -> tuple[int, str]:
        """A runbook by this host's worker; its exit code and what it printed."""
        words = [f"{name}={value}" for name, value in parameters.items()]
        variables = {
            "OPS_ENVIRONMENT": NAME,
            "OPS_ENVIRONMENT_FILE": str(self.root / "pair.toml"),
            "PAIR_PASSWORD": self.passwords.postgres,
            "PAIR_ADMIN_PASSWORD": self.passwords.postgres_admin,
            "PAIR_SUPERVISOR_PASSWORD": self.passwords.supervisor,
            "PREFECT_API_URL": "http://127.0.0.1:9/api",
        }
        argv = self.inside(sys.executable, "-c", RUN, what, NAME, *words)
        done = subprocess.run(
            argv, cwd=CHECKOUT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=600
        )
        return done.returncode, done.stdout + done.stderr

    def stop_server(self) -> None:
        """As its administrator does."""
        configuration = self.root / "supervisord.conf"
        run(self.inside(sys.executable, "-m", "supervisor.supervisorctl", "-c", configuration, "stop", "postgresql"))

    def sql(self, statement: str) -> Any:
        """By psycopg in this host's network."""
        argv = self.inside(
            sys.executable,
            "-c",
            "import psycopg, sys; c = psycopg.connect(sys.argv[1], autocommit=True)"
            ".execute(sys.argv[2]); print(c.fetchone()[0] if c.description else '')",
            self.dsn(self.name),
            statement,
        )
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise psycopg.OperationalError(done.stderr.strip().splitlines()[-1])
        return done.stdout.strip()

    def dsn(self, name: str) -> str:
        return f"host={ADDRESSES[name]} user=postgres password={self.passwords.postgres_admin} dbname=postgres"

    def answers(self, expected: str) -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            return bool(self.sql("SELECT pg_is_in_recovery()") == expected)
        return False


@pytest.fixture
def machines() -> Iterator[dict[str, Machine]]:
    """Both run, and b follows a. Their supervisors start PostgreSQL with themselves."""
    template, base = Template.made(), new_directory("hosts")
    spaces = {name: f"ops{os.getpid()}{name}" for name in ADDRESSES}
    made: dict[str, Machine] = {}
    try:
        for space in spaces.values():
            run(["ip", "netns", "add", space], cwd=Path("/"))
        one, two = spaces.values()
        run(
            ["ip", "link", "add", "eth", "netns", one, "type", "veth", "peer", "name", "eth", "netns", two],
            cwd=Path("/"),
        )
        for name in spaces:
            made[name] = _machine(name, spaces[name], base / name, template)
        made["a"].boot()
        until(lambda: made["a"].answers("False"), what="the primary", seconds=120)
        made["a"].sql("SELECT pg_create_physical_replication_slot('standby', true)")
        made["b"].boot()
        yield made
    finally:
        for machine in made.values():
            machine.die()
        for space in spaces.values():
            subprocess.run(["ip", "netns", "del", space], check=False)
        shutil.rmtree(base)
        template.remove()


def _machine(name: str, space: str, root: Path, template: Template) -> Machine:
    account, found = OsAccount.of_servers(), binaries()
    machine = Machine(name, space, root, template.passwords, found.postgres)
    for words in (
        ("addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth"),
        ("link", "set", "eth", "up"),
        ("link", "set", "lo", "up"),
    ):
        run(machine.inside("ip", *words), cwd=Path("/"))
    account.directory(root, 0o755)
    run(["cp", "-a", template.data, machine.data], cwd=Path("/"), account=account)
    (machine.data / "postgresql.conf").write_text(SETTINGS)
    (machine.data / "pg_hba.conf").write_text(
        "".join(f"host {what} all 10.213.77.0/24 scram-sha-256\n" for what in ("all", "replication"))
    )
    if name == "b":
        other = machine.dsn("a").replace("dbname=postgres", "application_name=standby")
        with (machine.data / "postgresql.auto.conf").open("a") as file:
            file.write(f"primary_conninfo = '{other}'\nprimary_slot_name = 'standby'\n")
        (machine.data / "standby.signal").touch()
        account.own(machine.data / "standby.signal")
    text = SUPERVISOR.format(
        address=ADDRESSES[name],
        password=machine.passwords.supervisor,
        root=root,
        programs=found.postgres,
        data=machine.data,
        user=account.name,
    )
    (root / "supervisord.conf").write_text(text)
    toml = TOML.format(reports=root / "reports", **ADDRESSES)
    for part, host in (("postgres", "a"), ("standby", "b")):
        login = LOGIN.format(programs=found.postgres, user=account.name)
        toml += f'[{part}]\nhost = "{ADDRESSES[host]}"\ndata_directory = "{root.parent / host / "data"}"\n{login}\n'
        toml += f'service = "{part}"\nname = "standby"\nslot = "standby"\n'
    (root / "pair.toml").write_text(toml)
    return machine


def test_a_host_dies_a_person_attests_it_and_its_own_worker_joins_it_again(machines: dict[str, Machine]) -> None:
    a, b = machines["a"], machines["b"]
    until(lambda: b.answers("True"), what="the standby", seconds=120)
    a.sql("CREATE TABLE writes AS SELECT 1 AS id")
    until(lambda: b.sql("SELECT to_regclass('writes')") == "writes", what="its rows on the standby", seconds=120)
    a.die()

    code, told = b.launch("failover", mode="unplanned")
    assert code, told
    assert "the person's name and the method" in told
    code, told = b.launch("failover", mode="unplanned", fenced_by="yes")
    assert "begin it with the person who fenced it (山田太郎)" in told
    code, told = b.launch("failover", mode="unplanned", fenced_by=PERSON)
    assert code == 0, told
    assert b.answers("False")
    report = max((b.root / "reports").rglob("*.json"), key=lambda path: path.stat().st_mtime).read_text()
    assert "attested by" in report
    b.sql("INSERT INTO writes VALUES (2)")

    a.come_back()  # nobody could mark its files, and its supervisor starts it with itself
    until(lambda: a.answers("False"), what="a second primary", seconds=120)
    for machine in (a, b):
        code, told = machine.launch("rejoin")
        assert code, told
        assert all(f"{address}:5432" in told for address in ADDRESSES.values()), told
    a.stop_server()
    code, told = b.launch("rejoin")
    assert code, told
    assert f"on {ADDRESSES['a']}, in the checkout of its worker: python -m flows.launch rejoin-standby" in told
    code, told = a.launch("rejoin")
    assert code == 0, told
    until(lambda: a.answers("True"), what="a standby", seconds=120)
    until(lambda: a.sql("SELECT count(*) FROM writes") == "2", what="both rows", seconds=120)

    code, told = b.launch("failover", mode="planned")
    assert code == 0, told
    assert a.answers("False")
    until(lambda: b.answers("True"), what="b follows a again", seconds=120)
