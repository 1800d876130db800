"""Environments as TOML: what is shipped loads and says what the manual says; what is wrong is told in one message."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
from prefect import flow

from blocks.config import toml
from blocks.environment import START_ORDER, STOP_ORDER, Environment
from blocks.services.supervisor import SupervisorServices
from blocks.services.systemd import SystemdServices
from runbook.errors import OpsError
from runbook.metrics import default_limits
from runbook.target import Target
from tasks.gx.suites import read_suites

SHIPPED = ["production", "staging", "development", "lab", "lab-dr"]
LAB = ("lab", "lab-dr")
HOUR, DAY = 3600, 86400

TOML = """
name = "trial"
title = "試験 ${OPS_TEST_TITLE}"
[objectives]
rpo = "90m"
rto = "2d"
[thresholds]
"backup.age_seconds" = [3600, 86400]
[postgres]
host = "db-${OPS_TEST_NUMBER}.example.com"
port = "${OPS_TEST_NUMBER}"
database = "grc_db"
user = "grc_user"
password_env = "OPS_TEST_PASSWORD"
admin_password_env = "OPS_TEST_ADMIN_PASSWORD"
[redis]
sentinels = ["${OPS_TEST_TITLE}:26379"]
[services]
kind = "supervisor"
names = { backend = "grc-${OPS_TEST_NUMBER}" }
"""
VARIABLES = {
    "OPS_TEST_TITLE": "一",
    "OPS_TEST_NUMBER": "5433",
    "OPS_TEST_PASSWORD": "p@ss ${HOME} word",
    "OPS_TEST_ADMIN_PASSWORD": "admin",
}


@dataclasses.dataclass(frozen=True)
class File:
    """An environment's file, changed and read."""

    path: Path

    def read(self, old: str = "", new: str = "") -> Environment:
        assert old in TOML
        self.path.write_text(TOML.replace(old, new) if old else TOML + new, encoding="utf-8")
        return toml.read(self.path)

    def wrong(self, old: str = "", new: str = "") -> str:
        with pytest.raises(OpsError) as error:
            self.read(old, new)
        text = str(error.value)
        assert text.startswith("trial.toml: "), "the file is named"
        assert "\n" not in text
        return text.removeprefix("trial.toml: ")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> File:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    return File(tmp_path / "trial.toml")


def secrets_of(content: Mapping[str, object]) -> list[str]:
    """The variables that a TOML names for its secrets."""
    found = [str(value) for key, value in content.items() if key.endswith("_env")]
    tables = [value for value in content.values() if isinstance(value, dict)]
    return found + [name for table in tables for name in secrets_of(table)]


def shipped(name: str, monkeypatch: pytest.MonkeyPatch) -> Environment:
    path = toml.DIRECTORY / f"{name}.toml"
    for variable in secrets_of(tomllib.loads(path.read_text(encoding="utf-8"))):
        monkeypatch.setenv(variable, f"secret of {variable}")
    if name not in LAB:  # the lab's files are the tests' own: tests/conftest.py sets what they need
        monkeypatch.delenv("OPS_ENVIRONMENT_FILE")
        return toml.environment(name)
    return toml.read(path)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shipped_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = shipped(name, monkeypatch)
    target: Target = found
    assert target.name == (name if name not in LAB else os.environ[f"OPS_{name.upper().replace('-', '_')}_NAME"])
    assert set(found.parts()) == set(found.slugs)
    assert {"postgres", "redis", "services", "backups", "application", "logs"} <= set(found.parts())
    assert found.postgres.password.get_secret_value() == "secret of OPS_POSTGRES_PASSWORD"
    assert found.slugs["postgres"] == f"ops-postgresql/{found.name}"
    assert found.limits["backup.age_seconds"][0] >= found.rpo_seconds, "older than the RPO is a warning"
    assert all(warn <= critical for warn, critical in found.limits.values())
    assert found.services_in(START_ORDER) == list(START_ORDER)
    assert found.services_in(STOP_ORDER) == list(STOP_ORDER)
    deleting = ["prune-backups", "discard-superseded"]
    assert found.unattended == (deleting if name in LAB else ["renew-certificates", *deleting]), "reviewed here, in git"
    assert str(found.zone) == "Asia/Tokyo"


