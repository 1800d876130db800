"""reinstall_dependencies: pnpm and pip for real, from a store and a folder of wheels; killed, launched again."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from blocks.places import Application
from flows.application.reinstall import reinstall_dependencies
from runbook.errors import OpsError, RunbookFailed
from runbook.report import Status
from runbook.wait import until
from tasks.packages.modules import NODE, SUPERSEDED, keep_modules, settle_modules, staging_of, swap_modules
from tasks.packages.users import users_of
from tasks.packages.venv import BUILDING, _imported, read_failing_imports, settle_venv, swap_venv, venv_of
from tests.fixtures import forked
from tests.fixtures.application.checkouts import NAME, Checkout, program, replace


def wheel(folder: Path, name: str, version: str, code: str, needs: str = "") -> None:
    """A package as an index serves it."""
    info = f"{name}-{version}.dist-info"
    requires = f"Requires-Dist: {needs}\n" if needs else ""
    files = {
        f"{name}/__init__.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}\n"
        for path, text in files.items()
    )
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(path, text)


@pytest.fixture
def backend(sources: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """Its environment is a directory, with an old package; the lock asks for the new one."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "interviews", "2.0", "KIND = 'new'\n")
    wheel(wheels, "broken", "1.0", "raise RuntimeError('no')\n")
    wheel(wheels, "needy", "1.0", "", needs="interviews<2")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    package = sources.backend / "grc_backend"
    (package / "settings.py").write_text("import interviews\n")
    sources.add("backend/requirements.txt", "interviews==2.0\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", sources.backend / "venv"], check=True)
    (site,) = (sources.backend / "venv").glob("lib/python*/site-packages")
    (site / "interviews.py").write_text("KIND = 'old'\n")
    environment = tmp_path / "trial.toml"
    python = sources.backend / "venv" / "bin" / "python"
    environment.write_text(replace(environment.read_text(), f'python = "{sys.executable}"', f'python = "{python}"'))
    return sources


def kind(made: Checkout) -> str:
    code = "import interviews; print(interviews.KIND)"
    python = made.backend / "venv" / "bin" / "python"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def works(made: Checkout) -> bool:
    """The linter runs, which needs many packages; nothing of a reinstallation is left."""
    eslint = [made.web / "node_modules/.bin/eslint", "packages/ui/src/index.ts"]
    return subprocess.run(eslint, cwd=made.web, capture_output=True).returncode == 0


def left(made: Checkout) -> list[str]:
    names = [path.name for path in made.root.glob(".*ops*")]
    return names + [str(path) for path in made.web.rglob("*ops-superseded") if ".pnpm" not in path.parts]


def killed(point: str, part: str) -> None:
    code = (
        "from flows.application.reinstall import reinstall_dependencies as f;"
        f" f.fn({NAME!r}, parts=({part!r},), confirm={NAME!r})"
    )
    done = forked.run(["-c", code], {**os.environ, "OPS_FAILPOINT": point})
    assert done.returncode == -signal.SIGKILL, done.stderr[-500:]


def test_a_python_of_no_virtual_environment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "conda" / "bin").mkdir(parents=True)
    with pytest.raises(OpsError, match="is not in a virtual environment"):
        venv_of(Application(python=str(tmp_path / "conda" / "bin" / "python")))


