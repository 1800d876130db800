"""check_base_images and update_base_images on a real engine, with a real registry."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import pytest

from flows.infrastructure.images.bases import check_base_images, update_base_images
from runbook.errors import RunbookFailed
from runbook.report import Status
from tasks.docker import bases
from tests.fixtures.engine import BASE, NAME, Engine
from tests.fixtures.reports import bad

pytestmark = pytest.mark.system

MORE = """
checkout = "{checkout}"
[docker.containers.backend]
image = "{prefix}-backend"
dockerfile = "Dockerfile"
test = ["cat", "/release"]
"""
TABLES = """
[debian]
source = "https://example.com"
checked = {today}
ends = {{ bookworm = "{later}" }}
[alpine]
source = "https://example.com"
checked = {today}
ends = {{}}
[python]
source = "https://example.com/python"
checked = {today}
ends = {{ "3.9" = "{over}", "3.11" = "{later}", "3.12" = "{later}" }}
"""


class Bases:
    """A registry's python images, and a checkout whose Dockerfile begins with one."""

    def __init__(self, engine: Engine, registry: str, directory: Path) -> None:
        self.engine, self.directory = engine, directory
        self.python = f"{registry}/{engine.prefix}/python"
        directory.mkdir()
        self.git("init", "--quiet", "-b", "main")
        self.publish("3.11-slim-bookworm")
        self.begin(f"{self.python}:3.11-slim-bookworm")

    def publish(self, tag: str, *steps: str) -> str:
        """Build it, push it, have it here; returns its digest."""
        client = self.engine.client
        client.images.get(self.engine.image("base", f"LABEL tag={tag}", "WORKDIR /", *steps)).tag(self.python, tag)
        said = "".join(str(line) for line in client.api.push(self.python, tag=tag, stream=True, decode=True))
        assert "error" not in said, said
        return client.api.inspect_distribution(f"{self.python}:{tag}")["Descriptor"]["digest"]

    def begin(self, reference: str, *steps: str) -> None:
        """Commit a Dockerfile."""
        (self.directory / "release").write_text("a release")
        lines = [f"FROM {reference} AS run", "COPY release /release", *steps]
        (self.directory / "Dockerfile").write_text("\n".join(lines) + "\n")
        self.git("add", ".")
        self.git("-c", "user.name=test", "-c", "user.email=test@example.com", "commit", "--quiet", "-m", "change")

    def git(self, *words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=self.directory, check=True, capture_output=True, text=True
        ).stdout.strip()


@pytest.fixture
def trial(
    engine: Engine, registry: str, environment: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Bases:
    today = date.today()
    tables = TABLES.format(today=today, over=today - timedelta(days=2), later=today + timedelta(days=900))
    (tmp_path / "releases.toml").write_text(tables)
    monkeypatch.setattr(bases, "RELEASES", tmp_path / "releases.toml")
    made = Bases(engine, registry, tmp_path / "checkout")
    environment(MORE.format(checkout=made.directory, prefix=engine.prefix))
    return made


def test_age_drift_and_the_end_of_support(trial: Bases) -> None:
    reference = f"{trial.python}:3.11-slim-bookworm"
    report = check_base_images.fn(NAME)
    assert bad(report) == {}
    assert {one.name.removeprefix("support of ") for one in report.findings if one.name.startswith("support")} == {
        f"{reference}: python 3.11",
        f"{reference}: debian bookworm",
    }
    assert "update-base-images with pin" in report.facts[f"{reference} is not pinned"]
    old = trial.engine.client.images.get(reference).id
    digest = trial.publish("3.11-slim-bookworm", "LABEL newer=yes")
    trial.engine.client.api.tag(old, trial.python, "3.11-slim-bookworm")
    assert bad(check_base_images.fn(NAME)) == {f"newest of {reference}": f"the registry has {digest}"}
    trial.begin(f"{trial.python}:3.9")
    with pytest.raises(RunbookFailed, match=r"python 3.9: ended ") as failed:
        check_base_images.fn(NAME)
    assert "the registry has no image of that name" in bad(failed.value.report)[f"newest of {trial.python}:3.9"]
    trial.begin(f"127.0.0.1:1/{trial.engine.prefix}:1")
    report = check_base_images.fn(NAME)
    assert report.facts[f"127.0.0.1:1/{trial.engine.prefix}:1 is not pinned"].startswith("its digest is not known")
    with pytest.raises(RunbookFailed, match="no digest is known of 127.0.0.1:1/"):
        update_base_images.fn(NAME, pin=True)
    assert report.status is Status.WARN
    assert all("not known" in value for value in bad(report).values()), "not known is not well"
    assert len(bad(report)) == 2
    (trial.directory / "Dockerfile").unlink()
    with pytest.raises(RunbookFailed, match="Dockerfile of backend cannot be read: FileNotFoundError"):
        check_base_images.fn(NAME)


def test_another_base_is_built_and_tested_on_a_branch(trial: Bases) -> None:
    trial.publish("3.12-slim-bookworm")
    before = (trial.directory / "Dockerfile").read_text()
    report = update_base_images.fn(NAME, to=(f"{trial.python}:3.12-slim-bookworm",), branch="newer")
    assert report.status is Status.OK, report.sentence()
    assert (trial.directory / "Dockerfile").read_text() == before, "the live checkout is not touched"
    assert trial.git("branch", "--show-current") == "main"
    assert trial.git("show", "newer:Dockerfile").startswith(f"FROM {trial.python}:3.12-slim-bookworm AS run\n")
    assert len(trial.git("worktree", "list").splitlines()) == 1
    assert {one.name: one.text for one in report.evidence}["Test of backend"] == "```\na release\n```"
    assert not [one for one in trial.engine.client.images.list() if any("try-" in tag for tag in one.tags)]
    with pytest.raises(RunbookFailed, match=r"no FROM line can become .*ruby:3"):
        update_base_images.fn(NAME, to=("ruby:3",))


def test_a_test_that_fails_is_told_and_the_branch_is_kept(trial: Bases, environment: Callable[[str], None]) -> None:
    described = MORE.replace("/release", "/nowhere").format(checkout=trial.directory, prefix=trial.engine.prefix)
    environment(described)
    trial.publish("3.12-slim-bookworm")
    with pytest.raises(RunbookFailed, match="the test of .* exits 1: .*/nowhere.* the branch is kept"):
        update_base_images.fn(NAME, to=(f"{trial.python}:3.12-slim-bookworm",), branch="broken")
    assert "3.12" in trial.git("show", "broken:Dockerfile")


def test_a_pinned_digest_becomes_today_s(trial: Bases) -> None:
    old = trial.publish("3.11-slim-bookworm")
    report = update_base_images.fn(NAME, pin=True, branch="first")
    assert report.status is Status.OK, report.sentence()
    pinned = f"FROM {trial.python}:3.11-slim-bookworm@{old} AS run\n"
    assert trial.git("show", "first:Dockerfile").startswith(pinned.strip())
    trial.begin(f"{trial.python}:3.11-slim-bookworm@{old}")
    report = check_base_images.fn(NAME)
    assert bad(report) == {}
    assert not [name for name in report.facts if "not pinned" in name]
    new = trial.publish("3.11-slim-bookworm", "LABEL newer=yes")
    assert len(bad(check_base_images.fn(NAME))) == 1
    report = update_base_images.fn(NAME, branch="pinned")
    assert report.status is Status.OK, report.sentence()
    assert new in trial.git("show", "pinned:Dockerfile")
    assert BASE not in trial.git("show", "pinned:Dockerfile")
