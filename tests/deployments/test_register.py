"""Registering an environment in a real Prefect server: once, twice, changed; and read back by a flow."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import BlockDocument
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from pydantic.json_schema import GenerateJsonSchema

from blocks.environment import Environment
from deployments import automations, register
from deployments.triggers import deaths
from deployments.triggers.launch import launch
from lab.processes import exclusive
from lab.state.base import base_directory
from runbook.errors import OpsError
from runbook.guard.lease import limit_name
from tests.fixtures.prefect_client import login

PAGE = 200  # the most that Prefect gives at once
SECRET = "r3gister/p@ss word"
TOML = """
name = "{name}"
disposable = true
reports = "{reports}"
[objectives]
rpo = "1h"
rto = "4h"
[thresholds]
"backup.age_seconds" = [3600, 86400]
[postgres]
port = {port}
database = "grc_db"
user = "grc_user"
password_env = "OPS_TEST_PASSWORD"
admin_password_env = "OPS_TEST_PASSWORD"
[services]
kind = "supervisor"
names = {{ backend = "grc-backend" }}
password_env = "OPS_TEST_PASSWORD"
[backups]
"""


@pytest.fixture
def alone(prefect_server: str) -> Iterator[None]:
    """No lab registers anything meanwhile: Prefect's own registration of block types races, and so would ours."""
    with exclusive(base_directory() / ".deploy.lock"):
        yield


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None) -> str:
    """An environment of a name that no other test has, described by a file."""
    chosen = f"t{uuid.uuid4().hex[:12]}"
    monkeypatch.setenv("OPS_ENVIRONMENT", chosen)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "environment.toml"))
    monkeypatch.setenv("OPS_TEST_PASSWORD", SECRET)
    describe(tmp_path, chosen)
    return chosen


def describe(directory: Path, name: str, port: int = 5432) -> None:
    text = TOML.format(name=name, reports=directory / "reports", port=port)
    (directory / "environment.toml").write_text(text)


def documents(name: str, *, secrets: bool = False) -> dict[str, dict[str, object]]:
    """The block documents of an environment, by type."""
    found: list[BlockDocument] = []
    with get_client(sync_client=True) as client:
        while page := client.read_block_documents(include_secrets=secrets, limit=PAGE, offset=len(found)):
            found += page
    return {document.block_type.slug: dict(document.data) for document in found if document.name == name}  # type: ignore[union-attr]


@flow(name="reading-rights")
def read_rights(environment: str) -> tuple[bool, list[str]]:
    """What a flow run takes for disposable and unattended."""
    found = Environment.find(environment)
    return found.disposable, found.unattended


def test_what_may_run_unattended_is_the_reviewed_file_s_not_the_block_s(name: str, tmp_path: Path) -> None:
    register.register(name)
    assert read_rights(name) == (True, [])
    block = cast(Environment, Environment.load(name))
    block.model_copy(update={"unattended": ["prune-backups"]}).save(name, overwrite=True)
    assert read_rights(name) == (True, []), "edited in the UI"
    path = tmp_path / "environment.toml"
    path.write_text('unattended = ["prune-backups"]\n' + path.read_text())
    assert read_rights(name) == (False, []), "reviewed and not registered: nothing until both agree"
    register.register(name)
    assert read_rights(name) == (True, ["prune-backups"])
    path.unlink()
    assert read_rights(name) == (False, []), "a host without the file"


@flow(name="reading")
def read(environment: str) -> tuple[int, str, str, tuple[float, float], list[str]]:
    """What a flow run gets of an environment, from Prefect alone."""
    found = Environment.find(environment)
    return (
        found.postgres.port,
        found.postgres.password.get_secret_value(),
        found.services.names["backend"],
        found.limits["backup.age_seconds"],
        sorted(found.slugs),
    )


