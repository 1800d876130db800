"""Two environments on one database, Redis server or directory: the doctor refuses the pair unless it is declared."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from blocks.config import toml
from deployments.doctor.line import DoctorLine
from deployments.doctor.sharing import look_at_sharing
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer
from tests.redis.servers import PASSWORD, running_redis

TOML = """
name = "{name}"
reports = "{root}/{name}"
{shares}
[objectives]
rpo = "1h"
rto = "4h"
[postgres]
host = "{host}"
port = {postgres}
database = "{database}"
user = "grc_user"
password_env = "SHARED_PASSWORD"
admin_password_env = "SHARED_ADMIN_PASSWORD"
data_directory = "{root}/none"
[redis]
port = {redis}
password_env = "SHARED_REDIS_PASSWORD"
data_directory = "{root}/none"
[services]
kind = "supervisor"
names = {{}}
[application]
directory = "{root}/{directory}"
"""


def test_the_doctor_refuses_two_environments_on_one_system_unless_declared(
    postgres_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "app")
    for name, secret in (("", ROLE_PASSWORD), ("_ADMIN", ADMIN_PASSWORD), ("_REDIS", PASSWORD)):
        monkeypatch.setenv(f"SHARED{name}_PASSWORD", secret)
    monkeypatch.setenv("OPS_ENVIRONMENT", "one")
    monkeypatch.setenv("OPS_OTHER_REGION", "two")

    def look(**second: object) -> list[DoctorLine]:
        first = {
            "root": tmp_path,
            "host": "127.0.0.1",
            "postgres": postgres_server.port,
            "database": "grc_db",
            "redis": server.port,
            "directory": "app",
            "shares": "",
        }
        for variable, name, values in (("OPS_ENVIRONMENT", "one", {}), ("OPS_OTHER_REGION", "two", second)):
            path = tmp_path / f"{name}.toml"
            path.write_text(TOML.format(**{**first, **values, "name": name}))
            monkeypatch.setenv(f"{variable}_FILE", str(path))
        return list(look_at_sharing(toml.environment("one")))

    with running_redis() as server, temporary_settings(restore_defaults={PREFECT_API_URL}):
        found = look(host="localhost", directory="link")  # other words for the same
        assert [line.level for line in found] == ["CRITICAL"] * 3
        assert [line.what.partition(" is described by the environment two too")[0] for line in found] == [
            f"grc_db on localhost:{postgres_server.port}",
            f"Redis 127.0.0.1:{server.port}",
            f"{tmp_path}/link",
        ]
        assert 'add shares = ["two"] to the TOML of one' in found[0].todo
        declared = look(host="localhost", directory="link", shares='shares = ["one"]')
        assert [line.level for line in declared] == ["OK"] * 3
        (only,) = look(database="another", redis=1, directory="none")
        assert only.what.startswith("no other environment describes grc_db on 127.0.0.1")
