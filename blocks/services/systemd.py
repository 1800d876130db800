"""Services that are systemd units, on this host or on another."""

from __future__ import annotations

import contextlib
import shlex
from dataclasses import dataclass

from pydantic import Field

from blocks.hosts import is_here
from blocks.services.service import CALL_SECONDS, Services, ServiceState
from blocks.services.units import ENDED, PROPERTIES, Starter, find_starters
from runbook import shell
from runbook.errors import CommandFailed, OpsError, Unreachable
from runbook.masking import MASK
from runbook.units import counted

# https://www.freedesktop.org/software/systemd/man/latest/systemctl.html: in these a unit's process is there.
RUNS = ("active", "reloading", "refreshing", "deactivating")
SSH_FAILED, NO_TRANSPORT = 255, "Transport endpoint is not connected"  # ssh's exit code; what systemctl says of its end
LOG_SECONDS = 30
SHOWN = (
    "Id,LoadState,ActiveState,SubState,MainPID,UnitFileState,FragmentPath,"
    "Type,RemainAfterExit,ConsistsOf,Wants,UpheldBy"
)
OWN_UNITS = "/etc/systemd/system"


@dataclass(frozen=True)
class _Unit:
    """A unit, and whose: user@host, "" for this machine."""

    name: str
    host: str


