"""build_images and deploy_application on a real engine, with a real registry."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import httpx
import pytest

from blocks.docker import Docker
from flows.infrastructure.images import building
from flows.infrastructure.images import containers as container_way
from flows.infrastructure.images.building import build_images
from flows.infrastructure.images.deployment import deploy_application
from runbook.errors import RunbookFailed
from runbook.guard.pins import PlanChanged
from runbook.kinds import action
from runbook.report import Report, Status
from tasks.docker import deploying
from tasks.docker.building import push_image
from tasks.docker.deployed import read_log
from tasks.docker.deploying import WantedContainer, pull_images, swap_containers
from tests.fixtures.engine import BASE, NAME, Engine
from tests.fixtures.servers import free_port

pytestmark = pytest.mark.system

DOCKERFILE = """FROM {base}
STOPSIGNAL SIGKILL
COPY www /www
COPY start /start
CMD ["sh", "/start"]
"""
MORE = """
registry = "{registry}"
checkout = "{checkout}"
[docker.containers.backend]
image = "{prefix}-backend"
name = "{prefix}-backend"
dockerfile = "apps/backend/Dockerfile"
context = "apps/backend"
network = "host"
env_file = "{checkout}.env"
memory = "64m"
reservation = "32m"
[application]
url = "http://127.0.0.1:{port}"
health_path = "/health"
"""


class Trial:
    """A checkout with a backend, which serves what is in its `www` on a port of the test's own."""

    def __init__(self, engine: Engine, registry: str, directory: Path) -> None:
        self.engine, self.directory, self.port = engine, directory / "checkout", free_port()
        self.repository = f"{registry}/{engine.prefix}-backend"
        self.name = f"{engine.prefix}-backend"
        self.backend = self.directory / "apps" / "backend"
        (self.backend / "www").mkdir(parents=True)
        (self.backend / "Dockerfile").write_text(DOCKERFILE.format(base=BASE))
        (self.backend / "www" / "health").write_text("ok")
        (self.backend / "start").write_text("exec httpd -f -p 127.0.0.1:$PORT -h /www")
        Path(f"{self.directory}.env").write_text(f"# for the backend\nPORT={self.port}\n")
        self.git("init", "--quiet")
        self.git("remote", "add", "origin", "https://user:secret-token@git.example.com/grc.git")
        self.toml = MORE.format(registry=registry, checkout=self.directory, prefix=engine.prefix, port=self.port)

    def git(self, *words: str) -> str:
        argv = ["git", "-c", "user.name=test", "-c", "user.email=test@example.com", *words]
        return subprocess.run(argv, cwd=self.directory, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, **files: str) -> str:
        for name, text in files.items():
            (self.backend / "www" / name).write_text(text)
        self.git("add", ".")
        self.git("commit", "--quiet", "--allow-empty", "-m", "a change")
        return self.git("rev-parse", "HEAD")

    def serves(self) -> str:
        return httpx.get(f"http://127.0.0.1:{self.port}/version", trust_env=False).text

    def containers(self) -> list[str]:
        found = self.engine.client.containers.list(all=True)
        return sorted(one.name for one in found if one.name.startswith(self.engine.prefix))


