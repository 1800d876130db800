"""The audit's evidence, of real servers: complete and without a secret; an edited report and an unlocked user are found."""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from blocks.config import toml
from blocks.environment import Environment
from flows.routine.audit import collect_audit_evidence
from lab.processes import OsAccount
from runbook import shell
from runbook.errors import OpsError, RunbookFailed
from runbook.files import chain
from runbook.guard.loss import Loss
from runbook.report import Report, Status
from runbook.wait import until
from tasks.reports.evidence import MANIFEST, verify_sealed
from tests.fixtures.logfiles import line
from tests.fixtures.reports import bad, rows
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer, free_port
from tests.redis.servers import PASSWORD, RedisServer

NAME, DATABASE = "trial", "trial_audit"
SECRETS = (ADMIN_PASSWORD, ROLE_PASSWORD, PASSWORD, "acl/p@ss word-91")
TOML = """
name = "trial"
timezone = "Asia/Tokyo"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[postgres]
port = {postgres.port}
database = "{database}"
user = "grc_user"
password_env = "TRIAL_PASSWORD"
admin_password_env = "TRIAL_ADMIN_PASSWORD"
programs = "{postgres.programs}"
data_directory = "{postgres.data}"
[redis]
port = {redis.port}
password_env = "TRIAL_REDIS_PASSWORD"
[services]
kind = "supervisor"
url = "http://127.0.0.1:{control}"
names = {{ backend = "sleeper" }}
[logs]
audit = "{base}/audit.log"
"""
SUPERVISORD = """
[supervisord]
nodaemon = true
pidfile = {base}/supervisord.pid
logfile = {base}/supervisord.log
{root_user}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface
[inet_http_server]
port = 127.0.0.1:{control}
[program:sleeper]
command = sleep 600
startsecs = 0
{user}
"""