class SystemdServices(Services):
    """systemd units, on this host or on others (`systemctl -H`).

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
        """`systemctl start`, also where systemd has given the unit up because it ended too often. Where it is being
        stopped, systemd starts it afterwards (systemd.unit(5): a start job waits for the end)."""
        unit = self._unit(role)
        with contextlib.suppress(CommandFailed):  # there is nothing to forget
            self._systemctl(unit.host, "reset-failed", unit.name)
        try:
            self._systemctl(unit.host, "start", unit.name)
        except CommandFailed:
            if self._shown(unit).get("UnitFileState") != "masked":
                raise
            hint = f"it was fenced: rejoin-standby unmasks it; where it must take writes: systemctl unmask {unit.name}"
            raise OpsError(f"{unit.name} is masked", hint) from None

    def _stop(self, role: str) -> None:
        """`systemctl stop`: returns when the unit's processes have exited."""
        unit = self._unit(role)
        self._systemctl(unit.host, "stop", unit.name)

    def is_running(self, role: str) -> bool:
        """Whether its process runs; one that waits for its restart does not.

        Raises:
            OpsError: systemd knows no such unit.
        """
        return self._shown(self._unit(role)).get("ActiveState") in RUNS

    def state(self, role: str) -> ServiceState:
        """`systemctl show`: a unit that waits for its restart is "activating"; one that an active unit upholds is
        started again at once."""
        unit = self._unit(role)
        found = self._shown(unit)
        active, state = found.get("ActiveState", ""), found.get("UnitFileState") or "not enabled"
        text, comes_back = f"{active} ({found.get('SubState', '')}), {state}", active not in ENDED
        if not comes_back and state != "masked" and found.get("UpheldBy"):
            upheld = [one.text for one in self._starters(unit) if one.relation == "Upholds" and one.is_active]
            text, comes_back = f"{text}, kept up by {', '.join(upheld)}" if upheld else text, bool(upheld)
        return ServiceState(text, int(found.get("MainPID") or 0), comes_back)

    def starts_at_boot(self, role: str) -> str:
        """As `systemctl is-enabled`: only a masked unit, or a disabled one that no other unit starts, stays stopped."""
        unit = self._unit(role)
        state = self._shown(unit).get("UnitFileState") or "not enabled"
        starters = [] if state == "masked" else self._starters(unit)
        if state == "masked" or (state == "disabled" and not starters):
            return ""
        return state + (f", started by {', '.join(one.text for one in starters)}" if starters else "")

    def how_to_disable(self, role: str) -> str:
        """`systemctl mask`. Where the unit's own file is in the place of the mask, it and its starters are disabled."""
        unit = self._unit(role)
        if not self._refuses_mask(unit):
            return f"there: systemctl mask {unit.name}"
        starters = self._starters(unit)
        causes = sorted({cause for one in starters for cause in one.causes if not cause.endswith(".target")})
        commands = [f"systemctl disable --now {' '.join([unit.name, *causes])}"]
        if self._shown(unit).get("UnitFileState") == "disabled":
            targets = (one.unit for one in starters if one.is_target)
            commands += [f"systemctl edit --full {name} (delete {unit.name} there)" for name in targets]
        return f"there: {'; '.join(commands)}"

    def stays_disabled(self, role: str) -> bool:
        """A masked unit is started by no other; one that is only disabled by each unit that depends on it."""
        unit = self._unit(role)
        if not self._refuses_mask(unit):
            return True
        is_disabled = self._shown(unit).get("UnitFileState") == "disabled"
        return all(one.is_target and not is_disabled for one in self._starters(unit))

    def disable(self, role: str) -> None:
        """`systemctl mask`; `disable` where the unit's own file is in the place of the mask (/etc/systemd/system)."""
        unit = self._unit(role)
        try:
            self._change_file(unit, "mask")
        except CommandFailed:
            self._change_file(unit, "disable")

    def enable(self, role: str) -> str:
        """`systemctl unmask`. One that is disabled stays so: somebody else may have disabled it."""
        unit = self._unit(role)
        found = self._shown(unit).get("UnitFileState")
        if found == "masked":
            self._change_file(unit, "unmask")
        elif found == "disabled":
            return f"its unit is disabled, and does not start at boot: systemctl enable {unit.name}"
        return ""

    def variables_obstacle(self, role: str, directory: str) -> str:
        """What it would take is known, and was not tried on a real systemd."""
        return (
            f"{self.name_of(role)} is a systemd unit: it would take a drop-in with Environment=LD_PRELOAD=… in "
            f"/run/systemd/system/{self.name_of(role)}.service.d, which a drill does not write"
        )

    def start_command(self, role: str) -> str:
        """`systemctl start`."""
        host = self._host(role)
        return f"systemctl {f'--host {host} ' if host else ''}start {self.name_of(role)}"

    def last_end(self, role: str) -> str:
        """`systemctl show`: only systemd's own restarts are counted, after an end that nobody asked for."""
        count = int(self._property(self._unit(role), "NRestarts") or 0)
        return f"exited unexpectedly: systemd has started it again {counted(count, 'time')}" if count else ""

    def logs(self, role: str, lines: int = 50) -> str:
        """`journalctl -u`."""
        unit = self._unit(role)
        return self._there(unit.host, "journalctl", "-u", unit.name, "-n", str(lines), "--no-pager")

    def environment(self, role: str) -> dict[str, str]:
        """`systemctl show --property=Environment`, masked: the command itself prints secrets."""
        text = self._property(self._unit(role), "Environment")
        return {word.split("=", 1)[0]: MASK for word in shlex.split(text) if "=" in word}

    def _host(self, role: str) -> str:
        """Where `systemctl -H` leads for a role: nowhere on the machine itself, whose worker reads the same TOML."""
        host = self.hosts.get(role, self.host)
        return "" if is_here(host.rpartition("@")[2]) else host

    def _unit(self, role: str) -> _Unit:
        """The unit that has the role's process."""
        unit = _Unit(self.name_of(role), self._host(role))
        found = self._shown(unit)
        instance = unit.name.removesuffix(".service") + "@"
        # A masked one is no part of anything, and still wanted.
        named = f"{found.get('ConsistsOf', '')} {found.get('Wants', '')}".split()
        parts = sorted({part for part in named if part.startswith(instance)})
        if not parts or (found.get("Type"), found.get("RemainAfterExit")) != ("oneshot", "yes"):
            return unit
        if len(parts) > 1:
            raise OpsError(
                f"{unit.name} stands for {', '.join(parts)}", "name the one that is meant under [services.names]"
            )
        return _Unit(parts[0], unit.host)

    def _shown(self, unit: _Unit) -> dict[str, str]:
        text = self._systemctl(unit.host, "show", unit.name, f"--property={SHOWN}", seconds=LOG_SECONDS)
        found = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        if found.get("LoadState") == "not-found":  # "inactive" too
            raise OpsError(f"systemd knows no unit {unit.name}", "correct it under [services.names]")
        return found

    def _starters(self, unit: _Unit) -> list[Starter]:
        """What starts it, of the units that this systemd has loaded: all that are active or enabled."""
        text = self._systemctl(unit.host, "show", "--all", "*", f"--property={PROPERTIES}", seconds=LOG_SECONDS)
        return find_starters(text, self._shown(unit).get("Id", unit.name))

    def _refuses_mask(self, unit: _Unit) -> bool:
        found = self._shown(unit)
        return found.get("FragmentPath") == f"{OWN_UNITS}/{found.get('Id')}"

    def _property(self, unit: _Unit, name: str) -> str:
        """One property, which may have several lines."""
        text = self._systemctl(unit.host, "show", unit.name, f"--property={name}", seconds=LOG_SECONDS)
        return text.strip().removeprefix(f"{name}=")

    def _change_file(self, unit: _Unit, verb: str) -> None:
        """Not by `systemctl -H`: on a worker without systemd (a container's) that changes the worker's own files, and
        reports success. src/systemctl/systemctl-util.c: install_client_side"""
        self._there(unit.host, "systemctl", verb, unit.name)

    def _there(self, host: str, *argv: str) -> str:
        """A program that has no `--host`; systemctl's own is ssh too."""
        return self._run(host, ["ssh", "-o", "BatchMode=yes", host, shlex.join(argv)] if host else [*argv], LOG_SECONDS)

    def _systemctl(self, host: str, *words: str, seconds: float = CALL_SECONDS) -> str:
        return self._run(host, ["systemctl", *(["--host", host] if host else []), *words], seconds)

    def _run(self, host: str, argv: list[str], seconds: float) -> str:
        try:
            return shell.run(argv, environment={"LC_ALL": "C"}, inherit=shell.SSH, timeout_seconds=seconds).stdout
        except CommandFailed as error:
            if host and (error.exit_code == SSH_FAILED or NO_TRANSPORT in error.stderr):
                reason = next(iter(error.stderr.splitlines()), "")
                raise Unreachable(f"{host} cannot be reached: {reason}", f"try: ssh {host}") from None
            raise
