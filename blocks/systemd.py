"""Services that are systemd units, on this host or on another."""

from __future__ import annotations

import contextlib
import shlex

from pydantic import Field

from blocks.services import CALL_SECONDS, MASK, Services, ServiceState
from runbook import shell
from runbook.errors import CommandFailed, OpsError, Unreachable

# https://www.freedesktop.org/software/systemd/man/latest/systemctl.html: in these a unit's process is there.
RUNS = ("active", "reloading", "refreshing", "deactivating")
ENDED = ("inactive", "failed")
SSH_FAILED, NO_TRANSPORT = 255, "Transport endpoint is not connected"  # ssh's exit code; what systemctl says of its end
LOG_SECONDS = 30
SHOWN = "LoadState,ActiveState,SubState,MainPID,UnitFileState,Type,RemainAfterExit,ConsistsOf"


class SystemdServices(Services):
    """systemd units, on this host or on another (`systemctl -H`).

    Debian's `postgresql` is a unit without a process: it is active while its server is dead, and stopped while that
    still ends. Such a name means the one unit that is part of it (`postgresql@17-main`).
    """

    _block_type_name = "Ops systemd services"
    _block_type_slug = "ops-systemd"

    host: str = Field(default="", description="user@host for another host; empty for this one")

    @property
    def is_here(self) -> bool:
        """Where no other host is named."""
        return not self.host

    def start(self, role: str) -> None:
        """`systemctl start`, also where systemd has given the unit up because it ended too often."""
        unit = self._unit(role)
        with contextlib.suppress(CommandFailed):  # there is nothing to forget
            self._systemctl("reset-failed", unit)
        self._systemctl("start", unit)

    def stop(self, role: str) -> None:
        """`systemctl stop`: returns when the unit's processes have exited."""
        self._systemctl("stop", self._unit(role))

    def is_running(self, role: str) -> bool:
        """Whether its process runs; one that waits for its restart does not.

        Raises:
            OpsError: systemd knows no such unit.
        """
        return self._shown(self._unit(role)).get("ActiveState") in RUNS

    def state(self, role: str) -> ServiceState:
        """`systemctl show`: a unit that waits for its restart is "activating"."""
        found = self._shown(self._unit(role))
        active = found.get("ActiveState", "")
        told = f"{active} ({found.get('SubState', '')}), {found.get('UnitFileState') or 'not enabled'}"
        return ServiceState(told, int(found.get("MainPID") or 0), active not in ENDED)

    def logs(self, role: str, lines: int = 50) -> str:
        """`journalctl -u`."""
        argv = ["journalctl", "-u", self._unit(role), "-n", str(lines), "--no-pager"]
        if self.host:  # journalctl has no --host; systemctl's own is ssh too
            argv = ["ssh", "-o", "BatchMode=yes", self.host, shlex.join(argv)]
        return self._run(argv, LOG_SECONDS)

    def environment(self, role: str) -> dict[str, str]:
        """`systemctl show --property=Environment`, masked: the command itself prints secrets."""
        text = self._systemctl("show", self._unit(role), "--property=Environment").removeprefix("Environment=")
        return {word.split("=", 1)[0]: MASK for word in shlex.split(text) if "=" in word}

    def _unit(self, role: str) -> str:
        """The unit that has the role's process."""
        name = self.name_of(role)
        found = self._shown(name)
        instance = name.removesuffix(".service") + "@"
        parts = [part for part in found.get("ConsistsOf", "").split() if part.startswith(instance)]
        if not parts or (found.get("Type"), found.get("RemainAfterExit")) != ("oneshot", "yes"):
            return name
        if len(parts) > 1:
            raise OpsError(f"{name} stands for {', '.join(parts)}", "name the one that is meant under [services.names]")
        return parts[0]

    def _shown(self, unit: str) -> dict[str, str]:
        text = self._systemctl("show", unit, f"--property={SHOWN}", seconds=LOG_SECONDS)
        found = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        if found.get("LoadState") == "not-found":  # "inactive" too
            raise OpsError(f"systemd knows no unit {unit}", "correct it under [services.names]")
        return found

    def _systemctl(self, *words: str, seconds: float = CALL_SECONDS) -> str:
        host = ["--host", self.host] if self.host else []
        return self._run(["systemctl", *host, *words], seconds)

    def _run(self, argv: list[str], seconds: float) -> str:
        try:
            return shell.run(argv, environment={"LC_ALL": "C"}, inherit=shell.SSH, timeout_seconds=seconds).stdout
        except CommandFailed as error:
            if self.host and (error.exit_code == SSH_FAILED or NO_TRANSPORT in error.stderr):
                reason = next(iter(error.stderr.splitlines()), "")
                raise Unreachable(f"{self.host} cannot be reached: {reason}", f"try: ssh {self.host}") from None
            raise
