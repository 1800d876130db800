"""One-time codes of approvers (TOTP, RFC 6238): each approves one plan in one run. Wrong codes slow down all attempts.

The ledger of used and wrong codes belongs to the host, not to an environment: one approver's code is valid in all of
them. A use is also recorded in Prefect, which workers on other hosts share.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyotp
from prefect.client.schemas.actions import VariableCreate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from runbook.errors import OpsError
from runbook.files import durable
from runbook.files.state import private_directory, state_directory
from runbook.guard.brief import answered, impatient_client
from runbook.target import Approvals
from runbook.wait import until

WINDOW = (0, -1)
"""A code of the step before is valid too, because typing takes time (RFC 6238, 5.2). An app whose clock is right never
shows a code of a future step."""
STEP_SECONDS = 30
"""RFC 6238, 4.1: the default, which authenticator apps assume."""
KEPT_SECONDS = 86400.0
FREE_ATTEMPTS = 10
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 30.0, 900.0
"""After `FREE_ATTEMPTS` wrong codes in a day each one doubles the wait. A right code is never locked out for longer."""
LOCK_SECONDS = 10.0
MOST_VARIABLES = 200


class CodeRefused(OpsError):
    """A code that approves nothing: the run asks again."""


@dataclass(frozen=True)
class CodeUse:
    """The plan that a code approves. `owner`: the attempt of a run, in one process."""

    environment: str
    plan: str
    owner: str


@dataclass(frozen=True)
class ApproverCode:
    """A right code. `identity`: the same for one secret under any name in any environment; it does not reveal it."""

    name: str
    step: int
    identity: str


@dataclass
class _Ledger:
    """`used`: identity → step → use; `wrong`: the times of wrong codes, in seconds since 1970. Both of the last day."""

    used: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    wrong: list[float] = field(default_factory=list)

    def refuse_reused(self, code: ApproverCode) -> None:
        if code.step <= max(map(int, self.used.get(code.identity, {})), default=-1):
            raise CodeRefused(
                f"this code of {code.name} was used before, or a newer one was", "wait for the app's next code"
            )

    def refuse_haste(self, now: float) -> None:
        wait = wait_seconds(len(self.wrong))
        left = min(wait, max(self.wrong, default=0.0) + wait - now)
        if left > 0:
            raise CodeRefused(
                f"{len(self.wrong)} wrong codes were typed on this host within a day: none is read for {left:.0f} s",
                "wait, then type the code that the approver's app shows",
            )

    def prune(self, now: float) -> None:
        self.wrong = [at for at in self.wrong if abs(now - at) < KEPT_SECONDS]
        for steps in self.used.values():
            for old in sorted(steps, key=int)[:-1]:  # the last one stays: no older code is accepted after it
                if now - int(old) * STEP_SECONDS > KEPT_SECONDS:
                    del steps[old]


def wait_seconds(wrong: int) -> float:
    """How long no code is read after the last of so many wrong ones."""
    if wrong < FREE_ATTEMPTS:
        return 0.0
    return min(FIRST_WAIT_SECONDS * 2.0 ** min(wrong - FREE_ATTEMPTS, 30), LONGEST_WAIT_SECONDS)


def find_code(approvals: Approvals, code: str, at: datetime) -> ApproverCode | None:
    """Find the approver whose code it is at that moment."""
    digits = "".join(code.split())
    for name, person in approvals.people().items():
        secret = person.secret.get_secret_value()
        totp = pyotp.TOTP(secret, interval=STEP_SECONDS)
        now = totp.timecode(at)
        for step in (now + offset for offset in WINDOW):
            if digits and pyotp.utils.strings_equal(digits, totp.generate_otp(step)):
                identity = hmac.new(secret.encode(), b"interview-ops used codes", hashlib.sha256).hexdigest()[:16]
                return ApproverCode(name, step, identity)
    return None


def accept(approvals: Approvals, code: str, at: datetime, use: CodeUse, launcher: str) -> ApproverCode:
    """Use up a code for one plan. The use is on disk when this returns. It may be repeated for the same use.

    Raises:
        CodeRefused: it is wrong, was used before, is the launcher's own, or too many codes were wrong.
        OpsError: its use cannot be recorded.
    """
    with _ledger() as ledger:
        found, now = find_code(approvals, code, at), time.time()
        if found and ledger.used.get(found.identity, {}).get(str(found.step)) == asdict(use):
            return found
        ledger.refuse_haste(now)
        if found is None:
            ledger.wrong += [now] if code.strip() else []
            raise CodeRefused(
                "the code is wrong or has expired",
                "type the code that the approver's app shows now; if it is refused too, compare the clocks of this "
                "host and of the phone",
            )
        _refuse_launcher(approvals, found.name, launcher)
        ledger.refuse_reused(found)
        ledger.used.setdefault(found.identity, {})[str(found.step)] = asdict(use)
    return found


def share_use(code: ApproverCode, use: CodeUse) -> None:
    """Record a use in Prefect too, for the workers on other hosts. It may be repeated for the same use.

    Raises:
        CodeRefused: another host recorded it first.
        Unreachable: Prefect does not answer.
    """
    name, value = _variable(code, code.step), dict[str, Any](asdict(use))

    def first() -> bool:
        with impatient_client() as client:
            try:
                client.create_variable(VariableCreate(name=name, value=value))
            except ObjectAlreadyExists:
                known = client.read_variable_by_name(name)
                return known is not None and known.value == value
            return True

    if not answered(first, "the use of a code"):
        raise CodeRefused(f"this code of {code.name} was used before on another host", "wait for the app's next code")
    answered(lambda: _forget_shared(code), "used codes")


def _variable(code: ApproverCode, step: int) -> str:
    return f"used-code-{code.identity}-{step}"


def _forget_shared(code: ApproverCode) -> None:
    """Delete the approver's uses of the days before."""
    last = code.step - int(KEPT_SECONDS) // STEP_SECONDS
    with impatient_client() as client:
        for known in client.read_variables(limit=MOST_VARIABLES):
            prefix, _, step = known.name.rpartition("-")
            if f"{prefix}-" == _variable(code, 0)[:-1] and step.isdecimal() and int(step) < last:
                with contextlib.suppress(ObjectNotFound):  # another run deleted it
                    client.delete_variable_by_name(known.name)


