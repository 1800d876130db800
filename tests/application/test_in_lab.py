"""§3's runbooks in the lab as `make lab` leaves it: its own environment, its own git checkout."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from blocks.config import toml
from flows.application import files_swap
from flows.application.dependencies import check_dependencies
from flows.application.files import backup_files
from flows.application.files_restore import restore_files, undo_restore_files
from flows.application.hooks import install_pre_commit
from flows.application.lint import lint_code
from flows.application.patching import patch_vulnerability
from flows.application.reinstall import reinstall_dependencies
from flows.application.types import check_types
from flows.application.vulnerabilities import TABLE, scan_vulnerabilities
from lab.client import Lab
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Report, Status
from tasks.host.services import start_services
from tasks.packages.venv import _imports
from tests.application.test_types import finding
from tests.fixtures import forked
from tests.fixtures.advisories import CVE, NODE_CVE, Registry
from tests.fixtures.application.checkouts import Checkout, bring, replace
from tests.fixtures.application.seeded import PYTHON_FILE, WEB_FILE, endanger, endanger_node, ill_type
from tests.fixtures.reports import bad, rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(lab: Lab) -> Iterator[Checkout]:
    """The lab's; as it was afterwards."""
    made = Checkout(Path(str(lab.status()["root"])) / "srv" / "grc")
    before = made.git("rev-parse", "HEAD").strip()
    yield made
    made.git("checkout", "--quiet", "--force", "main")
    made.git("reset", "--quiet", "--hard", before)
    made.git("clean", "-ffdxq")
    for branch in set(made.branches()) - {"main"}:
        made.git("branch", "--quiet", "-D", branch)
    (made.root / ".git/hooks/pre-commit").unlink(missing_ok=True)
    assert len(made.git("worktree", "list").splitlines()) == 1


@pytest.fixture
def served(lab: Lab, registry: Registry, node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """pip's index, npm's registry and OSV are the test's: the environment is the lab's but for the last."""
    text = Path(os.environ["OPS_ENVIRONMENT_FILE"]).read_text()
    (tmp_path / "lab.toml").write_text(
        replace(text, "\n[application]\n", f'\n[application]\nadvisories = "{registry.url}"\n')
    )
    for name, value in {
        "OPS_ENVIRONMENT_FILE": str(tmp_path / "lab.toml"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"{registry.url}/simple",
        "npm_config_registry": registry.url,
        "npm_config_offline": "false",
        "npm_config_cache_dir": str(tmp_path / "pnpm-cache"),
    }.items():
        monkeypatch.setenv(name, value)
    return registry


def critical(flow: object, *arguments: object, **parameters: object) -> Report:
    with pytest.raises(RunbookFailed) as caught:
        flow.fn(*arguments, **parameters)  # type: ignore[attr-defined]
    return caught.value.report


def test_the_checkout_is_what_runs_and_pins_what_it_imports(lab: Lab, checkout: Checkout) -> None:
    live = Path(str(lab.status()["root"])) / "opt" / "grc"
    commit = (live / "RELEASE").read_text().split()[1]
    assert commit == checkout.git("rev-parse", "HEAD").strip()
    assert checkout.git("ls-remote", "origin", "refs/heads/main").split()[0] == commit
    assert checkout.git("status", "--porcelain") == ""
    for part in ("backend/grc_backend", "backend/alembic", "frontend/grc_frontend"):
        for path in (checkout.root / part).rglob("*.py"):
            assert path.read_bytes() == (live / path.relative_to(checkout.root)).read_bytes()
    pins = checkout.backend / "requirements.txt"
    assert pins.read_bytes() == (live / "backend/requirements.txt").read_bytes()
    pinned = {line.partition("==")[0].partition("[")[0] for line in pins.open()}
    imported = {name for path in checkout.backend.rglob("*.py") for name in _imports(path.read_bytes())}
    assert {"fastapi", "sqlalchemy", "redis", "uvicorn"} < imported & pinned


def test_packages_are_installed_by_the_runbook_and_everything_passes(
    lab: Lab, checkout: Checkout, node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = critical(check_types, lab.name)
    assert finding(report, "mypy").startswith("OK: 0 errors, 0 warnings in 18 files")
    assert "node_modules — run reinstall-dependencies with parts=web" in finding(report, "tsc")
    own = critical(reinstall_dependencies, lab.name, parts=("backend",))
    assert "the environment that this worker itself runs in" in own.sentence()
    assert reinstall_dependencies.fn(lab.name, parts=("web",)).status is Status.PLANNED
    done = reinstall_dependencies.fn(lab.name, parts=("web",), confirm=lab.name)
    assert "match the lock file" in done.outcome
    assert check_types.fn(lab.name).status is Status.OK
    assert lint_code.fn(lab.name).status is Status.OK
    path = [each for each in os.environ["PATH"].split(os.pathsep) if not Path(each, "ruff").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(path))
    unknown = critical(install_pre_commit, lab.name, origin="local").sentence()
    assert "ruff is not on PATH" in unknown
    assert "of every developer" in unknown
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), *path]))
    hooks = install_pre_commit.fn(lab.name, origin="local")
    assert hooks.status is Status.PLANNED, hooks.sentence()
    assert finding(hooks, "hooks on all files").startswith("OK: 3 ran")