def test_every_shipped_file_is_in_this_test() -> None:
    assert sorted(path.stem for path in toml.DIRECTORY.glob("*.toml")) == sorted(SHIPPED)


# The manual, §8.1: サービスレベル, RPO（目標復旧時点）, RTO（目標復旧時間）.
@pytest.mark.parametrize(
    ("name", "rpo", "rto", "title"),
    [
        ("production", 1 * HOUR, 4 * HOUR, "本番環境"),
        ("staging", 24 * HOUR, 8 * HOUR, "ステージング環境"),
        ("development", 7 * DAY, 24 * HOUR, "開発環境"),
    ],
)
def test_objectives_are_the_manual_s(
    name: str, rpo: float, rto: float, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shipped(name, monkeypatch)
    assert (found.rpo_seconds, found.rto_seconds) == (rpo, rto)
    assert (found.title, found.tier) == (title, name)
    assert found.disposable is (name == "development"), "faults are for what may be thrown away"


def test_production_has_the_manual_s_names_and_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shipped("production", monkeypatch)
    assert (found.postgres.host, found.postgres.port) == ("localhost", 5432)
    assert (found.postgres.database, found.postgres.user) == ("grc_db", "grc_user")
    assert found.backups.postgres == "/var/backups/postgresql"
    assert found.application.directory == "/opt/grc"
    assert found.application.backend_directory == "/opt/grc/backend"
    assert {Path(found.logs.app).parent, Path(found.logs.audit).parent} == {Path("/var/log/grc")}
    assert (found.redis.sentinels, found.redis.sentinel_master) == (["localhost:26379"], "mymaster")
    assert isinstance(found.services, SystemdServices)
    assert found.services.names["backend"] == "grc-backend"
    assert found.services.names["frontend"] == "grc-frontend"
    assert found.certificates.web_server == "nginx"
    assert found.certificates.directory == "/etc/letsencrypt/live"


@pytest.mark.parametrize("name", ["production", "staging", "development"])
def test_a_missing_secret_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped(name, monkeypatch)
    for variable in secrets_of(tomllib.loads((toml.DIRECTORY / f"{name}.toml").read_text(encoding="utf-8"))):
        with monkeypatch.context() as without:
            without.delenv(variable)
            with pytest.raises(OpsError, match=rf"^{name}.toml: 1 variable is not set: {variable} \(\[\w+\]"):
                toml.environment(name)


def test_variables_are_expanded_everywhere_and_secrets_are_taken_as_they_are(file: File) -> None:
    found = file.read()
    assert found.title == "試験 一"
    assert (found.postgres.host, found.postgres.port) == ("db-5433.example.com", 5433)
    assert found.redis.sentinels == ["一:26379"]
    assert found.services.names == {"backend": "grc-5433"}
    assert found.postgres.password.get_secret_value() == "p@ss ${HOME} word"
    assert isinstance(found.services, SupervisorServices)
    assert (found.rpo_seconds, found.rto_seconds) == (90 * 60, 2 * DAY)
    assert found.limits == {**default_limits(90 * 60), "backup.age_seconds": (3600, 86400)}


def test_a_star_in_a_protected_prefix_is_written_as_a_byte(file: File) -> None:
    found = file.read("[services]", 'protected_prefixes = ["job\\\\x2a:"]\n[services]')
    assert found.redis.protected_prefixes == [r"job\x2a:"]


def test_a_standby_is_a_server_of_its_own_and_optional(file: File) -> None:
    primary = file.read()
    assert not primary.has("standby")
    with pytest.raises(OpsError, match=r"environment trial names no standby — add \[standby\] to its TOML"):
        _ = primary.standby
    login = 'database = "grc_db"\nuser = "grc_user"\npassword_env = "OPS_TEST_PASSWORD"\n'
    section = f'[standby]\nhost = "standby.example.com"\n{login}admin_password_env = "OPS_TEST_ADMIN_PASSWORD"\n'
    found = file.read(new=section)
    assert found.has("standby")
    assert (found.standby.host, found.postgres.host) == ("standby.example.com", "db-5433.example.com")
    assert found.slugs["standby"] == "ops-postgresql/trial-standby", "registered, it must not replace the primary's"
    assert found.slugs["postgres"] == "ops-postgresql/trial"
    assert file.wrong(new=section.replace("host", "hots")).startswith(
        "[standby] hots is wrong: found an unknown key — expected: a known key"
    )


def test_a_standby_is_started_as_a_service_of_its_own(file: File) -> None:
    login = 'database = "grc_db"\nuser = "grc_user"\npassword_env = "OPS_TEST_PASSWORD"\n'
    section = f'[standby]\n{login}admin_password_env = "OPS_TEST_ADMIN_PASSWORD"\n'
    assert [node.service for node in file.read(new=section).nodes()] == ["postgres", "standby"]
    assert [node.service for node in file.read(new=f'{section}service = "second"\n').nodes()] == ["postgres", "second"]


def test_the_way_of_the_wal_and_the_endpoint(file: File) -> None:
    found = file.read()
    assert not found.has("wal")
    with pytest.raises(OpsError, match=r"environment trial names no wal — add \[wal\] to its TOML"):
        _ = found.wal
    found = file.read(new='[wal]\nstanza = "${OPS_TEST_TITLE}"\n[endpoint]\nfile = "/etc/proxy/endpoint"\n')
    assert (found.wal.method, found.wal.slot, found.wal.name, found.wal.service) == (
        *("receivewal", "wal_archive", "receiver", "receiver"),
    )
    assert (found.wal.tool, found.wal.stanza, found.wal.config) == ("native", "一", "")
    assert found.slugs["wal"] == "ops-wal/trial"
    assert (found.endpoint.file, found.endpoint.region) == ("/etc/proxy/endpoint", "")
    assert file.wrong(new='[wal]\nmethod = "copy"').startswith(
        "[wal] method is wrong: found “copy” — expected: 'receivewal' or"
    )
    assert file.wrong(new="[endpoint]").startswith(
        "[endpoint] file is wrong: found nothing — expected: a value: one line"
    )


def test_the_lab_and_its_second_region_have_the_copies_and_the_endpoint_in_common(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab, region = shipped("lab", monkeypatch), shipped("lab-dr", monkeypatch)
    places = ("postgres", "redis", "files", "cluster", "wal")
    for here, there in ((lab, region), (region, lab)):  # the way back is the same way
        assert [getattr(here.stores("copies"), name) for name in places] == [
            getattr(there.backups, name) for name in places
        ]
        assert here.endpoint.other == there.name
    assert lab.endpoint.file == region.endpoint.file
    own = [found.model_dump() for found in (*lab.nodes(), *region.nodes(), lab.redis, region.redis)]
    assert len({found["port"] for found in own}) == len({found["data_directory"] for found in own}) == 6
    assert lab.wal.directory != region.wal.directory
    assert lab.application.url != region.application.url
    assert lab.application.env_file == f"{lab.application.backend_directory}/.env"
    assert not region.application.env_file.startswith(region.application.directory), "no backup of files overwrites it"


def test_the_other_region_is_found_by_its_name_too(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    file.read()
    monkeypatch.setenv("OPS_ENVIRONMENT", "another")
    monkeypatch.setenv("OPS_OTHER_REGION", "trial")
    monkeypatch.setenv("OPS_OTHER_REGION_FILE", str(file.path))
    assert toml.environment("trial").name == "trial"
    monkeypatch.delenv("OPS_OTHER_REGION")
    with pytest.raises(OpsError, match="there is no environment “trial”"):
        toml.environment("trial")


def test_a_secret_is_in_no_text_of_a_block(file: File) -> None:
    found = file.read()
    assert VARIABLES["OPS_TEST_PASSWORD"] not in f"{found!r} {found.postgres!r} {found.postgres.model_dump_json()}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'database = "grc_db"',
            'databse = "grc_db"',
            "[postgres] databse is wrong: found an unknown key — expected: a known key (did you mean database?)",
        ),
        (
            "[postgres]",
            "[postgress]",
            "postgress is wrong: found an unknown key — expected: a known key (did you mean postgres?)",
        ),
        (
            "[services]",
            "[service]",
            "service is wrong: found an unknown key — expected: a known key (did you mean services?)",
        ),
        ("title =", "titel =", "titel is wrong: found an unknown key — expected: a known key (did you mean title?)"),
        ("title =", "qqqq =", "qqqq is wrong: found an unknown key — expected: a known key"),
        (
            "password_env",
            "pasword_env",
            "[postgres] pasword_env is wrong: found an unknown key — expected: a known key (did you mean password_env?)",
        ),
        (
            'user = "grc_user"',
            "",
            "[postgres] user is wrong: found nothing — expected: a value: the application's role",
        ),
        (
            '"${OPS_TEST_NUMBER}"',
            '"no number"',
            "[postgres] port is wrong: found “no number” — expected: a valid integer",
        ),
        (
            '"${OPS_TEST_NUMBER}"',
            "70000",
            "[postgres] port is wrong: found 70000 — expected: less than or equal to 65535",
        ),
        (
            "[3600, 86400]",
            "[3600]",
            "thresholds.backup.age_seconds is wrong: found [3600] — expected: at least 2 items",
        ),
        ("[3600, 86400]", '["a", 1]', "thresholds.backup.age_seconds.0 is wrong: found “a” — expected: a valid number"),
        (
            'rpo = "90m"',
            'rpo = "soon"',
            "[objectives] rpo is wrong: found “soon” — expected: a duration above 0, as 30m, 1h or 7d",
        ),
        ('rpo = "90m"', "rpo = 90", "[objectives] rpo is wrong: found 90 — expected: a duration"),
        ('rpo = "90m"', "", "[objectives] rpo is wrong: found nothing — expected: a duration"),
        ('rpo = "90m"', 'rpo = "0h"', "[objectives] rpo is wrong: found “0h” — expected: a duration above 0"),
        (
            'kind = "supervisor"',
            'kind = "podman"',
            "[services] kind is wrong: found “podman” — expected: one of supervisor, systemd, docker",
        ),
        (
            'kind = "supervisor"',
            "kind = []",
            "[services] kind is wrong: found [] — expected: one of supervisor, systemd",
        ),
        ('"trial"', '"../x"', "name is wrong: found “../x” — expected: a lower-case letter, then"),
        ('"trial"', '"本番"', "name is wrong: found “本番” — expected: a lower-case letter, then"),
        (
            'name = "trial"',
            'name = "trial"\nlogs = "/var/log"',
            "logs is wrong: found “/var/log” — expected: a table: [logs]",
        ),
        (
            'name = "trial"',
            'name = "trial"\ntimezone = "Asia/Tokio"',
            "timezone is wrong: found “Asia/Tokio” — expected: Asia/Tokio is no",
        ),
        (
            "[services]",
            'protected_prefixes = ["session:*"]\n[services]',
            "[redis] protected_prefixes is wrong: found ['session:*'] — expected: “session:*” protects nothing: write what",
        ),
        (
            "[services]",
            'protected_prefixes = ["queue:", ""]\n[services]',
            "[redis] protected_prefixes is wrong: found ['queue:', ''] — expected: “” protects nothing",
        ),
        (
            "${OPS_TEST_TITLE}:26379",
            "${OPS_NOWHERE}:26379",
            "1 variable is not set: OPS_NOWHERE ([redis] sentinels) — set them in this shell, or",
        ),
        (
            "grc-${OPS_TEST_NUMBER}",
            "${OPS_NOWHERE}",
            "1 variable is not set: OPS_NOWHERE ([services] names.backend) — set",
        ),
        ('"OPS_TEST_PASSWORD"', '"OPS_NOWHERE"', "1 variable is not set: OPS_NOWHERE ([postgres] password_env) — set"),
        (
            '"OPS_TEST_PASSWORD"',
            "3",
            "[postgres] password_env is wrong: found something else (not shown) — expected: the name of an environment variable",
        ),
        (
            '"backup.age_seconds"',
            '"backup.age_second"',
            "thresholds is wrong: found {'backup.age_second': [3600, 86400]} — expected: backup.age_second is not a metric (did you mean backup.age_seconds?)",
        ),
        (
            "[3600, 86400]",
            "[3600, 60]",
            "thresholds is wrong: found {'backup.age_seconds': [3600, 60]} — expected: backup.age_seconds = [3600, 60] warns above its critical limit",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_key_and_what_is_expected(file: File, old: str, new: str, message: str) -> None:
    assert file.wrong(old, new).startswith(message)


@pytest.mark.parametrize("section", ["services", "objectives"])
def test_a_section_that_is_no_table(file: File, section: str) -> None:
    old = TOML[TOML.index(f"[{section}]") :].split("\n[", 1)[0]
    file.path.write_text(f'{section} = "x"\n' + TOML.replace(old, ""))
    with pytest.raises(
        OpsError, match=rf"^trial.toml: {section} is wrong: found “x” — expected: a table: \[{section}\]"
    ):
        toml.read(file.path)


def test_expectations_are_next_to_the_file_and_none_by_default(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the checkout they are named from its root: a worker's checkout may be elsewhere."""
    assert file.read().suites is None
    section = '\n[expectations]\ndirectory = "rules/${OPS_TEST_NUMBER}"\n'
    assert file.read(new=section).suites == file.path.parent / "rules" / "5433"
    for name in SHIPPED:
        monkeypatch.setenv("OPS_ENVIRONMENT_FILE", "")
        env = shipped(name, monkeypatch)
        assert env.expectations == "deployments/environments/expectations/interview"
        assert read_suites(env.suites or Path()), "shared by all of the interview system"
    unknown, number = (
        file.wrong(new='\n[expectations]\ndirectroy = "x"\n'),
        file.wrong(new="\n[expectations]\ndirectory = 3\n"),
    )
    assert unknown.startswith("[expectations] directroy is wrong: found an unknown key — expected: a known key")
    assert number.startswith("[expectations] directory is wrong: found 3 — expected: the path of a")


def test_a_secret_that_was_written_into_the_file_is_not_repeated(file: File) -> None:
    assert "hunter2" not in file.wrong('"OPS_TEST_PASSWORD"', '"hunter2!"')


@pytest.mark.parametrize("content", [b"name = ", b'title = "\x96\x7b\x94\xd4"', b"\x00"])
def test_what_is_no_toml_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(OpsError, match="^broken.toml cannot be read: .* — correct the file$"):
        toml.read(path)


def test_a_missing_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_ENVIRONMENT", "trial")
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "nowhere.toml"))
    with pytest.raises(OpsError, match=r"nowhere.toml cannot be read"):
        toml.environment("trial")


def test_a_file_of_another_environment_is_refused(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    file.read()
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(file.path))
    monkeypatch.setenv("OPS_ENVIRONMENT", "production")
    with pytest.raises(OpsError, match="describes the environment trial, not production — correct its key name"):
        toml.environment("production")


def test_the_file_of_one_environment_is_not_read_for_another(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    file.read()
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(file.path))
    monkeypatch.setenv("OPS_ENVIRONMENT", "trial")
    assert toml.file_of("trial") == file.path
    assert toml.file_of("staging").name == "staging.toml"


HOSTILE = [
    "",
    "nowhere",
    "../x",
    "production/../staging",
    "Production",
    "production\n",
    "'; DROP TABLE x",
    '"',
    "x" * 200,
    "本番環境",
    ".",
    "-x",
    "a b",
    "a\x00b",
    "%2e%2e",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_an_unknown_environment_lists_the_known_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_ENVIRONMENT", "trial")
    monkeypatch.setenv("OPS_OTHER_REGION", "trial-osaka")
    with pytest.raises(OpsError) as error:
        Environment.find(name)
    assert error.value.message == f"there is no environment “{name[:60]}”"
    known = "development, lab, lab-dr, production, staging, trial, trial-osaka"
    assert error.value.hint == f"choose one of {known}, or register it"


@pytest.mark.parametrize("name", ["../x", "x" * 200])
def test_a_name_is_checked_before_any_file_is_looked_for(
    name: str, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPS_ENVIRONMENT", name)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(file.path))
    with pytest.raises(OpsError, match="there is no environment"):
        toml.environment(name)


def test_in_a_flow_run_too(prefect_server: str) -> None:
    @flow(name="hostile-names")
    def find_them() -> list[str]:
        messages = []
        for name in HOSTILE:
            with pytest.raises(OpsError) as error:
                Environment.find(name)
            messages.append(error.value.message)
        return messages

    assert find_them() == [f"there is no environment “{name[:60]}”" for name in HOSTILE]


def test_a_part_that_is_not_named_says_where_to_add_it(file: File) -> None:
    found = file.read()
    assert found.has("redis")
    assert not found.has("certificates")
    with pytest.raises(OpsError, match=r"environment trial names no certificates — add \[certificates\] to its TOML"):
        _ = found.certificates
