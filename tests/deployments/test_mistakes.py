"""Mistakes in an environment's TOML: each is refused at registration with the key, what was found, what is expected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blocks.config import toml
from blocks.config.secrets import read_file
from deployments.doctor.__main__ import examine
from deployments.names import require_known_names
from runbook.errors import OpsError

TOML = """
name = "trial"
unattended = ["renew-certificates"]
pools = { redis = "trial-redis" }
[objectives]
rpo = "1h"
rto = "4h"
[thresholds]
"backup.age_seconds" = [3600, 86400]
[postgres]
port = 5432
database = "shop"
user = "clerk"
password_env = "TRIAL_PASSWORD"
admin_password_env = "TRIAL_PASSWORD"
data_directory = "/var/lib/postgresql/data"
[redis]
port = 6379
sentinels = ["127.0.0.1:26379"]
[services]
kind = "supervisor"
url = "http://127.0.0.1:9001"
names = { postgres = "postgresql", backend = "storefront" }
[backups]
postgres = "/var/backups/postgresql"
redis = "/var/backups/redis"
[application]
url = "http://127.0.0.1:8000"
[docker.containers.backend]
image = "shop"
[ai_providers]
prices = { "m" = [1.0, 2.0] }
[alerts]
channels = ["file"]
file = "/var/log/alerts"
path = [{ contacts = ["dba"] }]
contacts = { dba = { role = "DBA" } }
"""
SECRET = "hunter2-4778"
MISTAKES = [
    ("[postgres]", "[postgress]", "postgress", "an unknown key", "a known key (did you mean postgres?)"),
    ("database =", "databse =", "[postgres] databse", "an unknown key", "a known key (did you mean database?)"),
    ("port = 5432", "port = 70000", "[postgres] port", "70000", "less than or equal to 65535"),
    ("port = 6379", "port = 0", "[redis] port", "0", "greater than or equal to 1"),
    ('user = "clerk"', "", "[postgres] user", "nothing", "a value: the application's role"),
    (
        'password_env = "TRIAL_PASSWORD"\nadmin',
        f'password = "{SECRET}"\nadmin',
        "[postgres] password",
        "a literal secret (not shown)",
        "password_env = the name of an environment variable",
    ),
    (
        'password_env = "TRIAL_PASSWORD"\nadmin',
        f'password_env = "{SECRET}"\nadmin',
        "[postgres] password_env",
        "something else (not shown)",
        "the name of an environment variable",
    ),
    (
        "http://127.0.0.1:9001",
        f"http://ops:{SECRET}@127.0.0.1:9001",
        "[services] url",
        "“http://********@127.0.0.1:9001”",
        "an address without a password: secrets come from a key in _env",
    ),
    ("backend = ", "bakend = ", "[services] names.bakend", "an unknown role", "a known role (did you mean backend?)"),
    ('"supervisor"', '"upstart"', "[services] kind", "“upstart”", "one of supervisor, systemd, docker"),
    ("http://127.0.0.1:9001", "127.0.0.1:9001", "[services] url", "“127.0.0.1:9001”", "an address, as http://"),
    ("http://127.0.0.1:8000", "http://127.0.0.1:80000", "[application] url", "“http://127.0.0.1:80000”", "an address"),
    ('"127.0.0.1:26379"', '"127.0.0.1"', "[redis] sentinels", "“127.0.0.1”", "host:port"),
    (
        "/var/backups/redis",
        "backups/redis",
        "[backups] redis",
        "“backups/redis”",
        "an absolute path, as /var/backups/app, or s3://",
    ),
    ("/var/lib/postgresql/data", "~/data", "[postgres] data_directory", "“~/data”", "an absolute path"),
    (
        "/var/backups/redis",
        "/var/backups/postgresql",
        "[backups] redis",
        "“/var/backups/postgresql”",
        "a separate directory: [backups] postgres uses this one",
    ),
    (
        "/var/backups/postgresql",
        "/var/lib/postgresql/data/b",
        "[backups] postgres",
        "“/var/lib/postgresql/data/b”",
        "a directory outside of [postgres] data_directory",
    ),
    ('rpo = "1h"', 'rpo = "1 hour"', "[objectives] rpo", "“1 hour”", "a duration above 0, as 30m, 1h or 7d"),
    ('rto = "4h"', 'rto = "0h"', "[objectives] rto", "“0h”", "a duration above 0"),
    ('rto = "4h"', 'rot = "4h"', "[objectives] rot", "an unknown key", "a known key (did you mean rto?)"),
    ("[3600, 86400]", "[3600]", "thresholds.backup.age_seconds", "[3600]", "at least 2 items"),
    (
        '["renew-certificates"]',
        '["renew-certificate"]',
        "unattended",
        "“renew-certificate”",
        "a runbook (did you mean renew-certificates?)",
    ),
    (
        '["renew-certificates"]',
        '["check-redis-memory"]',
        "unattended",
        "“check-redis-memory”",
        "a runbook that changes something: check-redis-memory only reads",
    ),
    ("{ redis = ", "{ rediss = ", "[pools] rediss", "an unknown key", "a chapter (did you mean redis?)"),
    ("image =", "imgae =", "[docker] containers.backend.imgae", "an unknown key", "a known key (did you mean image?)"),
    (
        'dba = { role = "DBA"',
        'dba = { role = "DBA", emial = "x"',
        "[alerts] contacts.dba.emial",
        "an unknown key",
        "a known key (did you mean email?)",
    ),
    ("[1.0, 2.0]", "[1.0]", "[ai_providers] prices.m", "[1.0]", "at least 2 items"),
    (
        'contacts = ["dba"] }',
        'contacts = ["dba"], minuts = 5 }',
        "[alerts] path.0.minuts",
        "an unknown key",
        "a known key (did you mean minutes?)",
    ),
    ("unattended =", 'timezone = "Asia/Tokio"\nunattended =', "timezone", "“Asia/Tokio”", "Asia/Tokio is no time zone"),
]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIAL_PASSWORD", "x")
    monkeypatch.setenv("OPS_ENVIRONMENT", "trial")
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "trial.toml"))
    return tmp_path / "trial.toml"


@pytest.mark.parametrize(("old", "new", "key", "found", "expected"), MISTAKES, ids=[one[2] for one in MISTAKES])
def test_a_mistake_is_refused(path: Path, old: str, new: str, key: str, found: str, expected: str) -> None:
    assert TOML.count(old) == 1, old
    path.write_text(TOML)
    require_known_names(toml.environment("trial"))
    path.write_text(TOML.replace(old, new))
    with pytest.raises(OpsError) as error:
        require_known_names(toml.environment("trial"))
    assert str(error.value).startswith(f"trial.toml: {key} is wrong: found {found} — expected: {expected}")
    assert SECRET not in str(error.value)


def test_all_missing_secrets_are_in_one_message_and_come_from_a_file_too(path: Path) -> None:
    path.write_text(TOML.replace("TRIAL_PASSWORD", "TRIAL_ONE", 1).replace("TRIAL_PASSWORD", "TRIAL_TWO"))
    (line,) = examine("trial")
    for told in ("2 variables are not set", "TRIAL_ONE ([postgres] password_env)", "TRIAL_TWO ([postgres] admin_"):
        assert told in line.what
    file = path.with_suffix(".env")
    file.write_text(f"# of the shop\nTRIAL_ONE='{SECRET}'\nexport TRIAL_TWO=\n")
    file.chmod(0o640)
    with pytest.raises(OpsError, match="trial.env has the mode 0640: others can read the secrets in it — chmod 600"):
        toml.environment("trial")
    file.chmod(0o600)
    with pytest.raises(OpsError, match=r"1 variable is not set: TRIAL_TWO \("):
        toml.environment("trial")
    file.write_text(file.read_text().replace("TWO=", "TWO=''"))
    assert read_file(file) == {"TRIAL_ONE": SECRET, "TRIAL_TWO": ""}
    assert toml.environment("trial").postgres.password.get_secret_value() == SECRET
    assert "TRIAL_ONE" not in os.environ