def test_what_is_registered_is_what_a_flow_run_reads(name: str, tmp_path: Path) -> None:
    lines = register.register(name)
    assert f"block ops-environment/{name}" in lines
    assert f"lock env-{name}" in lines
    parts = ["backups", "postgres", "services"]
    assert read(name) == (5432, SECRET, "grc-backend", (3600, 86400), parts)
    describe(tmp_path, name, port=5433)
    assert read(name)[0] == 5432, "a flow run reads blocks, not the file"
    assert register.register(name) == lines
    assert read(name)[:2] == (5433, SECRET)
    assert set(documents(name)) == {"ops-environment", "ops-postgresql", "ops-supervisor", "ops-backups"}


def test_a_wrong_suite_is_refused_before_anything_is_registered(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "environment.toml"
    path.write_text(path.read_text() + '[expectations]\ndirectory = "rules"\n')
    (tmp_path / "rules").mkdir()
    suite = tmp_path / "rules" / "users.json"
    suite.write_text('[{"type": "expect_the_best", "kwargs": {}}]')
    monkeypatch.setattr("sys.argv", ["register", name])
    assert register.main() == 1
    assert f"{suite}: entry 1 has the unknown type “expect_the_best” — expected: a type of" in capsys.readouterr().err
    assert documents(name) == {}
    suite.write_text('[{"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "id"}}]')
    describe(tmp_path, name, port=1)
    path.write_text(path.read_text() + '[expectations]\ndirectory = "rules"\n')
    assert register.main() == 0
    assert "1 suites of expectations; could not check them against the database" in capsys.readouterr().out


def test_no_password_is_shown(name: str) -> None:
    register.register(name)
    assert SECRET not in json.dumps(documents(name), default=str)
    assert SECRET in json.dumps(documents(name, secrets=True), default=str), "only whoever asks for it gets it"


def test_the_lock_has_one_slot_and_registering_again_leaves_it_alone(name: str) -> None:
    register.register(name)
    with get_client(sync_client=True) as client:
        limit = client.read_global_concurrency_limit_by_name(limit_name(name))
        assert (limit.limit, limit.active_slots) == (1, 0)
        register.register(name)
        assert client.read_global_concurrency_limit_by_name(limit_name(name)).id == limit.id


def test_the_zombie_automation_is_there_once(prefect_server: str, alone: None) -> None:
    for _ in range(2):
        assert automations.register("lab", causes=[deaths.automations]) == ["zombie-runs"]
    with get_client(sync_client=True) as client:
        (found,) = client.read_automations_by_name("zombie-runs")
    assert found.enabled
    body = httpx.post(f"{prefect_server}/automations/filter", json={}, auth=login(), timeout=120).json()
    (kept,) = [one for one in body if one["name"] == "zombie-runs"]
    assert kept["trigger"]["posture"] == "Proactive"
    assert kept["trigger"]["within"] == deaths.ZOMBIE_SECONDS
    assert kept["trigger"]["for_each"] == ["prefect.resource.id"]
    assert set(kept["trigger"]["expect"]) == {deaths.HEARTBEAT, *deaths.ENDED}
    assert kept["actions"][0]["state"] == "CRASHED"


def rehearsal(client: SyncPrefectClient, environment: str) -> list[AutomationCore]:
    """An automation that starts a deployment of this test's own."""
    return [
        AutomationCore(
            name=f"rehearsal-{environment}",
            trigger=EventTrigger(expect={"ops.rehearsal"}, posture=Posture.Reactive, threshold=1),
            actions=[launch(client, environment, "rehearsed", {})],
        )
    ]


@flow
def rehearsed(environment: str) -> None:
    """Started by nobody."""


def test_what_is_registered_is_listed_stays_off_and_can_be_removed(prefect_server: str, name: str) -> None:
    with pytest.raises(OpsError, match=f"rehearsed is not deployed for {name}"):
        automations.register(name, causes=[rehearsal])
    with get_client(sync_client=True) as client:
        client.create_deployment(client.create_flow(rehearsed), name)
    own = f"rehearsal-{name}"
    states = list[bool]()
    with get_client(sync_client=True) as client:
        for paused in (True, True, False, False):
            automations.register(name, paused=paused, causes=[rehearsal])
            states.append(client.read_automations_by_name(own)[0].enabled)
            if len(states) == 3:
                (found,) = client.read_automations_by_name(own)
                httpx.patch(
                    f"{prefect_server}/automations/{found.id}", json={"enabled": False}, auth=login(), timeout=120
                )
    assert states == [False, False, True, False], "what was registered paused begins; who switched it off wants it off"
    assert own in automations.remove(name)
    assert automations.remove(name) == []
    automations.register(name, causes=[rehearsal])
    with get_client(sync_client=True) as client:
        (found,) = client.read_automations_by_name(own)
        assert found.enabled
        client.delete_automation(found.id)


def other_rehearsal(client: SyncPrefectClient, environment: str) -> list[AutomationCore]:
    """The same in a version that calls it otherwise, and what is of all environments."""
    (automation,) = rehearsal(client, environment)
    return [
        automation.model_copy(update={"name": f"trial-{environment}"}),
        automation.model_copy(update={"name": SHARED}),
    ]


SHARED = f"shared-{uuid.uuid4().hex}"


def there(server: str, part: str) -> dict[str, str]:
    """Automations that Prefect has, by name, and the ids of their triggers: it counts and waits for each of those."""
    address, wanted = f"{server}/automations/filter", {"limit": 200}
    body = httpx.post(address, json=wanted, auth=login(), timeout=120).raise_for_status().json()
    return {one["name"]: one["trigger"]["id"] for one in body if part in one["name"]}


def test_registered_again_nothing_is_forgotten_nothing_is_twice_and_nothing_is_left(
    prefect_server: str, name: str
) -> None:
    other = f"x-{name}"
    with get_client(sync_client=True) as client:
        deployments = [client.create_deployment(client.create_flow(rehearsed), one) for one in (name, other)]
    for one in (name, other):
        automations.register(one, causes=[rehearsal])
    before = there(prefect_server, name)
    automations.register(name, causes=[rehearsal])
    assert there(prefect_server, name) == before, "what did not change counts on: once an hour is once an hour"
    with get_client(sync_client=True) as client:
        (again,) = automations.wanted(client, name, [rehearsal])
        client.create_automation(again)  # by two that registered at once
        automations.register(name, causes=[rehearsal])
        (kept,) = client.read_automations_by_name(f"rehearsal-{name}")
        (again,) = automations.wanted(client, name, [rehearsal])
        client.update_automation(kept.id, again.model_copy(update={"description": "edited"}))
    automations.register(name, causes=[other_rehearsal])
    assert set(there(prefect_server, name)) == {f"trial-{name}", f"rehearsal-{other}"}
    with get_client(sync_client=True) as client:
        for deployment in deployments:
            client.delete_deployment(deployment)
    assert automations.remove(name) == [f"trial-{name}"], "though its flows are gone; what others need stays"
    assert there(prefect_server, SHARED)
    assert f"rehearsal-{other}" in automations.remove(other)
    assert there(prefect_server, name) == {}
    with get_client(sync_client=True) as client:
        for found in client.read_automations_by_name(SHARED):
            client.delete_automation(found.id)


@pytest.mark.parametrize("environment", ["", "nowhere"])
def test_the_command_line_says_what_is_wrong(
    environment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["register", environment])
    assert register.main() == 1
    assert f"there is no environment “{environment}” — choose one of" in capsys.readouterr().err


def test_an_environment_that_was_not_registered(prefect_server: str) -> None:
    with pytest.raises(OpsError, match="there is no environment “not-registered”"):
        read("not-registered")


def test_a_schema_is_generated_once_while_blocks_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, generated, generate = Environment.model_json_schema(), list[object](), GenerateJsonSchema.generate

    def counted(own: GenerateJsonSchema, *given: Any, **named: Any) -> dict[str, Any]:
        generated.append(given)
        return generate(own, *given, **named)

    monkeypatch.setattr(GenerateJsonSchema, "generate", counted)
    with register.schemas_kept():
        Environment.model_json_schema().clear()
        assert [Environment.model_json_schema() for _ in range(3)] == [plain] * 3
        assert len(generated) == 1
    Environment.model_json_schema()
    assert len(generated) == 2