def _refuse_launcher(approvals: Approvals, name: str, launcher: str) -> None:
    own = {one.casefold() for one in (name, *approvals.people()[name].logins)}
    if launcher.strip().casefold() in own:
        raise CodeRefused(f"{name} launched this run and cannot approve it", "ask a second person for a code")


@contextlib.contextmanager
def _ledger() -> Iterator[_Ledger]:
    """The host's ledger, locked. It is written if the block changes it, also when a code is refused."""
    directory = state_directory() / "approvals"
    try:
        directory = private_directory("approvals")
        path = directory / "codes.json"
        with durable.open_lock(directory / ".lock") as lock:
            until(lambda: _locked(lock.fileno()), what="the lock of used codes", seconds=LOCK_SECONDS)
            before = path.read_text(encoding="utf-8") if path.exists() else "{}"
            ledger = _parse(before, directory)
            ledger.prune(time.time())
            try:
                yield ledger
            finally:
                if (after := json.dumps(asdict(ledger))) != before:
                    durable.write(path, after, mode=0o600)
    except OSError as error:
        raise OpsError(
            f"the use of the code cannot be recorded in {directory}: {error.strerror}",
            "free disk space there or correct its owner",
        ) from None


def _parse(text: str, directory: Path) -> _Ledger:
    try:
        return _Ledger(**json.loads(text))
    except (ValueError, TypeError):
        raise OpsError(
            f"the record of used codes in {directory} is damaged",
            "wait two minutes, so that no code in use is valid any more, then delete codes.json there",
        ) from None


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