@pytest.fixture
def trial(
    engine: Engine, registry: str, environment: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Trial:
    monkeypatch.setattr(container_way, "STEADY", 2)  # half a second
    made = Trial(engine, registry, tmp_path)
    environment(made.toml)
    return made


def release(trial: Trial, version: str, **files: str) -> Report:
    trial.commit(version=version, **files)
    report = build_images.fn(NAME, version, push=True, confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    return report


def test_images_are_built_labelled_and_pushed(trial: Trial) -> None:
    revision = trial.commit(version="v1")
    plan = build_images.fn(NAME, "v1", push=True)
    assert plan.status is Status.PLANNED
    assert [step.step for step in plan.plan_steps] == ["build", "push", "push"]
    assert not trial.engine.client.images.list(trial.repository)
    report = build_images.fn(NAME, "v1", push=True, confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    image = trial.engine.client.images.get(f"{trial.repository}:v1")
    assert set(image.tags) == {f"{trial.repository}:v1", f"{trial.repository}:{revision[:12]}"}
    labels = {key.rpartition(".")[2]: value for key, value in image.labels.items()}
    assert labels.pop("created") > "2026"
    assert labels == {"revision": revision, "version": "v1", "source": "https://git.example.com/grc.git"}
    (table,) = [one for one in report.evidence if one.name == "In the registry"]
    assert {row[0] for row in table.rows} == set(image.tags)
    assert all(row[1].startswith("sha256:") for row in table.rows)
    (table,) = [one for one in report.evidence if one.name == "Built from"]
    assert list(map(tuple, table.rows)) == [(BASE, "not known: the tag is not pinned")]
    (trial.backend / "www" / "version").write_text("v1, and more")
    with pytest.raises(RunbookFailed, match="choose another version"):
        build_images.fn(NAME, "v1")
    trial.commit(version="v1 again")
    with pytest.raises(RunbookFailed, match="choose another version"):
        build_images.fn(NAME, "v1")
    for tag in image.tags:
        trial.engine.client.images.remove(tag)
    with pytest.raises(RunbookFailed, match="v1 in the registry: sha256"):
        build_images.fn(NAME, "v1", push=True, confirm=NAME)
    (trial.backend / "www" / "version").write_text("nobody committed this")
    with pytest.raises(RunbookFailed, match="apps/backend/www/version"):
        build_images.fn(NAME, "v2", push=True, confirm=NAME)
    report = build_images.fn(NAME, "v2")
    assert report.status is Status.WARN
    assert "-dirty" in report.outcome
    labels = trial.engine.client.images.get(f"{trial.repository}:v2").labels
    assert labels["org.opencontainers.image.revision"].endswith("-dirty")
    (trial.backend / "Dockerfile").write_text(f"FROM {BASE}\nCOPY nothing /nowhere\n")
    with pytest.raises(RunbookFailed, match="backend does not build: .*nothing.* its last lines: .*Step 2/"):
        build_images.fn(NAME, "v3")


def test_a_push_that_broke_off_is_launched_again(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    @action(of=push_image.of)
    def killed(block: Docker, reference: str) -> str:
        push_image.work(block, reference)
        raise Killed

    trial.commit(version="v1")
    monkeypatch.setattr(building, "push_image", killed)
    with pytest.raises(Killed):
        build_images.fn(NAME, "v1", push=True, confirm=NAME)
    monkeypatch.setattr(building, "push_image", push_image)
    before = trial.engine.client.images.get(f"{trial.repository}:v1").id
    plan = build_images.fn(NAME, "v1", push=True)
    assert [step.step for step in plan.plan_steps] == ["push", "push"], "a second build would have another content"
    report = build_images.fn(NAME, "v1", push=True, confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    assert trial.engine.client.images.get(f"{trial.repository}:v1").id == before, "others may have pulled it"


def test_a_version_is_deployed_and_one_that_is_not_healthy_is_taken_back(
    trial: Trial, environment: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(trial.toml.replace("[application]", 'health = ["cat", "/www/health"]\n[application]'))
    release(trial, "v1")
    assert deploy_application.fn(NAME, "v1").status is Status.PLANNED
    assert trial.containers() == []
    report = deploy_application.fn(NAME, "v1", health_seconds=60, confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    assert trial.serves() == "v1"
    made = trial.engine.client.containers.get(trial.name).attrs["HostConfig"]
    assert (made["Memory"], made["MemoryReservation"], made["NanoCpus"]) == (64 << 20, 32 << 20, 500_000_000)
    assert trial.engine.client.containers.get(trial.name).attrs["State"]["Health"]["Status"] == "healthy"
    environment(trial.toml)
    release(trial, "v2")
    trial.engine.client.images.remove(f"{trial.repository}:v2")
    report = deploy_application.fn(NAME, "v2", health_seconds=60, confirm=NAME)
    assert trial.serves() == "v2", "pulled: it was not here"
    assert trial.containers() == [trial.name]
    (trial.backend / "start").write_text("echo does not find its database; exit 3")
    release(trial, "v3")
    served = []

    def read(*arguments: object) -> str:
        served.append((trial.serves(), trial.containers()))
        return read_log(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(container_way, "read_log", read)
    with pytest.raises(RunbookFailed, match="the new version is healthy: .*after 1 s") as failed:
        deploy_application.fn(NAME, "v3", health_seconds=1, confirm=NAME)
    assert served == [("v2", [trial.name, f"{trial.name}-failed"])], "first the old one, then the log"
    assert trial.serves() == "v2", "the one of before runs again"
    assert trial.containers() == [trial.name]
    (log,) = [one for one in failed.value.report.evidence if one.name.startswith("End of the log")]
    assert "does not find its database" in log.text


def test_an_interrupted_deployment_continues(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    release(trial, "v1")
    deploy_application.fn(NAME, "v1", health_seconds=60, confirm=NAME)
    release(trial, "v2")

    class Killed(BaseException):
        pass

    @action(of=swap_containers.of)
    def killed(block: Docker, wanted: Sequence[WantedContainer], roles: Collection[str]) -> None:
        swap_containers.work(block, wanted, roles)
        raise Killed

    monkeypatch.setattr(container_way, "swap_containers", killed)
    with pytest.raises(Killed):
        deploy_application.fn(NAME, "v2", health_seconds=60, confirm=NAME)
    monkeypatch.setattr(container_way, "swap_containers", swap_containers)
    assert trial.containers() == [trial.name, f"{trial.name}-before"]

    def policy(name: str) -> str:
        return str(trial.engine.client.containers.get(name).attrs["HostConfig"]["RestartPolicy"]["Name"])

    configured = policy(trial.name)
    assert configured != "no", "the seed is right"
    assert policy(f"{trial.name}-before") == "no", "an engine that starts again leaves it stopped"
    plan = deploy_application.fn(NAME, "v2")
    assert [step.step for step in plan.plan_steps] == ["remove", "create", "deploy"]
    assert plan.plan_steps[0].detail == f"{trial.name}-before, if {trial.name} is healthy now"
    report = deploy_application.fn(NAME, "v2", health_seconds=60, confirm=NAME)
    assert report.status is Status.WARN
    assert "a deployment was interrupted" in report.sentence()
    assert trial.serves() == "v2"
    assert trial.containers() == [trial.name]
    monkeypatch.setattr(container_way, "swap_containers", killed)
    with pytest.raises(Killed):
        deploy_application.fn(NAME, "v1", health_seconds=60, confirm=NAME)
    monkeypatch.setattr(container_way, "swap_containers", swap_containers)
    (trial.backend / "start").write_text("exit 3")
    release(trial, "v3")
    with pytest.raises(RunbookFailed, match="the new version is healthy: .*after 1 s") as failed:
        deploy_application.fn(NAME, "v3", health_seconds=1, confirm=NAME)
    (back,) = [one for one in failed.value.report.findings if one.name == "the previous version runs again"]
    assert back.status is Status.OK
    assert trial.serves() == "v1", "what ran, and had been looked at before anything took its place"
    assert policy(trial.name) == configured
    assert trial.containers() == [trial.name]
    keep_failed = deploying._keep_failed

    def killed_in_the_roll_back(*arguments: object) -> None:
        keep_failed(*arguments)  # type: ignore[arg-type]
        raise Killed

    monkeypatch.setattr(deploying, "_keep_failed", killed_in_the_roll_back)
    with pytest.raises(Killed):
        deploy_application.fn(NAME, "v3", health_seconds=1, confirm=NAME)
    monkeypatch.setattr(deploying, "_keep_failed", keep_failed)
    assert trial.containers() == [f"{trial.name}-before", f"{trial.name}-failed"]
    assert policy(f"{trial.name}-failed") == "no"
    report = deploy_application.fn(NAME, "v2", health_seconds=60, confirm=NAME)
    assert trial.serves() == "v2"
    assert trial.containers() == [trial.name]


def test_what_was_planned_is_deployed_by_its_digest(
    trial: Trial, environment: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    release(trial, "v1")
    release(trial, "v2")
    api, meanwhile = trial.engine.client.api, list[str]()

    def pushed(source: str) -> str:
        """Somebody gives the tag v1 of the registry to another image; returns the digest that it has then."""
        api.tag(f"{trial.repository}:{source}", trial.repository, "v1")
        said = list(api.push(trial.repository, tag="v1", stream=True, decode=True))
        return next(str(part["aux"]["Digest"]) for part in said if "aux" in part)

    @action(of=pull_images.of)
    def pulled(block: Docker, wanted: Sequence[WantedContainer]) -> dict[str, str]:
        meanwhile.append(pushed("v2"))
        api.remove_image(f"{trial.repository}@{digest}", force=True)
        return pull_images.work(block, wanted)

    api.tag(f"{trial.repository}:v1", trial.repository, "first")
    digest = pushed("first")
    plan = deploy_application.fn(NAME, "v1")
    assert digest in plan.plan_steps[0].detail
    monkeypatch.setattr(container_way, "pull_images", pulled)
    report = deploy_application.fn(NAME, "v1", health_seconds=60, confirm=NAME, plan=plan.pins["plan"])
    assert meanwhile != [digest]
    assert report.status is Status.OK, report.sentence()
    assert trial.serves() == "v1", "as planned, although the tag is v2's by now"
    image = f"{trial.repository}@{digest}"
    assert trial.engine.client.containers.get(trial.name).attrs["Config"]["Image"] == image
    (table,) = [one for one in report.evidence if one.name == "Containers"]
    assert table.rows[0][-1] == image
    monkeypatch.setattr(container_way, "pull_images", pull_images)
    plan = deploy_application.fn(NAME, "v1", recreate=True)
    pushed("first")
    with pytest.raises(PlanChanged, match="the plan no longer fits"):
        deploy_application.fn(NAME, "v1", recreate=True, confirm=NAME, plan=plan.pins["plan"])
    environment(trial.toml.replace(f'registry = "{trial.repository.partition("/")[0]}"', ""))
    api.tag(f"{trial.repository}:first", trial.repository.partition("/")[2], "v1")
    plan = deploy_application.fn(NAME, "v1")
    (fact,) = [value for name, value in plan.facts.items() if name.endswith("backend:v1 is not pinned")]
    assert api.inspect_image(f"{trial.repository}:first")["Id"] in fact


def test_a_version_that_is_nowhere_is_refused(trial: Trial) -> None:
    with pytest.raises(RunbookFailed, match="there is no image .*v9: not on the engine, and the registry has none"):
        deploy_application.fn(NAME, "v9", confirm=NAME)
