"""Faults declared in a file: slow or refused connections (by a relay), a failing AI provider, a full disk, a service
with a wrong clock.

`heal_declared` ends each of them, also after a kill: the relay and the proxy have a control address; the file that
fills a disk and the file that changes a service's start have fixed names. A fault that cannot be made in an environment
is refused with the reason.
"""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from blocks.ai_providers import Provider, ProviderFault
from blocks.environment import Environment
from runbook import clock
from runbook.errors import OpsError, Unreachable
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.units import duration, size
from tasks.ai.answer import Failed
from tasks.ai.http import call
from tasks.faults import clock as service_clock
from tasks.faults.disposable import BREAK, Fault, require_disposable
from tasks.faults.providers import fail_provider, heal_providers, provider, read_provider_states

FILLING = ".filled-by-a-drill"
MOST_DISK_BYTES = 4 << 30
MOST_AHEAD_SECONDS = 10 * 366 * 86400.0
SECONDS = 10.0
UNNOTICED_SECONDS, UNNOTICED_BYTES = 1.0, 4096
"""The size of a fault without an effect: far below every limit."""


class DeclaredFault(BaseModel):
    """`[fault]` of a declared drill. Which keys belong to which `kind`: docs/declared-drills.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["latency", "refused", "timeout", "provider", "full_disk", "clock"]
    control: str = Field(default="", pattern=r"^(http://[\w.-]+:\d{1,5})?$")
    """Of latency, refused and timeout: the control address of the relay."""
    provider: Provider = "azure"
    error: ProviderFault = "500"
    delay_seconds: float = Field(default=0.0, ge=0, le=60)
    directory: str = ""
    """full_disk: a dedicated mount point. clock under supervisor: the directory of `*.conf` in its `[include]`."""
    leave_bytes: int = Field(default=0, ge=0)
    service: str = ""
    """Of clock: the role whose process gets a wrong clock."""
    ahead_seconds: float = Field(default=0.0, ge=-MOST_AHEAD_SECONDS, le=MOST_AHEAD_SECONDS)

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.kind in ("latency", "refused", "timeout") and not self.control:
            raise ValueError(f"{self.kind} needs control, the relay's address, e.g. http://127.0.0.1:6401")
        if self.kind == "latency" and not self.delay_seconds:
            raise ValueError("latency needs delay_seconds")
        if self.kind == "full_disk" and not Path(self.directory).is_absolute():
            raise ValueError("full_disk needs directory, an absolute path")
        if self.kind == "clock" and not (self.service and abs(self.ahead_seconds) > clock.MOST_SKEW_SECONDS):
            raise ValueError(f"clock needs service and ahead_seconds, more than ±{clock.MOST_SKEW_SECONDS:g}")
        return self

    def target(self, env: Environment) -> str:
        """Return the target of the act."""
        match self.kind:
            case "provider":
                return provider(env, self.provider)
            case "full_disk":
                return f"disk {self.directory} of {env.name}"
            case "clock":
                return f"clock of {self.service} of {env.name}"
        return f"relay {self.control} of {env.name}"

    @property
    def text(self) -> str:
        """For the report."""
        delay = f" ({self.delay_seconds:g} s)" if self.delay_seconds else ""
        match self.kind:
            case "provider":
                return f"AI provider {self.provider}: {self.error}{delay}"
            case "full_disk":
                return f"{self.directory} is full but for {size(self.leave_bytes)}"
            case "clock":
                how = "ahead" if self.ahead_seconds > 0 else "behind"
                return f"the clock of {self.service} is {duration(abs(self.ahead_seconds))} {how}"
        return f"{self.kind}{delay} at the relay {self.control}" if self.control else self.kind


@probe
def read_obstacle(env: Environment, fault: DeclaredFault) -> str:
    """Why the fault cannot be made here, and the next step; "" if it can.

    Raises:
        OpsError: the environment is not disposable.
    """
    require_disposable(env)
    try:
        match fault.kind:
            case "clock":
                return service_clock.obstacle(env, fault.service, fault.directory)
            case "full_disk":
                return _disk_obstacle(Path(fault.directory))
            case "provider":
                if not env.has("ai_providers") or not env.ai_providers.control:
                    return "[ai_providers] proxy is not set (docs/ai-fallback.md)"
                states = read_provider_states.work(env)
                return (
                    ""
                    if states.get(fault.provider) == "ok"
                    else f"{fault.provider} does not answer even without the fault"
                )
        state = _relay(fault, "GET", "/health")
        if not state.get("relay"):
            return f"{fault.control} is not a relay: run python -m tasks.faults.relay"
        if state.get("fault"):
            return f"the relay has a fault already: {state['fault']}"
        return "" if int(str(state.get("connections", 0))) else "the application does not connect through the relay"
    except OpsError as error:
        return f"{error.message} — {error.hint}"


@action(of=lambda env, fault: Act(BREAK, fault.target(env)), idempotent=True)
def strike_declared(env: Environment, fault: DeclaredFault) -> Fault:
    """Make the fault.

    Raises:
        OpsError: the environment is not disposable, or the fault cannot be made here.
    """
    require_disposable(env)
    began = datetime.now(UTC)
    match fault.kind:
        case "clock":
            service_clock.set_clock(env, fault.service, fault.directory, fault.ahead_seconds)
        case "provider":
            fail_provider.work(env, fault.provider, fault.error, fault.delay_seconds)
        case "full_disk":
            _fill(Path(fault.directory), fault.leave_bytes)
        case _:
            _relay(
                fault,
                "POST",
                "/control/relay",
                {"failing": True, "fault": fault.kind, "delay_seconds": fault.delay_seconds},
            )
    return Fault(fault.text, began, datetime.now(UTC))


@action(idempotent=True)
def heal_declared(env: Environment, fault: DeclaredFault) -> None:
    """End the fault. Without a permit: a lost lock or a containment must not keep it active.

    Raises:
        Unreachable, OpsError: it could not be ended.
    """
    require_disposable(env)
    match fault.kind:
        case "clock":
            service_clock.reset_clock(env, fault.service, fault.directory)
        case "provider":
            heal_providers.work(env, [fault.provider])
        case "full_disk":
            (Path(fault.directory) / FILLING).unlink(missing_ok=True)
        case _:
            _relay(fault, "POST", "/control/relay", {"failing": False})


@action(of=lambda env, fault: Act(BREAK, fault.target(env)), idempotent=True)
def strike_without_effect(env: Environment, fault: DeclaredFault) -> bool:
    """The negative control: the same fault without an effect (a latency of 1 ms, 4 kB of a disk, a clock that is 1 s
    ahead). Returns whether this kind has one: a provider has none.

    Raises:
        Unreachable, OpsError: it cannot be made.
    """
    require_disposable(env)
    match fault.kind:
        case "provider":
            return False
        case "clock":
            service_clock.set_clock(env, fault.service, fault.directory, UNNOTICED_SECONDS)
        case "full_disk":
            directory = Path(fault.directory)
            _fill(directory, shutil.disk_usage(directory).free - UNNOTICED_BYTES)
        case _:
            _relay(fault, "POST", "/control/relay", {"failing": True, "fault": "latency", "delay_seconds": 0.001})
    return True


def _disk_obstacle(directory: Path) -> str:
    if not directory.is_mount() or directory == Path("/"):
        return f"{directory} is not a mount point: a full disk needs a dedicated file system"
    if (total := shutil.disk_usage(directory).total) > MOST_DISK_BYTES:
        return f"{directory} has {size(total)}, more than {size(MOST_DISK_BYTES)}"
    return ""


def _fill(directory: Path, leave_bytes: int) -> None:
    """With one file of a fixed name, allocated and not written."""
    if obstacle := _disk_obstacle(directory):
        raise OpsError(obstacle, "mount a small file system there, e.g. tmpfs")
    path = directory / FILLING
    path.unlink(missing_ok=True)
    wanted = shutil.disk_usage(directory).free - leave_bytes
    if wanted <= 0:
        return
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, wanted)
            failpoint("fault: disk filled")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OpsError(
            f"{directory} cannot be filled: {error.strerror}", "run the worker as the owner of that directory"
        ) from None


def _relay(
    fault: DeclaredFault, method: str, path: str, body: dict[str, bool | str | float] | None = None
) -> dict[str, object]:
    try:
        return call(method, fault.control + path, {}, SECONDS, body, proxied=False)
    except Failed as error:
        kind = Unreachable if error.kind in ("unreachable", "hangs") else OpsError
        raise kind(f"the relay at {fault.control}: {error.said}", "run python -m tasks.faults.relay there") from None
