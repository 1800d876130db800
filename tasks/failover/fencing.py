"""Evidence that the old primary is stopped and cannot start again: without it there would be two primaries (§8.3)."""

from __future__ import annotations

import contextlib
import os
import socket
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from blocks.services.service import Services
from runbook.errors import OpsError, Unreachable
from runbook.files import durable
from runbook.files.durable import sync
from runbook.guard.brief import asked_briefly
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.host.disk import is_here
from tasks.postgres.replication.synchronous import address
from tasks.stores.directory import told

FENCE = "fence"
CONNECT_SECONDS = 2.0
SIGNAL = "standby.signal"
BOOT = "its service is disabled at boot"


@dataclass(frozen=True)
class FenceEvidence:
    """One condition. `holds` None: it cannot be checked from here. `by_run`: it does not hold yet, and `keep_down`
    makes it hold."""

    what: str
    holds: bool | None
    seen: str
    hint: str = ""
    by_run: bool = False


@dataclass(frozen=True)
class Fencing:
    """All evidence about one server."""

    server: str
    rows: tuple[FenceEvidence, ...]

    @property
    def proven(self) -> bool:
        """Every condition was seen to hold."""
        return all(row.holds for row in self.rows)

    @property
    def against(self) -> tuple[FenceEvidence, ...]:
        """The conditions that do not hold: the server runs, or would be started again."""
        return tuple(row for row in self.rows if row.holds is False and not row.by_run)

    @property
    def by_run(self) -> tuple[FenceEvidence, ...]:
        """The conditions that `keep_down` makes hold."""
        return tuple(row for row in self.rows if row.holds is False and row.by_run)

    @property
    def unknown(self) -> tuple[FenceEvidence, ...]:
        """The conditions that a person has to attest."""
        return tuple(row for row in self.rows if row.holds is None)

    def require(self, attested: str, *, kept_down: bool = True) -> None:
        """Check that the server may be replaced. `kept_down=False`: before `keep_down`.

        Raises:
            OpsError: it runs, would be started again, or is neither proven nor attested to be fenced.
        """
        if against := (*self.against, *(self.by_run if kept_down else ())):
            first = against[0]
            raise OpsError(f"{self.server} is not fenced: {first.what}: {first.seen}", first.hint)
        if self.unknown and not attested:
            first = self.unknown[0]
            raise OpsError(f"{self.server} is not proven to be fenced: {first.what}: {first.seen}", first.hint)


@probe
def find_fencing(services: Services, postgres: Postgres) -> Fencing:
    """See `fencing_of`."""
    return fencing_of(services, postgres)


def fencing_of(services: Services, postgres: Postgres) -> Fencing:
    """Check its port, supervisor, boot and processes now."""
    supervised = _supervisor(services, postgres)
    rows = (_port(postgres), supervised, _boot(services, postgres), _processes(postgres, supervised))
    return Fencing(address(postgres), rows)


ATTEST = (
    "have a person power it off or isolate it, and give the person's name and the method in fenced_by, e.g. "
    "“Yamada, power off by iDRAC”"
)
DRILL = "the drill"
"""Who attests the fence of a drill, which kills the servers itself. Accepted in disposable environments only."""


def named_person(fenced_by: str, *environments: Environment) -> str:
    """Return the attestation of a fence: a person of the environments, then the method; "" without one.

    Raises:
        OpsError: it begins with no name of theirs, or they name nobody.
    """
    given = unicodedata.normalize("NFKC", " ".join(fenced_by.split()))
    if not given or (_begins_with(given, DRILL) and all(one.disposable for one in environments)):
        return given
    names = _people(environments)
    if not names:
        raise OpsError(
            f"fenced_by names a person, and {environments[0].name} has no people configured",
            "add the person under [alerts.contacts] of its TOML (lines to paste: docs/failover.md), register it with "
            f"python -m deployments.register {environments[0].name}, then run this again",
        )
    if not any(_begins_with(given, name) for name in names):
        raise OpsError(
            f"fenced_by “{given[:40]}” does not begin with the name of a person of {environments[0].name}",
            f"begin it with the person who fenced it ({', '.join(names)}), then the method",
        )
    return given


def _people(environments: Sequence[Environment]) -> list[str]:
    """The people of [alerts] (a contact without a name by its key) and [approval]."""
    names = list[str]()
    with asked_briefly():  # Prefect may be what is down
        for env in environments:
            contacts = env.alerts.contacts if env.has("alerts") else {}
            names += [one.name or key for key, one in contacts.items()]
            names += env.approval.approvers if env.has("approval") else []
    return list(dict.fromkeys(names))


def _begins_with(given: str, name: str) -> bool:
    """Whether a word ends where the name does."""
    name = unicodedata.normalize("NFKC", name).casefold()
    rest = given.casefold().removeprefix(name)
    return given.casefold().startswith(name) and not rest[:1].isalnum()


def _port(postgres: Postgres) -> FenceEvidence:
    what = "its port is closed"
    try:
        _knock(postgres)
    except (ConnectionRefusedError, FileNotFoundError):
        return FenceEvidence(what, True, f"{address(postgres)} refuses connections")
    except OSError as error:
        return FenceEvidence(what, None, f"{address(postgres)} cannot be reached ({error})", ATTEST)
    return FenceEvidence(
        what,
        False,
        f"{address(postgres)} accepts connections",
        "run it with mode=planned if the server answers, otherwise with fence=true: its supervisor stops it then",
    )


