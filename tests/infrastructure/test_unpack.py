"""deploy_application where a release is unpacked: a real repository, a real server under a real supervisord."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.infrastructure.images import releases
from flows.infrastructure.images.deployment import deploy_application
from runbook.errors import LockLost, RunbookFailed
from runbook.kinds import action
from runbook.report import Report, Status
from tasks.releases.release import Release
from tests.fixtures import forked
from tests.fixtures.application.packaged import IN_GIT, NAME
from tests.fixtures.application.served import DEAD, Served
from tests.fixtures.reports import bad, rows

BROKEN = "import interviewkit", "import interviewkit, a_module_that_nobody_committed"


def deployed(version: str, **parameters: Any) -> Report:
    """The report, also of a run that failed."""
    try:
        return deploy_application.fn(NAME, version, **{"confirm": NAME, "health_seconds": 15, **parameters})
    except RunbookFailed as error:
        return error.report


def refused(version: str) -> Report:
    """Of a version that never gets healthy, which is not waited for."""
    return deployed(version, health_seconds=4)


def killed(version: str, place: str) -> None:
    """A run in a process of its own, dead at that place."""
    code = f"from flows.infrastructure.images.deployment import deploy_application as f; f.fn({NAME!r}, {version!r}, confirm={NAME!r})"
    environment = {**os.environ, "OPS_FAILPOINT": place}
    done = forked.run(["-c", code], environment, capture=False)
    assert done.returncode == -signal.SIGKILL


def test_a_version_and_the_one_before_it(served: Served) -> None:
    first, second = served.git("rev-parse", "HEAD").strip(), served.release("v2", '"one"', '"two"')
    plan = deployed("v2", confirm="")
    assert (plan.status, served.answer()["greeting"], served.left()) == (Status.PLANNED, "one", [])
    assert [step.step for step in plan.plan_steps] == ["unpack", "copy", "restart"]
    assert plan.pins["version"] == second
    assert rows(plan, "Release") == [("now", "not known", ""), ("then", "v2", second)]
    report = deployed("v2")
    assert bad(report) == {}, report.sentence()
    assert report.outcome == f"v2 ({second[:12]}) runs: backend"
    assert (served.answer()["greeting"], served.left()) == ("two", [])
    assert (served.live / "RELEASE").read_text() == f"v2 {second}\n"
    assert (served.live / "backend/notes.txt").read_text() == "a user's\n"
    assert deployed("v2").outcome.endswith("runs, as before")
    back = deployed(first)
    assert back.facts["difference"] == "0 commits more than the live release, 1 fewer"
    assert served.answer()["greeting"] == "one"
    (served.live / "backend/kit_server.py").write_text("raise SystemExit(1)\n")
    mended = deployed(first)
    assert bad(mended)["live files"] == "1 differ from the commit: backend/kit_server.py"
    assert served.answer()["greeting"] == "one"


def test_an_unhealthy_version_is_rolled_back(served: Served) -> None:
    served.release("v2", '"one"', '"two"')
    assert bad(deployed("v2")) == {}
    served.release("v3", *BROKEN)
    report = refused("v3")
    assert report.status is Status.CRITICAL
    assert DEAD.search(bad(report)["the new version is healthy"])
    assert [one.value for one in report.findings if one.name == "the previous version runs again"] == ["it is healthy"]
    (log,) = [one.text for one in report.evidence if one.name == "End of the log of backend"]
    assert "a_module_that_nobody_committed" in log
    assert (served.answer()["greeting"], served.left()) == ("two", [])
    assert (served.live / "RELEASE").read_text().startswith("v2 ")


def test_its_packages_come_and_go_with_it(served: Served) -> None:
    for name in ("requirements.txt", "requirements.lock"):
        (served.root / "backend" / name).write_text("interviewkit==1.0.3\n")
    served.release("v2", '"one"', '"two"')
    report = deployed("v2")
    assert bad(report) == {}, report.sentence()
    assert served.answer() == {"status": "ok", "kit": "1.0.3", "greeting": "two"}
    for name in ("requirements.txt", "requirements.lock"):
        (served.root / "backend" / name).write_text("interviewkit==2.0.0\n")
    served.release("v3", *BROKEN)
    assert refused("v3").status is Status.CRITICAL
    assert served.answer() == {"status": "ok", "kit": "1.0.3", "greeting": "two"}
    (served.root / "backend/requirements.lock").write_text("interviewkit==9.9.9\n")
    served.release("v4", BROKEN[1], BROKEN[0])
    assert "interviewkit" in deployed("v4").sentence()
    assert (served.answer()["kit"], served.left()) == ("1.0.3", [])


@pytest.mark.parametrize("place", ["release: kit_server.py replaced", "before start_services"])
def test_killed_anywhere_the_previous_version_can_still_be_restored(served: Served, place: str) -> None:
    first = served.git("rev-parse", "HEAD").strip()
    assert bad(deployed(first)) == {}
    served.release("v2", *BROKEN)
    killed("v2", place)
    assert "live.release-before" in served.left()
    first_line = deployed("v2", confirm="").plan_steps[0]
    assert (first_line.step, first_line.detail) == (
        "delete",
        f"{served.base}/live.release-before, if the live release is healthy now",
    )
    report = refused("v2")
    assert "a deployment was interrupted" in bad(report)["previous version"]
    assert report.status is Status.CRITICAL
    assert (served.answer()["greeting"], served.left()) == ("one", [])
    assert (served.live / "RELEASE").read_text().split()[1] == first


def test_what_cannot_be_deployed_is_refused_before_anything_stops(served: Served) -> None:
    pid = served.supervisor.services()["grc-backend"].pid
    assert "has no version “v9”" in deployed("v9").sentence()
    assert "is no version" in deployed("--output=/tmp/x").sentence()
    assert "leave roles empty" in deployed("main", roles=("backend",)).sentence()
    served.git("rm", "--quiet", "backend/requirements.txt")
    served.git("commit", "--quiet", "--message", "Without it")
    assert "main has no backend/requirements.txt" in deployed("main").sentence()
    served.describe(IN_GIT, sys.executable)
    (served.root / "backend/requirements.lock").write_text("nokit==1.0\n")
    served.git("reset", "--quiet", "--soft", "HEAD~1")
    served.git("checkout", "--quiet", "HEAD", "backend/requirements.txt")
    served.git("commit", "--quiet", "--all", "--message", "More packages")
    assert "this worker itself runs in" in bad(deployed("main"))["packages"]
    path = served.base / "trial.toml"
    path.write_text(path.read_text().replace("\nrelease = ", "\nimages = "))
    assert "trial configures no deployment" in deployed("main").sentence()
    assert served.supervisor.services()["grc-backend"].pid == pid
    assert served.left() == []


def test_a_partly_deleted_copy_is_never_restored(served: Served) -> None:
    served.release("v2", '"one"', '"two"')
    killed("v2", "release: copy of before renamed")
    assert served.left() == ["live.release-before.deleted"]
    (served.base / "live.release-before.deleted/backend/kit_server.py").unlink()
    served.release("v3", *BROKEN)
    assert refused("v3").status is Status.CRITICAL
    assert (served.answer()["greeting"], served.left()) == ("two", [])
    killed("v3", "before start_services")
    (served.base / "live.release-before/backend/requirements.txt").unlink()
    report = refused("v3")
    assert "has lost backend/requirements.txt" in bad(report)["the previous version runs again"]
    assert (served.live / "backend/requirements.txt").is_file()
    assert served.left() == ["live.release-before"], "the copy is kept while the rollback is unproven"


def test_no_part_of_a_release_is_left_out_silently(served: Served) -> None:
    path, link, live = served.base / "trial.toml", served.root / "backend/link", served.live / "backend/link"
    path.write_text(
        path.read_text().replace('"backend/requirements.txt"', '"backend/requirements.txt", "backend/link"')
    )
    (served.root / ".gitattributes").write_text("backend/link export-ignore\n")
    link.symlink_to("nowhere")
    served.git("add", "--all")
    served.release("v2", '"one"', '"two"')
    assert "git archive leaves backend/link out" in deployed("v2").sentence()
    (served.root / ".gitattributes").write_text("")
    served.release("v3", '"two"', '"three"')
    assert bad(deployed("v3")) == {}
    assert str(live.readlink()) == "nowhere"
    link.unlink()
    link.symlink_to("elsewhere")
    served.release("v4", *BROKEN)
    assert refused("v4").status is Status.CRITICAL
    assert (str(live.readlink()), served.answer()["greeting"], served.left()) == ("nowhere", "three", [])
    head = served.git("rev-parse", "HEAD").strip()
    served.git("update-index", "--cacheinfo", f"160000,{head},backend/link")
    served.git("commit", "--quiet", "--message", "A submodule")
    assert "has submodules, which are not unpacked: backend/link" in deployed("main").sentence()


def test_uncommitted_files_are_not_replaced(served: Served) -> None:
    path = served.base / "trial.toml"
    (served.root / "backend/app/one").mkdir(parents=True)
    (served.root / "backend/app/one/page").write_text("1")
    served.git("add", "--all")
    described = path.read_text().replace('"backend/requirements.txt"', '"backend/requirements.txt", "backend/app"')
    path.write_text(described)
    served.release("v2", '"one"', '"two"')
    assert bad(deployed("v2")) == {}
    served.git("rm", "--quiet", "-r", "backend/app/one")
    (served.root / "backend/app").mkdir(exist_ok=True)
    (served.root / "backend/app/other").write_text("2")
    served.git("add", "--all")
    served.release("v3", '"two"', '"three"')
    (served.live / "backend/app/__pycache__").mkdir()
    (served.live / "backend/app/__pycache__/page.pyc").write_text("compiled")
    (served.live / "backend/app/one/upload").write_text("a user's")
    report = deployed("v3")
    assert bad(report) == {"uncommitted files": "1 would be lost: backend/app/one/upload"}
    assert "move them out" in report.sentence()
    (served.live / "backend/app/one/upload").unlink()
    path.write_text(described.replace("\nrelease =", f'\nenv_file = "{served.live}/backend/app/.env"\nrelease ='))
    assert "backend/app/.env is under backend/app, which a release replaces" in deployed("v3").sentence()
    path.write_text(described.replace('"backend/app"', '"backend"'))
    assert "venv/bin/python is under backend, which" in deployed("v3").sentence()
    assert (served.answer()["greeting"], served.left()) == ("two", [])
    path.write_text(described)
    assert bad(deployed("v3")) == {}
    assert sorted(one.name for one in (served.live / "backend/app").iterdir()) == ["other"]


def test_the_previous_virtual_environment_outlives_a_second_launch(served: Served) -> None:
    def version(kit: str) -> None:
        for name in ("requirements.txt", "requirements.lock"):
            (served.root / "backend" / name).write_text(f"interviewkit=={kit}\n")

    version("1.0.3")
    served.release("v2", '"one"', '"two"')
    assert bad(deployed("v2")) == {}
    version("2.0.0")
    served.release("v3", *BROKEN)
    killed("v3", "before start_services")
    version("1.0.3")
    served.release("v4", '"two"', '"four"')
    assert refused("v4").status is Status.CRITICAL
    assert (served.answer()["kit"], served.answer()["greeting"], served.left()) == ("1.0.3", "two", [])
    killed("v3", "before start_services")
    named = Path((served.base / "live.release-before/VENV").read_text())
    assert named != served.python.parent.parent.resolve()
    shutil.rmtree(named)
    assert "is missing" in bad(refused("v3"))["the previous version runs again"]


def test_the_checked_lock_file_is_the_installed_one(served: Served) -> None:
    served.describe(IN_GIT.replace('"requirements.lock"', '"pins.txt"'))
    path = served.base / "trial.toml"
    path.write_text(path.read_text().replace("backend/requirements.lock", "backend/pins.txt"))
    (served.root / "backend/pins.txt").write_text("interviewkit==1.0.3\n")
    served.git("add", "--all")
    served.release("v2", '"one"', '"two"')
    assert bad(deployed("v2")) == {}
    assert (served.answer()["kit"], served.left()) == ("1.0.3", [])
    assert deployed("v2").outcome.endswith("runs, as before")


def test_killed_between_the_renames_of_the_environment_it_is_launched_again(served: Served) -> None:
    first = served.git("rev-parse", "HEAD").strip()
    for name in ("requirements.txt", "requirements.lock"):
        (served.root / "backend" / name).write_text("interviewkit==1.0.3\n")
    served.release("v2", '"one"', '"two"')
    killed("v2", "reinstall: between renames")
    assert not served.python.exists()
    plan = deployed(first, confirm="")
    assert [step.step for step in plan.plan_steps] == ["restore", "delete", "unpack", "copy", "restart"]
    assert bad(deployed(first)).keys() == {"previous version"}
    assert (served.answer()["kit"], served.answer()["greeting"], served.left()) == ("1.0.0", "one", [])


def test_replaced_and_restored_files_keep_their_owner(served: Served) -> None:
    server = served.live / "backend/kit_server.py"
    owner = (4713, 4714) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(server, *owner)
    served.release("v2", '"one"', '"two"')
    assert bad(deployed("v2")) == {}
    assert (server.stat().st_uid, server.stat().st_gid) == owner
    served.release("v3", *BROKEN)
    assert refused("v3").status is Status.CRITICAL
    assert (server.stat().st_uid, server.stat().st_gid) == owner
    assert served.answer()["greeting"] == "two"


def test_a_run_that_lost_its_lock_stops_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    @action(of=releases.swap_release.of)
    def lost(release: Release) -> None:
        raise LockLost("the lock expired", "look for the other run")

    monkeypatch.setattr(releases, "swap_release", lost)
    served.release("v2", '"one"', '"two"')
    with pytest.raises(LockLost):
        deployed("v2")
    assert served.left() == ["live.release-before"], "no rollback was made"
