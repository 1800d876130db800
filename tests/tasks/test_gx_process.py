"""The process of the expectations: begun early, begun again when it is gone, and silent about secrets."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.errors import OpsError
from runbook.wait import until
from tasks.gx import process, program
from tasks.integrity import run_expectations
from tests.fixtures.servers import ADMIN_PASSWORD
from tests.tasks.conftest import SUITES


def children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # a zombie has no command line
            if "tasks.gx.program" in child.cmdline():
                found.append(child)
    return found


def test_a_process_that_was_killed_is_begun_again(interview: Postgres, tmp_path: Path) -> None:
    process.start()
    process.start()
    (child,) = until(children, what="the process", seconds=120)
    child.kill()

    assert run_expectations(interview, interview.database, tmp_path, SUITES).failed == ()

    (after,) = children()
    assert after.pid != child.pid
    assert ADMIN_PASSWORD not in " ".join(after.cmdline())
    assert ADMIN_PASSWORD not in " ".join(after.environ().values())


def test_a_recovery_s_process_is_not_niced() -> None:
    def nices() -> list[int]:
        return [child.nice() for child in children()]

    process._process.stop()
    for routine, nice in ((True, process.NICE), (False, 0), (True, 0)):
        process.start(routine=routine)
        until(lambda nice=nice: nices() == [nice], what=f"a process of niceness {nice}", seconds=60)  # type: ignore[misc]


def test_what_cannot_be_judged_is_an_error_and_no_pass(interview: Postgres, tmp_path: Path) -> None:
    with pytest.raises(OpsError, match="could not be judged: KeyError"):
        process.ask({"password": "", "suites": {}})
    assert run_expectations(interview, interview.database, tmp_path, SUITES).failed == (), "it goes on after an error"


def test_a_module_for_later_is_imported_when_something_of_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Great Expectations imports scipy.stats: for an expectation that no suite has."""
    later = program._Later("colorsys")
    monkeypatch.setitem(sys.modules, "colorsys", later)
    import colorsys

    assert sys.modules["colorsys"] is colorsys is later
    assert colorsys.rgb_to_hsv(1, 1, 1) == (0.0, 0.0, 1)
    assert sys.modules["colorsys"] is not later
    assert colorsys.hsv_to_rgb(0.0, 0.0, 1) == (1, 1, 1)


def test_a_program_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def broken(_nice: int) -> Iterator[object]:
        argv = [sys.executable, "-c", "import no_such_wheel"]
        with (
            tempfile.TemporaryFile() as errors,
            shell.spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as child,
        ):
            yield child, errors

    process._process.stop()
    monkeypatch.setattr(process, "_program", broken)
    with pytest.raises(OpsError, match="could not be judged: ModuleNotFoundError: No module named 'no_such_wheel'"):
        process.ask({})
    process._process.stop()
