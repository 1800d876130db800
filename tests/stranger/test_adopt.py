"""`python -m deployments.adopt` on a system that nobody here has seen: what it finds, writes, keeps secret, reports."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from blocks.config import secrets, toml
from deployments.adopt.__main__ import NEEDED, complete
from tests.stranger.system import (
    ADMIN_PASSWORD,
    DATABASE,
    REDIS_PASSWORD,
    ROLE,
    ROLE_PASSWORD,
    SUPERVISOR_PASSWORD,
    Ran,
    Stranger,
)

NAME = "adopted"


def adopt(stranger: Stranger, directory: Path, *flags: str) -> Ran:
    """As an operator types it, without a Prefect server, whose shell has no secret."""
    own = {"OPS_ENVIRONMENT": NAME, "OPS_ENVIRONMENT_FILE": str(directory / f"{NAME}.toml")}
    return stranger.python("deployments.adopt", NAME, "--yes", *flags, **own)


def test_a_running_system_is_adopted(stranger: Stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First without the superuser's password, which nobody can find; then with it; then once more, otherwise."""
    url = f"http://127.0.0.1:{stranger.ports['application']}"
    flags = ("--application-url", url, "--reports", f"{tmp_path}/reports", "--backups-directory", f"{tmp_path}/backups")
    first = adopt(stranger, tmp_path, *flags)
    assert first.code == 1, first.text
    file, hidden = tmp_path / f"{NAME}.toml", tmp_path / f"{NAME}.env"
    text = file.read_text()
    assert "to fill in: ADOPTED_POSTGRES_ADMIN_PASSWORD, the password of the superuser postgres" in first.text
    missing = "CRITICAL  adopted.toml: 1 variable is not set: ADOPTED_POSTGRES_ADMIN_PASSWORD ([postgres] admin_passwor"
    assert missing in first.text
    assert stat.S_IMODE(hidden.stat().st_mode) == 0o600
    for password in (ROLE_PASSWORD, REDIS_PASSWORD, SUPERVISOR_PASSWORD):
        assert password not in first.text + text
    assert secrets.read_file(hidden) == {
        "ADOPTED_POSTGRES_PASSWORD": ROLE_PASSWORD,
        "ADOPTED_REDIS_PASSWORD": REDIS_PASSWORD,
        "ADOPTED_SUPERVISOR_PASSWORD": SUPERVISOR_PASSWORD,
    }

    filled = hidden.read_text().replace("ADMIN_PASSWORD=", f"ADMIN_PASSWORD='{ADMIN_PASSWORD}'")
    hidden.write_text(filled)
    second = adopt(stranger, tmp_path, *flags)
    assert second.code == 0, second.text
    assert f"{file} is unchanged" in second.text
    assert (file.read_text(), hidden.read_text()) == (text, filled), "idempotent"
    for line in (
        f"OK        [postgres] user {ROLE} logs in to {DATABASE}",
        "OK        [postgres] admin_user postgres is a superuser",
        "OK        [services] backend = members is RUNNING",
        f"OK        [redis] data_directory is {stranger.root}/redis/data",
        "OK        [application] backend is healthy",
        "WARN      Prefect is not checked",
        ", 0 critical",
    ):
        assert line in second.text, second.text

    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(file))
    env = toml.environment(NAME)
    assert dict(env.services.names) == {"postgres": "database", "redis": "keys", "backend": "members"}
    assert (env.postgres.database, env.postgres.user, env.postgres.port) == (DATABASE, ROLE, stranger.ports["postgres"])
    assert (env.postgres.programs, env.postgres.os_user) == (str(stranger.programs), stranger.account.name)
    assert (env.redis.port, env.redis.config_file) == (stranger.ports["redis"], f"{stranger.root}/redis/redis.conf")
    assert (env.application.url, env.application.health_path) == (url, "/ready")
    assert env.backups.postgres == f"{tmp_path}/backups/postgres"

    changed = adopt(stranger, tmp_path, *flags, "--rto", "8h")
    assert "is kept; --force writes it anew" in changed.text
    assert '+rto = "8h"' in changed.text
    assert file.read_text() == text