def _knock(postgres: Postgres) -> None:
    if not postgres.host.startswith("/"):
        socket.create_connection((postgres.host, postgres.port), CONNECT_SECONDS).close()
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knocking:
        knocking.settimeout(CONNECT_SECONDS)
        knocking.connect(str(Path(postgres.host, f".s.PGSQL.{postgres.port}")))


def _supervisor(services: Services, postgres: Postgres) -> FenceEvidence:
    what = "its supervisor does not run or restart it"
    try:
        state = services.state(postgres.service)
    except Unreachable as error:
        return FenceEvidence(what, None, error.message, ATTEST)
    except OpsError as error:
        return FenceEvidence(what, None, error.message, error.hint or ATTEST)
    seen = f"{services.names[postgres.service]}: {state.told}" + (f", process {state.pid}" if state.pid else "")
    return FenceEvidence(
        what,
        not state.comes_back,
        seen,
        f"run this with fence=true, or stop {services.names[postgres.service]} there: its supervisor would restart it",
    )


def _boot(services: Services, postgres: Postgres) -> FenceEvidence:
    """A stopped unit is not enough: a reboot starts an enabled one."""
    role, data = postgres.service, Path(postgres.data_directory)
    try:
        name, reason = services.name_of(role), services.starts_at_boot(role)
    except Unreachable as error:
        return FenceEvidence(BOOT, None, error.message, ATTEST)
    except OpsError as error:
        return FenceEvidence(BOOT, None, error.message, error.hint or ATTEST)
    if not reason:
        return FenceEvidence(BOOT, True, f"{name} is disabled or masked")
    if services.can_disable:
        seen, hint = f"{name}: {reason}", services.how_to_disable(role)
        return FenceEvidence(BOOT, False, seen, hint, by_run=services.stays_disabled(role))
    seen, files = f"{name}: {reason}", is_here(postgres.host) and (data / "PG_VERSION").exists()
    if files and (data / SIGNAL).exists():
        return FenceEvidence(BOOT, True, f"{seen}; it would start as a standby ({SIGNAL} is in {data})")
    return FenceEvidence(BOOT, False, seen, services.how_to_disable(role), by_run=files)


def _processes(postgres: Postgres, supervised: FenceEvidence) -> FenceEvidence:
    what = "no process of it is left"
    if not is_here(postgres.host):
        return FenceEvidence(what, supervised.holds, f"by its supervisor: {supervised.seen}", supervised.hint)
    left, unseen = look_for_processes(Path(postgres.data_directory))
    if unseen and not left:
        seen = f"this user cannot inspect the processes of {unseen} servers; by its supervisor: {supervised.seen}"
        return FenceEvidence(what, supervised.holds, seen, supervised.hint)
    return FenceEvidence(
        what,
        not left,
        f"processes {', '.join(map(str, left[:5]))}" if left else "none",
        "end them, the oldest first (kill -INT)",
    )


def look_for_processes(data: Path) -> tuple[list[int], int]:
    """The processes of this host whose working directory is that data directory, as of every server process; and of how
    many servers this user cannot inspect the processes."""
    wanted, found, unseen = os.path.realpath(data), [], 0
    for process in psutil.process_iter():
        try:
            if os.path.realpath(process.cwd()) == wanted and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.AccessDenied, PermissionError):
            with contextlib.suppress(psutil.Error):
                unseen += process.name() in ("postgres", "postmaster")
        except (psutil.Error, OSError):
            continue
    return sorted(found), unseen


@action(of=lambda postgres: Act(FENCE, address(postgres)), idempotent=True)
def keep_down(services: Services, postgres: Postgres) -> FenceEvidence:
    """Disable the service of a stopped server at boot. If its files are on this host, also make it start as a standby,
    which takes no writes. The fence is checked again right before the promotion."""
    if services.can_disable:  # only after the stop: a masked unit can no longer be stopped
        with contextlib.suppress(OpsError):
            services.disable(postgres.service)
    return _mark(postgres)


@action(of=lambda postgres: Act(FENCE, address(postgres)), idempotent=True)
def mark_standby(postgres: Postgres) -> FenceEvidence:
    """Make a server of this host start as a standby, which takes no writes."""
    return _mark(postgres)


def _mark(postgres: Postgres) -> FenceEvidence:
    what, data = "if started by hand, it takes no writes", Path(postgres.data_directory)
    if not is_here(postgres.host):
        return FenceEvidence(what, None, "not checked: its files are on another host")
    if not (data / "PG_VERSION").exists():
        return FenceEvidence(what, True, f"{data} has no cluster")
    give_like(data, data / SIGNAL, "")
    return FenceEvidence(what, True, f"{SIGNAL} is in {data}")


@action(idempotent=True)
def allow_start(services: Services, role: str) -> str:
    """Enable a service that `keep_down` disabled. Returns what is left to do by hand, "" for nothing."""
    return services.enable(role)


def remove_signal(postgres: Postgres) -> None:
    """Make a stopped server of this host start as the primary that it was. The other host's standby may have the same
    path here.

    Raises:
        OpsError: the file cannot be removed.
    """
    if not is_here(postgres.host):
        return
    data = Path(postgres.data_directory)
    with told(data / SIGNAL):
        (data / SIGNAL).unlink(missing_ok=True)
        if data.is_dir():
            sync(data)


def give_like(data: Path, path: Path, text: str) -> None:
    """Write a file atomically. It gets the owner of the data directory."""
    owner = data.stat()
    durable.write(path, text, mode=0o600, owner=(owner.st_uid, owner.st_gid))
