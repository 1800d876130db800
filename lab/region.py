"""The second region of a lab, `lab-dr`: other hosts, prepared and empty, to which a failover of the region goes.

They have ports, the lab's passwords, configuration files, and a supervisor that runs nothing: one small process is all
that it costs. There is no cluster, no data of Redis, no application. Common to both regions are their stores (the one's
`[copies]` are the other's `[backups]`), and the file that says where users are sent.

What differs from the lab: one Redis without Sentinels; the AI providers are other companies', so both regions ask the
same ones. The application comes out of a backup with the lab's `.env` in it: `host_settings`, which the programs here
are told to put over that file, has this region's own addresses, and is its `[application] env_file`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from lab.application.install import environment_text
from lab.processes import write
from lab.progress import Tell
from lab.servers import replication, shipping, valkey
from lab.servers.services import LabServices
from lab.servers.supervision import Program
from lab.start import end_orphans
from lab.state.environment import clean_environment
from lab.state.state import LabState, Ports, load_state, save
from runbook.errors import Unreachable

APPLICATION = ("grc-backend", "grc-frontend")


@dataclass(frozen=True)
class SecondRegion(LabServices):
    """Its services: configured, and started by nobody but a failover."""

    providers_url: str = ""

    def programs(self) -> list[Program]:
        """In starting order."""
        told = {"GRC_ENV_FILE": str(self.layout.host_settings)}
        return [
            *replication.programs(self.layout, self.state, self.binaries, self.account),
            shipping.program(self.layout, self.state, self.binaries, self.account),
            valkey.programs(self.layout, self.binaries, self.account)[0],
            *(dataclasses.replace(one, environment=told) for one in super().programs() if one.name in APPLICATION),
        ]

    def settings(self) -> dict[str, str]:
        """What the application is told on these hosts."""
        return {**super().settings(), "REDIS_SENTINELS": "", "AI_PROVIDERS_URL": self.providers_url}

    def configurations(self) -> dict[Path, str]:
        """The text of every configuration file."""
        layout, state = self.layout, self.state
        return {
            **replication.configurations(layout, state, self.binaries),
            layout.valkey_conf: valkey.configurations(layout, state)[layout.valkey_conf],
            layout.host_settings: environment_text(self.settings()),
        }


def of(first: LabServices) -> SecondRegion | None:
    """A lab's second region as it was last prepared; None where it never was."""
    state = load_state(first.layout.second.state)
    return _region(first, state) if state and state.root == str(first.layout.second.root) else None


def prepare(first: LabServices, taken: list[int]) -> SecondRegion:
    """Ports and directories of a lab's second region, on none of the ports `taken`."""
    layout, found = first.layout.second, of(first)
    ports = found.state.ports.completed(taken) if found else Ports.chosen(taken)
    region = _region(first, LabState(str(layout.root), ports, first.state.passwords, first.state.postgres_bin))
    region.create_directories()
    save(layout.state, region.state)
    return region


def bring_up(region: SecondRegion, tell: Tell) -> None:
    """Its configuration and its supervisor. While it serves, everything stays as it is."""
    supervisor = region.supervisor
    try:
        if any(service.pid for service in supervisor.services().values()):
            tell(f"the second region {region.layout.name} runs services: nothing of it is changed")
            return
    except Unreachable:
        end_orphans(region.layout)
    if region.configure():
        supervisor.shutdown()
    if not supervisor.is_running():
        supervisor.launch(clean_environment())
        tell(f"the second region {region.layout.name} is prepared, and runs nothing")


def send_users(first: LabServices, second: LabServices) -> None:
    """Users are sent to the lab, unless a failover has sent them to its second region."""
    endpoint = first.layout.endpoint
    sent = endpoint.read_text().strip() if endpoint.exists() else ""
    if sent not in (first.url, second.url):
        write(endpoint, first.url + "\n", 0o644)


def _region(first: LabServices, state: LabState) -> SecondRegion:
    providers = first.settings()["AI_PROVIDERS_URL"]
    return SecondRegion(first.layout.second, state, first.binaries, first.account, providers_url=providers)
