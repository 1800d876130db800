"""One code approves one plan, once: for all environments, processes and kills of a host. Each run is a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyotp
import pytest

from runbook.wait import until

ROOT = Path(__file__).parents[2]
ALICE, BOB = pyotp.random_base32(), pyotp.random_base32()
STEP_SECONDS, SAFE_SECONDS = 30, 20
TOML = """
name = "{name}"
reports = "{0}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
[logs]
app = "{0}/log/app.log"
audit = "{0}/log/audit.log"
backup = "{0}/log/db_backup.log"
[approval]
required = ["clean-logs"]
[approval.approvers]
alice = {{ secret_env = "OPS_TOTP_ALICE" }}
{bob} = {{ secret_env = "OPS_TOTP_BOB" }}
"""


@dataclass(frozen=True)
class Site:
    """An environment with one log to delete."""

    name: str
    directory: Path
    state: Path

    @property
    def old(self) -> Path:
        return self.directory / "log" / "app.log.9"

    def start(self, failpoint: str = "") -> subprocess.Popen[str]:
        """A run that has planned, and waits for its code."""
        variables = {
            "OPS_ENVIRONMENT": self.name,
            "OPS_ENVIRONMENT_FILE": str(self.directory / "environment.toml"),
            "OPS_TOTP_ALICE": ALICE,
            "OPS_TOTP_BOB": BOB,
            "OPS_FAILPOINT": failpoint,
            "XDG_STATE_HOME": str(self.state),
            "PREFECT_API_URL": "",  # none, so none is waited for
        }
        argv = [sys.executable, "-m", "flows.launch", "clean-logs", "--without-prefect"]
        argv += [f"environment={self.name}", f"confirm={self.name}"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            argv, cwd=ROOT, env={**os.environ, **variables}, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        printed = ""
        while not printed.endswith("code: "):
            assert process.stdout
            letter = process.stdout.read(1)
            assert letter, printed + process.communicate()[1]
            printed += letter
        return process

    def approve(self, code: str, failpoint: str = "") -> tuple[int, str]:
        """The exit code of a run, and what it printed as errors."""
        return answer(self.start(failpoint), code)


def answer(process: subprocess.Popen[str], code: str) -> tuple[int, str]:
    _, errors = process.communicate(f"{code}\n", timeout=300)
    return process.returncode, errors


@pytest.fixture
def sites(tmp_path: Path) -> tuple[Site, Site, Site]:
    """Three environments of one host. The second one knows the same person by another name."""
    made = []
    for name, bob in (("blue", "bob"), ("green", "robert"), ("red", "bob")):
        directory = tmp_path / name
        (directory / "log").mkdir(parents=True)
        (directory / "log" / "app.log").write_text("{}\n")
        (directory / "environment.toml").write_text(TOML.format(directory, name=name, bob=bob))
        site = Site(name, directory, tmp_path / "state")
        site.old.write_text("{}\n")
        os.utime(site.old, (time.time() - 40 * 86400,) * 2)
        made.append(site)
    first, second, third = made
    return first, second, third


def fresh_code(secret: str) -> str:
    """A code that is valid for `STEP_SECONDS` and at least `SAFE_SECONDS` more."""
    until(lambda: time.time() % STEP_SECONDS < STEP_SECONDS - SAFE_SECONDS, what="a young code", seconds=STEP_SECONDS)
    return pyotp.TOTP(secret).now()


def test_a_code_approves_one_environment_only(sites: tuple[Site, Site, Site]) -> None:
    blue, green, _ = sites
    first, second = blue.start(), green.start()
    code = fresh_code(BOB)
    assert answer(first, code)[0] == 0
    assert not blue.old.exists()
    done, errors = answer(second, code)
    assert (done, green.old.exists()) == (1, True)
    assert "this code of robert was used before" in errors
    ledger = blue.state / "interview-ops" / "approvals"
    assert {path.stat().st_mode & 0o777 for path in (ledger / "codes.json", ledger / ".lock")} == {0o600}
    assert ledger.stat().st_mode & 0o777 == 0o700
    assert BOB not in (ledger / "codes.json").read_text()


def test_of_two_runs_with_one_code_one_wins(sites: tuple[Site, Site, Site]) -> None:
    runs = [site.start() for site in sites]
    code = fresh_code(BOB)
    with ThreadPoolExecutor(3) as pool:
        ends = list(pool.map(lambda run: answer(run, code), runs))
    assert sorted(code for code, _ in ends) == [0, 1, 1], ends
    assert sum(site.old.exists() for site in sites) == 2
    assert sum("was used before" in errors for _, errors in ends) == 2


def test_wrong_codes_slow_down_all_environments(sites: tuple[Site, Site, Site]) -> None:
    blue, green, red = sites
    valid = {
        pyotp.TOTP(secret).at(datetime.now(UTC), counter_offset=step)
        for secret in (ALICE, BOB)
        for step in range(-2, 40)
    }
    wrong = next(f"{number:06}" for number in range(100) if f"{number:06}" not in valid)
    for turn in range(10):
        done, errors = (blue, green)[turn % 2].approve(wrong)
        assert (done, "the code is wrong" in errors) == (1, True), errors
    done, errors = red.approve(pyotp.TOTP(BOB).now())
    assert (done, red.old.exists()) == (1, True)
    assert "10 wrong codes were typed on this host within a day: none is read for" in errors

    age(red.state, 31)
    assert red.approve(wrong)[0] == 1
    age(red.state, 31)
    done, errors = red.approve(pyotp.TOTP(BOB).now())
    assert (done, "11 wrong codes" in errors) == (1, True), "the second wait is longer"
    age(red.state, 30)
    assert red.approve(pyotp.TOTP(BOB).now())[0] == 0, "a right code is not locked out"


def age(state: Path, seconds: float) -> None:
    """Let time pass for the ledger."""
    path = state / "interview-ops" / "approvals" / "codes.json"
    ledger = json.loads(path.read_text())
    path.write_text(json.dumps({**ledger, "wrong": [at - seconds for at in ledger["wrong"]]}))


def test_a_kill_after_the_record_loses_the_code_and_nothing_else(sites: tuple[Site, Site, Site]) -> None:
    blue, *_ = sites
    killed, second = blue.start("approval: code used"), blue.start()
    code = fresh_code(BOB)
    assert answer(killed, code)[0] == -9
    assert blue.old.exists()
    done, errors = answer(second, code)
    assert (done, "was used before" in errors) == (1, True), errors
    assert blue.old.exists()
    assert blue.approve(pyotp.TOTP(ALICE).now())[0] == 0
    assert not blue.old.exists()


def test_a_code_of_the_future_or_older_than_the_last_used_one_is_refused(sites: tuple[Site, Site, Site]) -> None:
    *_, red = sites
    runs = [site.start() for site in sites]
    fresh_code(BOB)
    totp, now = pyotp.TOTP(BOB), datetime.now(UTC)
    done, errors = answer(runs[0], totp.at(now, counter_offset=1))
    assert (done, "the code is wrong" in errors) == (1, True), errors
    assert answer(runs[1], totp.at(now))[0] == 0
    done, errors = answer(runs[2], totp.at(now, counter_offset=-1))
    assert (done, "was used before, or a newer one was" in errors) == (1, True), errors
    assert red.old.exists()