def test_seeded_types_and_style_are_found(lab: Lab, checkout: Checkout, node: Path) -> None:
    bring(node, checkout)
    ill_type(checkout)
    report = critical(check_types, lab.name)
    (table,) = [kept.rows for kept in report.evidence if kept.name.startswith("Problems")]
    assert [row[:3] for row in table] == [(PYTHON_FILE, "9", "mypy"), (WEB_FILE, "5", "tsc")]
    sloppy = lint_code.fn(lab.name)
    assert sloppy.status is Status.WARN
    assert set(bad(sloppy)) == {"ruff", "ruff format", "eslint"}


def test_seeded_old_and_vulnerable_packages_are_found(lab: Lab, checkout: Checkout, served: Registry) -> None:
    manifests = [json.loads(path.read_text()) for path in checkout.web.rglob("package.json")]
    wanted = {
        name: version
        for one in manifests
        for key in ("dependencies", "devDependencies")
        for name, version in one.get(key, {}).items()
        if not version.startswith("workspace:")
    }
    for name, version in wanted.items():
        served.tarball(name, version)
    served.tarball("react", "99.0.0")
    served.wheel("redis", "99.0.0")
    report = check_dependencies.fn(lab.name)
    found = {(row[5], row[0]): row[4] for row in rows(report, "Outdated")}
    assert found == {("Python", "redis"): "99.0.0", ("node", "react"): "99.0.0"}
    assert len(rows(report, "Python packages")) > 50
    assert [row for row in rows(report, "node packages") if row[0] == "react"]
    endanger(served, "99.0.0", package="redis")
    endanger_node(served, "99.0.0", package="react")
    scan = critical(scan_vulnerabilities, lab.name)
    assert {(row[1], row[3]) for row in rows(scan, TABLE)} == {("redis", CVE), ("react", NODE_CVE)}
    patched = critical(patch_vulnerability, lab.name, CVE, confirm=lab.name)
    assert rows(patched, "Vulnerable")[0][:4] == ("backend", "redis", rows(patched, "Vulnerable")[0][2], "99.0.0")
    assert "backend: installed" in bad(patched), "the index has nothing else"
    assert checkout.git("ls-remote", "--heads", "origin").split()[1::2] == ["refs/heads/main"]


def refuse(*_: object) -> NoReturn:
    raise OpsError("more would be lost")


STOPPED = "from flows.application.files_restore import restore_files as run; run.fn({0!r}, confirm={0!r})"


def test_files_are_restored_with_the_services_stopped_and_a_killed_run_leaves_none_stopped_for_good(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = toml.environment(lab.name)
    backup_files.fn(lab.name)
    source = Path(env.application.backend_directory) / "grc_backend" / "ai.py"
    good, pid = source.read_bytes(), env.services.state("backend").pid
    source.unlink()
    variables = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", "OPS_FAILPOINT": "after stop_services"}
    done = forked.run(["-c", STOPPED.format(lab.name)], variables)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not env.services.is_running("backend")

    source.write_bytes(good)  # the backend does not start without it
    start_services.work(env.services, ["backend", "frontend"])
    with monkeypatch.context() as patch:
        patch.setattr(files_swap, "pass_files", refuse)
        refused = critical(restore_files, lab.name, confirm=lab.name)
    assert refused.state
    assert refused.state.value == "the live files are unchanged; services run as before"
    assert env.services.is_running("backend")
    assert env.services.is_running("frontend")

    source.unlink()
    report = restore_files(lab.name, confirm=lab.name)  # as a flow run

    assert report.status is Status.OK, report.sentence()
    assert source.read_bytes() == good
    assert env.services.is_running("backend")
    assert env.services.is_running("frontend")
    assert env.services.state("backend").pid != pid
    assert undo_restore_files.fn(lab.name).status is Status.PLANNED