def test_node_modules_are_swapped_after_their_proof_and_turbo_s_cache_goes(checkout: Checkout) -> None:
    (checkout.web / ".turbo").mkdir()
    marker = checkout.web / "node_modules" / "marker"
    marker.touch()
    others = checkout.web / "docs-site" / "node_modules" / "another-project-s"
    others.mkdir(parents=True)
    plan = reinstall_dependencies.fn(NAME, parts=("web",))
    assert plan.status is Status.PLANNED
    assert plan.plan_steps[0].bytes > 10_000_000
    assert marker.exists()
    report = reinstall_dependencies.fn(NAME, parts=("web",), confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    assert report.outcome == "9 direct dependencies of the workspace match the lock file"
    assert report.facts["Turbo's caches"] == ".turbo"
    assert not marker.exists()
    assert others.exists(), "none of the workspace's packages has them"
    assert not (checkout.web / ".turbo").exists()
    assert left(checkout) == []
    assert works(checkout)
    named = subprocess.run(["grep", "-rl", "ops-reinstall", checkout.web], capture_output=True, text=True).stdout
    assert named == "", "launchers name the place where they were made"
    assert checkout.git("status", "--porcelain") == ""


@pytest.mark.soak
@pytest.mark.parametrize(
    "point",
    [
        "before swap_modules",
        "reinstall: between renames",
        "before prove_modules",
        "before drop_old_modules",
        "reinstall: old ones removed",
    ],
)
def test_killed_anywhere_and_launched_again_it_ends_well(checkout: Checkout, point: str) -> None:
    killed(point, "web")
    report = reinstall_dependencies.fn(NAME, parts=("web",), confirm=NAME)
    assert report.facts["earlier run"]
    assert left(checkout) == []
    assert works(checkout)


def test_a_lock_that_does_not_fit_leaves_the_old_ones(checkout: Checkout) -> None:
    manifest = checkout.web / "apps/frontend/package.json"
    manifest.write_text(replace(manifest.read_text(), '"react-dom": "19.3.1"', '"react-dom": "18.0.0"'))
    before = (checkout.web / "node_modules").stat().st_ino
    with pytest.raises(RunbookFailed, match="pnpm exited 1"):
        reinstall_dependencies.fn(NAME, parts=("web",), confirm=NAME)
    assert (checkout.web / "node_modules").stat().st_ino == before
    assert left(checkout) == []


@pytest.mark.parametrize("text", ["exit 0", "echo '[]'"], ids=["silent", "empty"])
def test_a_pnpm_that_installs_nothing_is_told(checkout: Checkout, fake: Path, text: str) -> None:
    program(fake / "pnpm", text)
    with pytest.raises(RunbookFailed, match="installed nothing"):
        reinstall_dependencies.fn(NAME, parts=("web",), confirm=NAME)
    assert left(checkout) == []
    assert works(checkout)


def test_the_backend_s_environment_becomes_a_link_to_one_that_was_proven(backend: Checkout) -> None:
    assert kind(backend) == "old"
    report = reinstall_dependencies.fn(NAME, parts=("backend",), confirm=NAME)
    assert report.status is Status.OK, report.sentence()
    assert kind(backend) == "new"
    first = (backend.backend / "venv").resolve()
    assert list(backend.backend.glob("venv-*")) == [first]
    script = (backend.backend / "venv/bin/pip").read_text().splitlines()[0]
    assert script.startswith(f"#!{first}/bin/python")


def test_what_the_sources_import_is_asked_of_an_environment(sources: Checkout) -> None:
    sources.add(
        "backend/jobs.py", "import os, psutil, grc_backend, no_such.part\nfrom also_none import x\nfrom . import y\n"
    )
    application = Application(python=sys.executable, backend_directory=str(sources.backend))
    assert read_failing_imports(application, Path(sys.executable), 60) == {
        "also_none: ModuleNotFoundError: No module named 'also_none'",
        "no_such: ModuleNotFoundError: No module named 'no_such'",
    }
    assert _imported(sources.backend) == ["also_none", "dotenv", "no_such", "psutil"]


@pytest.mark.soak
def test_an_environment_that_cannot_import_what_the_old_one_could_is_not_swapped(backend: Checkout) -> None:
    (backend.backend / "requirements.txt").write_text("broken==1.0\n")
    with pytest.raises(RunbookFailed, match="cannot import interviews: ModuleNotFoundError"):
        reinstall_dependencies.fn(NAME, parts=("backend",), confirm=NAME)
    assert list(backend.backend.glob("venv-*")) == []
    assert kind(backend) == "old"


@pytest.mark.soak
@pytest.mark.parametrize("point", ["reinstall: venv made", "reinstall: between renames", "after swap_venv"])
def test_an_environment_killed_anywhere_and_launched_again_ends_well(backend: Checkout, point: str) -> None:
    killed(point, "backend")
    report = reinstall_dependencies.fn(NAME, parts=("backend",), confirm=NAME)
    assert report.status is Status.OK
    assert kind(backend) == "new"
    assert len(list(backend.backend.glob("venv-*"))) == 1


@pytest.mark.soak
def test_a_lock_whose_packages_conflict_is_refused(backend: Checkout) -> None:
    (backend.backend / "requirements.txt").write_text("interviews==2.0\nneedy\n")
    with pytest.raises(RunbookFailed, match="conflict"):
        reinstall_dependencies.fn(NAME, parts=("backend",), confirm=NAME)
    assert list(backend.backend.glob("venv-*")) == []
    assert kind(backend) == "old"


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A workspace with the least that can be told apart: where each node_modules is from."""
    for place in ("web", "web/apps/frontend"):
        (tmp_path / place / "node_modules").mkdir(parents=True)
        (tmp_path / place / "node_modules" / "old").touch()
    return tmp_path / "web"


def stage(web: Path) -> Path:
    staging = staging_of(web)
    for place in (staging, staging / "apps/frontend"):
        (place / "node_modules").mkdir(parents=True)
        (place / "node_modules" / "new").touch()
    return staging


def ages(web: Path) -> list[str]:
    return [next(path.iterdir()).name for path in (web / "node_modules", web / "apps/frontend/node_modules")]


def test_every_state_that_a_killed_run_leaves_is_settled(modules: Path) -> None:
    web = modules
    assert settle_modules.work(web) == ""
    stage(web)
    assert settle_modules.work(web) == "deleted the staged packages of a killed run"
    stage(web)
    (web / "node_modules").rename(web / SUPERSEDED)  # between the renames of the first
    assert settle_modules.work(web) == "reverted a killed run"
    assert ages(web) == ["old", "old"]
    stage(web)
    swap_modules.work(web)  # not proven
    assert ages(web) == ["new", "new"]
    assert settle_modules.work(web) == "reverted a killed run"
    assert ages(web) == ["old", "old"]
    stage(web)
    swap_modules.work(web)
    keep_modules.work(web)
    shutil.rmtree(web / SUPERSEDED)  # killed while the old ones went
    assert settle_modules.work(web) == "deleted the old packages of an earlier run"
    assert ages(web) == ["new", "new"]
    assert not staging_of(web).exists()
    assert not list(web.rglob(SUPERSEDED))


def test_old_packages_stay_while_a_process_runs_from_them(modules: Path, tmp_path: Path) -> None:
    web = modules
    (tmp_path / "node").symlink_to(sys.executable)
    with subprocess.Popen([tmp_path / "node", "-c", "input()"], stdin=subprocess.PIPE, cwd=web) as running:
        stage(web)
        swap_modules.work(web)
        until(lambda: users_of(web, NODE), what="the process", seconds=120)
        keep_modules.work(web)
        with pytest.raises(OpsError, match=rf"in use: .*\(pid {running.pid}\)"):
            settle_modules.work(web)
        running.kill()
    assert settle_modules.work(web) == "deleted the old packages of an earlier run"


def test_every_state_of_an_environment_that_a_killed_run_leaves_is_settled(tmp_path: Path) -> None:
    application = Application(python=str(tmp_path / "venv/bin/python"), backend_directory=str(tmp_path))
    building, old = tmp_path / "venv-20260215093000", tmp_path / "venv-old"
    (tmp_path / "venv").mkdir()
    building.mkdir()
    (building / BUILDING).touch()
    (tmp_path / "venv-mine").mkdir()
    assert building.name in settle_venv.work(application)  # killed while it was made
    assert not building.exists()
    (tmp_path / "venv").rename(old)  # killed between the renames
    assert settle_venv.work(application) == "restored the old environment"
    assert (tmp_path / "venv").is_dir()
    building.mkdir()
    assert swap_venv.work(application, building) == old
    assert (tmp_path / "venv").resolve() == building
    assert "venv-old" in settle_venv.work(application)  # killed after the swap of what was proven
    assert sorted(path.name for path in tmp_path.glob("venv*")) == ["venv", "venv-20260215093000", "venv-mine"]