@pytest.fixture
def audited(postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A database, a Redis and a service, described as an operator would; its reports are in `tmp_path`."""
    control, redis = free_port(), RedisServer()
    told = {"base": tmp_path, "postgres": postgres_server, "database": DATABASE, "redis": redis, "control": control}
    account = OsAccount.of_servers()
    told["user"] = f"user = {account.name}" if account.is_other else ""
    told["root_user"] = "user = root" if account.is_other else ""
    (tmp_path / "trial.toml").write_text(TOML.format(**told))
    (tmp_path / "supervisord.conf").write_text(SUPERVISORD.format(**told))
    for variable, value in (
        ("OPS_ENVIRONMENT", NAME),
        ("OPS_ENVIRONMENT_FILE", str(tmp_path / "trial.toml")),
        ("TRIAL_PASSWORD", ROLE_PASSWORD),
        ("TRIAL_ADMIN_PASSWORD", ADMIN_PASSWORD),
        ("TRIAL_REDIS_PASSWORD", PASSWORD),
    ):
        monkeypatch.setenv(variable, value)
    postgres_server.create_database(DATABASE)
    argv = [sys.executable, "-m", "supervisor.supervisord", "-c", tmp_path / "supervisord.conf"]
    try:
        with shell.spawn(argv, directory=tmp_path):
            redis.start()
            until(lambda: Environment.find(NAME).services.is_running("backend"), what="the service", seconds=120)
            yield redis
    finally:
        redis.remove()
        postgres_server.drop_database(DATABASE)


def collect() -> Report:
    """The report, CRITICAL or not."""
    try:
        return collect_audit_evidence.fn(NAME)
    except RunbookFailed as error:
        return error.report


def archive(report: Report) -> Path:
    return Path(report.facts["archive"].split(", ")[0])


def content(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {one.name.partition("/")[2]: tar.extractfile(one).read() for one in tar.getmembers()}  # type: ignore[union-attr]


def drilled(directory: Path) -> Path:
    """A drill of last month."""
    at = datetime.now(UTC) - timedelta(days=30)
    report = Report("DR drill", NAME, started=at, finished=at + timedelta(hours=1))
    report.fact("scenario", "DB障害")
    return chain.append(directory, "dr-drill", report.as_json())[0]


def test_everything_is_in_it_and_no_secret(
    audited: RedisServer, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    at = datetime.now(UTC) - timedelta(hours=2)
    event = {"action": "login", "resource": "r", "ip_address": "10.0.0.1"}
    (tmp_path / "audit.log").write_text(
        line("audit", at, user_id="sato", result="success", **event)
        + line("audit", at + timedelta(minutes=1), user_id="sato", result="failure", **event)
        + line("audit", at, user_id="ito", result="success", **event)
        + line("audit", at - timedelta(days=800), user_id="long-gone", result="success", **event)
    )
    drilled(tmp_path / "reports")
    restored = Report("Full restore", NAME, started=at, finished=at)
    restored.loses(Loss(DATABASE, 3))
    chain.append(tmp_path / "reports", "full-restore", restored.as_json())
    postgres_server.sql("CREATE TABLE secrets (id int)", database=DATABASE)
    postgres_server.sql("GRANT SELECT ON secrets TO grc_user", database=DATABASE)
    report = collect()
    assert bad(report) == {}, "each could be asked, and is as it should be"
    ((_, status, runbook, lost),) = rows(report, f"Recoveries ({NAME})")
    assert (status, runbook, lost) == ("OK", "Full restore", f"3 commits of {DATABASE} are lost")
    files = content(archive(report))
    index = json.loads(files[f"reports/{NAME}/index.json"])["reports"]
    assert [one["losses"] for one in index if one["runbook"] == "Full restore"] == [[lost]]
    roles = {role["name"]: role for role in json.loads(files["access/postgres.json"])["roles"]}
    assert "superuser" in roles["postgres"]["attributes"]
    assert roles["grc_user"]["attributes"] == ["login"]
    assert roles["grc_user"]["has_password"] is True
    rights = json.loads(files["access/postgres.json"])["rights"]
    assert {"role": "grc_user", "schema": "public", "privilege": "SELECT", "relations": 1, "one": "secrets"} in rights
    assert any("scram-sha-256" in rule for rule in json.loads(files["access/postgres.json"])["rules"])
    (default,) = json.loads(files["access/redis.json"])
    assert (default["name"], default["passwords"]) == ("default", 1)
    (service,) = json.loads(files["access/services.json"])
    assert service["user"] == OsAccount.of_servers().name
    users = {
        user["who"]: (user["events"], user["failed"]) for user in json.loads(files["access/application_users.json"])
    }
    assert users == {"sato": (2, 1), "ito": (1, 0)}
    assert {one["product"] for one in json.loads(files["versions.json"])} >= {"postgres", "python", "prefect"}
    assert [name for name in files if name.endswith("-dr-drill.json")]
    assert {"settings/postgres.json", "settings/redis.json", "settings/environment.json"} <= set(files)
    whole = b"".join(files.values())
    assert [secret for secret in SECRETS if secret.encode() in whole] == []
    assert b"SCRAM-SHA-256$" not in whole
    assert archive(report).stat().st_mode & 0o777 == 0o640
    assert verify_sealed(archive(report)) == ()


def test_an_edited_report_an_open_door_and_what_cannot_be_asked_are_found(
    audited: RedisServer, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    path = drilled(tmp_path / "reports")
    drilled(tmp_path / "reports")
    text = path.read_text()
    path.write_text(text.replace('"OK"', '"WARN"', 1))
    assert path.read_text() != text
    with audited.client() as client:
        client.acl_setuser("guest", enabled=True, nopass=True, commands=["+@all"], keys=["*"])
    postgres_server.sql("CREATE ROLE trial_master SUPERUSER LOGIN")
    try:
        report = collect()
    finally:
        postgres_server.sql("DROP ROLE trial_master")
    assert report.status is Status.CRITICAL
    found = bad(report)
    assert found[f"chain of reports ({NAME})"] == f"{path.name} was changed after it was written"
    assert found["Redis users without a password"] == "guest"
    assert "trial_master" in found["superusers of the database"]
    assert "not measured: users of the application" in found, "there is no audit log"
    assert "users of the application" in json.loads(content(archive(report))[MANIFEST])["missing"]


def test_a_secret_of_the_environment_of_the_drills_is_left_out_too(
    audited: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reports are in the archive as well."""
    own = tmp_path / "trial.toml"
    own.write_text(own.read_text().replace("[objectives]", 'drill_environment = "drill"\n[objectives]', 1))
    monkeypatch.setenv("DRILL_PASSWORD", "of-the-drill-8642")
    (tmp_path / "drill.toml").write_text(
        f'name = "drill"\nreports = "{tmp_path}/drills"\n[objectives]\nrpo = "1h"\nrto = "4h"\n[services]\nnames = {{}}\n'
        '[application]\nurl = "http://127.0.0.1:9"\npassword_env = "DRILL_PASSWORD"\n'
    )
    held = Report("DR drill", "drill")
    held.fact("scenario", "of-the-drill-8642")
    path, _ = chain.append(tmp_path / "drills", "dr-drill", held.as_json())
    with toml.read(tmp_path / "drill.toml").stands_in():
        report = collect()
    assert bad(report)["no secret is in the archive"] == f"left out: reports/drill/{path.name}"
    assert b"of-the-drill-8642" not in b"".join(content(archive(report)).values())


def test_what_would_hold_a_secret_is_left_out_and_a_changed_archive_does_not_pass(
    audited: RedisServer, tmp_path: Path
) -> None:
    """Somebody typed a password where the name belongs."""
    at = datetime.now(UTC) - timedelta(hours=2)
    (tmp_path / "audit.log").write_text(line("audit", at, user_id=ROLE_PASSWORD, action="login", result="failure"))
    with audited.client() as client:
        client.acl_setuser("other", enabled=True, passwords=[f"+{SECRETS[3]}"], keys=["*"])
    report = collect()
    assert bad(report)["no secret is in the archive"] == "left out: access/application_users.json"
    assert report.status is Status.CRITICAL
    assert report.path
    whole = b"".join([report.path.read_bytes(), *content(archive(report)).values()])
    assert [secret for secret in SECRETS if secret.encode() in whole] == []
    with tarfile.open(archive(report)) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (inner,) = (tmp_path / "unpacked").iterdir()
    (inner / "versions.json").write_text("[]")
    (inner / "more.txt").write_text("more")
    changed = tmp_path / "changed.tar.gz"
    with tarfile.open(changed, "w:gz") as tar:
        tar.add(inner, inner.name)
    assert set(verify_sealed(changed)) == {"versions.json was changed", "more.txt is not in the manifest"}
    changed.write_bytes(archive(report).read_bytes()[:100])
    with pytest.raises(OpsError, match="cannot be read"):
        verify_sealed(changed)
