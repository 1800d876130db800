"""The environment variables by which the blocks, the flows and the worker reach a lab."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from lab.processes import OsAccount
from lab.servers.binaries import Binaries
from lab.state.base import CHECKOUT, PYTHON
from lab.state.layout import ControlLayout, Layout
from lab.state.state import ControlState, LabState


def prefect_variables(layout: ControlLayout, state: ControlState) -> dict[str, str]:
    """What every client of the Prefect server needs, the worker and a person's shell alike."""
    return {
        "PREFECT_HOME": str(layout.home),
        "PREFECT_API_URL": api_url(state),
        "PREFECT_API_AUTH_STRING": auth_string(state),
        "PREFECT_UI_API_URL": api_url(state),
        "PREFECT_UI_URL": ui_url(state),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # With the default of 180 s the zombie automation would end runs that live.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_CLIENT_MAX_RETRIES": "8",
        # Every client reads its authorities anew, hundreds of times in a deployment. Here is nobody to be trusted: the
        # API is plain HTTP on loopback.
        "PREFECT_API_SSL_CERT_FILE": str(Path(__file__).parents[1] / "nobody.pem"),
        "GX_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def api_url(state: ControlState) -> str:
    """The Prefect API."""
    return f"http://127.0.0.1:{state.port}/api"


def auth_string(state: ControlState) -> str:
    """Return user:password of the Prefect API: what its UI asks for, too."""
    return ":".join(state.login)


def server_variables(layout: ControlLayout, state: ControlState) -> dict[str, str]:
    """Return the variables of the Prefect server."""
    return {
        **prefect_variables(layout, state),
        "PREFECT_SERVER_API_AUTH_STRING": auth_string(state),
        # Prefect's default is every origin: any page in a browser on this host could call the API.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{state.port},http://localhost:{state.port}",
        # In memory, a slot that is held when the server restarts would stay taken for ever.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # The recorder (3.9.1) tries the events of a deleted run again, one a flush, and everybody's later tasks
        # wait: of 15 such tasks for 78 s at an interval of 1 s, the least there is. A larger batch is over in 6 s,
        # but fails as a whole: after six times the tasks of healthy runs that are in it are lost.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    }


def ui_url(state: ControlState) -> str:
    """The Prefect UI (v2)."""
    return f"http://127.0.0.1:{state.port}/v2"


def lab_variables(layout: Layout, state: LabState, binaries: Binaries, account: OsAccount) -> dict[str, str]:
    """Where the lab's servers are, and the secrets to log in."""
    ports, passwords = state.ports, state.passwords
    return {
        "OPS_ROOT": str(CHECKOUT),
        **_place("OPS_LAB", layout, state),
        **{f"OPS_LAB_SENTINEL_{number}_PORT": str(port) for number, port in enumerate(ports.sentinels, 1)},
        "OPS_LAB_ENDPOINT": str(layout.endpoint),
        "OPS_LAB_AI_PROVIDERS_PORT": str(ports.ai_providers),
        "OPS_LAB_USER": account.name,
        "OPS_LAB_LANGUAGE": state.language,
        "OPS_LAB_POSTGRES_BIN": str(binaries.postgres),
        "OPS_LAB_REDIS_PROGRAM": str(binaries.redis),
        "OPS_LAB_PYTHON": str(PYTHON),
        "OPS_POSTGRES_PASSWORD": passwords.postgres,
        "OPS_POSTGRES_ADMIN_PASSWORD": passwords.postgres_admin,
        "OPS_REDIS_PASSWORD": passwords.redis,
        "OPS_SUPERVISOR_PASSWORD": passwords.supervisor,
        "OPS_APPLICATION_PASSWORD": passwords.application,
        "PYTHONPATH": str(CHECKOUT),
    }


def region_variables(chosen: Layout, second: Layout, state: LabState) -> dict[str, str]:
    """Where the lab's second region is; and which of the two environments is meant where none is named."""
    files = {second.first.name: "lab.toml", second.name: "lab-dr.toml"}
    other = second.first if chosen == second else second
    return {
        **_place("OPS_LAB_DR", second, state),
        "OPS_ENVIRONMENT": chosen.name,
        "OPS_ENVIRONMENT_FILE": str(CHECKOUT / "deployments" / "environments" / files[chosen.name]),
        "OPS_OTHER_REGION": other.name,
        "OPS_OTHER_REGION_FILE": str(CHECKOUT / "deployments" / "environments" / files[other.name]),
    }


def system_variables(
    chosen: Layout, first: LabState, second: LabState, binaries: Binaries, account: OsAccount
) -> dict[str, str]:
    """Everything but Prefect, for a program or a shell of one of the two regions: `first` and `second` are theirs."""
    return {**lab_variables(chosen.first, first, binaries, account), **region_variables(chosen, chosen.second, second)}


def _place(prefix: str, layout: Layout, state: LabState) -> dict[str, str]:
    ports = state.ports
    return {
        f"{prefix}_NAME": layout.name,
        f"{prefix}_ROOT": str(layout.root),
        f"{prefix}_POSTGRES_PORT": str(ports.postgres),
        f"{prefix}_STANDBY_PORT": str(ports.postgres_standby),
        f"{prefix}_REDIS_PORT": str(ports.redis),
        f"{prefix}_BACKEND_PORT": str(ports.backend),
        f"{prefix}_FRONTEND_PORT": str(ports.frontend),
        f"{prefix}_SUPERVISOR_PORT": str(ports.supervisor),
    }


def as_exports(variables: Mapping[str, str]) -> str:
    """Lines for `eval` in a shell."""
    return "".join(f"export {name}={_single_quoted(value)}\n" for name, value in variables.items())


def clean_environment() -> dict[str, str]:
    """For the lab's services: nothing of the shell that happened to start them."""
    kept = ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TZ")
    return {**{name: os.environ[name] for name in kept if name in os.environ}, "LANG": "C.UTF-8"}


def operator_environment() -> dict[str, str]:
    """For the Prefect server and workers: the operator's own (a proxy, DOCKER_HOST), without what steers us."""
    ours = ("PREFECT_", "OPS_", "SUPERVISOR_", "PYTEST_", "PYTHON", "VIRTUAL_ENV", "GX_", "MAKE", "MFLAGS")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**inherited, "LANG": "C.UTF-8", "PATH": f"{PYTHON.parent}:{inherited.get('PATH', os.defpath)}"}


def _single_quoted(value: str) -> str:
    quoted = shlex.quote(value)
    return quoted if quoted.startswith("'") else f"'{quoted}'"