def test_what_is_needed_and_not_found_is_named_with_its_flags(stranger: Stranger, tmp_path: Path) -> None:
    """Of another host nothing can be found here."""
    done = adopt(
        stranger,
        tmp_path,
        "--postgres-host",
        "db.example.com",
        "--redis-host",
        "",
        "--application-directory",
        str(tmp_path),
    )
    assert done.code == 2
    for flag in ("--postgres-database", "--postgres-user", "--postgres-programs", "--postgres-data-directory"):
        assert flag in done.text, done.text
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_the_minimal_description_passes_the_doctor(stranger: Stranger) -> None:
    """No [thresholds], no directories but those of its servers: nothing critical, and what is not checked is named."""
    done = stranger.python("deployments.doctor", "--environment", "stranger")
    assert done.code == 0, done.text
    assert "CRITICAL" not in done.text
    assert "WARN      Prefect is not checked" in done.text


def test_the_doctor_names_what_is_wrong_what_is_expected_and_the_next_step(stranger: Stranger) -> None:
    """Six mistakes that a TOML cannot show; then a service manager that refuses the password, in one line."""
    data = f"{stranger.root}/redis/data"
    stranger.describe(
        ('backend = "members"', 'backend = "membres"'),
        (f'data_directory = "{data}"', f'data_directory = "{stranger.root}/log"'),
        (f'os_user = "{stranger.account.name}"\n\n[redis]', 'os_user = "bin"\n\n[redis]'),
        (f'config_file = "{stranger.root}/redis/redis.conf"', f'config_file = "{stranger.root}/none.conf"'),
        (f'postgres = "{stranger.root}/backups/postgres"', f'postgres = "{stranger.toml}/backups"'),
    )
    text = stranger.python("deployments.doctor", "--environment", "stranger", STRANGER_PASSWORD="wrong").text
    stranger.describe()
    other = stranger.python("deployments.doctor", "--environment", "stranger", STRANGER_SUPERVISOR_PASSWORD="wrong")
    assert other.code == 1
    assert other.text.count("answers 401") == 1
    lines = [line for line in text.splitlines() if line.startswith("CRITICAL")]
    for found, more in (
        ("[services] backend = membres: supervisord refuses", "BAD_NAME"),
        (f"[redis] data_directory is {stranger.root}/log ", f"expected: {data}, the server's own — correct [redis]"),
        ("[postgres] os_user is bin", f"expected: {stranger.account.name}, the owner of"),
        (f"[redis] config_file is {stranger.root}/none.conf", "expected: "),
        (f"[backups] postgres {stranger.toml}/backups cannot be written", "expected: a directory that this user"),
        (f"[postgres] user {ROLE} does not log in to {DATABASE}", "correct the secret"),
    ):
        assert [line for line in lines if line.removeprefix("CRITICAL  ").startswith(found) and more in line], text


def test_at_a_terminal_each_answer_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter takes what was found, `-` leaves a key empty; what has a flag is not asked."""
    answers = {"postgres.port": "6000", "redis.host": "-", "application.url": ""}
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt.partition(":")[0])
        return answers.get(asked[-1], "")

    monkeypatch.setattr("builtins.input", answer)
    found = {f"postgres.{key}": "found" for key in (*NEEDED, "host", "port")} | {"application.url": "http://h:1"}
    chosen = complete(found, {"objectives.rpo": "5m"}, ask=True)
    assert (chosen["postgres.port"], chosen["postgres.user"], chosen["redis.host"]) == ("6000", "found", "")
    assert (chosen["objectives.rpo"], chosen["objectives.rto"], chosen["application.url"]) == ("5m", "4h", "http://h:1")
    assert "redis.port" not in asked, "there is no Redis"
    assert "objectives.rpo" not in asked
