"""docs/adopting.md, typed as it stands, on a system that nobody here has seen; then that is destroyed, and restored.

Only ports and the backups' directory are this host's. The rest of the documentation's commands that need a system are
run by: `make demo`, tests/lab/test_deployed.py; `make lab`, every test with a lab; `make drill`, tests/recovery; `make
docs`, tests/docs/test_site.py; the recoveries from the command line, tests/recovery.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.runbooks import shown
from runbook.errors import Unreachable
from runbook.wait import until
from tests.docs.commands import ROOT, blocks
from tests.fixtures.servers import free_port
from tests.stranger.system import ADMIN_PASSWORD, Stranger, running_stranger
from tests.ui.browser import operator

NAME = "blue"
GUIDE, JAPANESE = ROOT / "docs" / "adopting.md", ROOT / "docs" / "adopting.ja.md"
POSTGRES_17 = Path("/usr/lib/postgresql/17/bin")
ENDS_SECONDS, STARTS_SECONDS = 120, 300
# As a person's shell starts it, or a supervisor. What a script starts behind an `&`, these tests perhaps, passes on that
# SIGINT is ignored; and Prefect's worker turns SIGTERM into SIGINT.
STOPPABLE = ("env", "--default-signal=INT")

pytestmark = pytest.mark.system


def guide(path: Path = GUIDE) -> list[str]:
    """The blocks for a shell, in order: install, adopt, server, deploy and worker, first runs."""
    return [block.text for block in blocks(path) if block.language == "sh"]


@dataclass
class Reader:
    """Somebody at a shell of this host."""

    shell: dict[str, str]
    ports: dict[str, int]
    directory: Path

    def own(self, text: str) -> str:
        """A block with this host's ports and directory."""
        text = text.replace(":4200", f":{self.ports['prefect']}").replace(":8000", f":{self.ports['application']}")
        text = text.replace("deployments/environments/prefect.env", f"{self.directory}/prefect.env")
        return text.replace("/mnt/backups", f"{self.directory}/backups")

    @property
    def auth(self) -> str:
        """User and password of Prefect, as the guide's command generated them."""
        file = self.directory / "prefect.env"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        return file.read_text().strip().removeprefix("PREFECT_API_AUTH_STRING=")

    def type(self, text: str, code: int = 0) -> str:
        """A block, to its end."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.own(text)],
            cwd=ROOT,
            env=self.shell,
            text=True,
            timeout=600,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == code, f"{text}\n{done.stdout[-6000:]}\n{self.findings()}"
        return done.stdout

    def reports(self, runbook: str) -> list[dict[str, Any]]:
        """JSON reports, in the order of their runs."""
        found = sorted(self.directory.rglob(f"{runbook}.json"), key=lambda path: path.name)
        return [json.loads(path.read_text()) for path in found]

    def findings(self) -> list[Any]:
        """What was found wrong in any run."""
        return [one for report in self.reports("*") for one in report.get("findings", ()) if one["status"] != "OK"]

    @contextmanager
    def running(self, text: str) -> Iterator[None]:
        """A block whose last command stays; stopped as its supervisor stops it, which it must obey."""
        before, _, last = self.own(text).rpartition("\n")
        started = subprocess.Popen(
            [*STOPPABLE, "bash", "-euc", f"{before}\nexec env {last}"],
            cwd=ROOT,
            env=self.shell,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield
            started.terminate()
            started.wait(ENDS_SECONDS)
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()


@pytest.fixture(params=[False, True], ids=["plain", "alembic"])
def stranger(request: pytest.FixtureRequest) -> Iterator[Stranger]:
    """On Debian's PostgreSQL 17."""
    with running_stranger(POSTGRES_17, alembic=request.param) as found:
        yield found


@pytest.fixture
def reader(stranger: Stranger, tmp_path: Path) -> Reader:
    ports = {"application": stranger.ports["application"], "prefect": free_port()}
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "PATH") if name in os.environ}
    own = {
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_API_PORT": str(ports["prefect"]),
        "PREFECT_UI_API_URL": f"http://127.0.0.1:{ports['prefect']}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "OPS_ENVIRONMENT": NAME,
        "OPS_ENVIRONMENT_FILE": str(tmp_path / f"{NAME}.toml"),
    }
    return Reader({**kept, **own}, ports, tmp_path)


def test_both_languages_have_the_same_commands() -> None:
    assert guide() == guide(JAPANESE)


def test_adopted_destroyed_and_restored(stranger: Stranger, reader: Reader, tmp_path: Path) -> None:
    install, adopt, server, deploy, runs = guide()
    reader.type(install)
    reader.shell["PATH"] = f"{ROOT / '.venv' / 'bin'}:{reader.shell['PATH']}"  # as in that shell from here on
    asked = reader.type(adopt, code=1)
    assert "to fill in: BLUE_POSTGRES_ADMIN_PASSWORD" in asked
    secrets = reader.directory / f"{NAME}.env"
    secrets.write_text(secrets.read_text().replace("ADMIN_PASSWORD=", f"ADMIN_PASSWORD='{ADMIN_PASSWORD}'"))
    page = reader.type(adopt)
    assert "CRITICAL" not in page

    with reader.running(server):
        until(lambda: answers(reader), what="Prefect", seconds=STARTS_SECONDS, every_seconds=0.2)
        before_worker, _, worker = deploy.rpartition("\n")
        deployed = reader.type(before_worker)
        assert f"registered block ops-environment/{NAME}" in deployed
        listed = descriptions(reader)
        assert listed, "deployed"
        assert listed == {entrypoint: shown(entrypoint, "en") for entrypoint in listed}
        with reader.running("\n".join([*before_worker.splitlines()[:2], worker])):
            reader.type(runs)
            before = stranger.content()
            stranger.destroy()
            restore_in_the_browser(f"http://127.0.0.1:{reader.ports['prefect']}/v2", tmp_path, reader.auth)
    planned, restored = (one["status"] for one in reader.reports("*full-restore*"))
    assert planned == "PLANNED"
    assert restored in ("OK", "WARN"), reader.findings()
    assert stranger.content() == before
    assert stranger.ready()


def restore_in_the_browser(address: str, pictures: Path, auth: str) -> None:
    """The form of full-restore, with the environment's name in confirm."""
    with operator(address, NAME, pictures, auth) as somebody:
        somebody.choose("full-restore", "recovery")
        form = somebody.custom_run()
        form.text("confirm").fill(NAME)
        somebody.submit()
        somebody.state("Completed", "Warning", "Failed")


def answers(reader: Reader) -> bool:
    try:
        address = f"http://127.0.0.1:{reader.ports['prefect']}/api/health"
        return httpx.get(address, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError as error:
        raise Unreachable(str(error)) from None


def descriptions(reader: Reader) -> dict[str, str]:
    """What the reader's server shows of each deployment, by entrypoint; start-here shows its table besides."""
    found: list[dict[str, str]] = []
    address, (user, _, password) = f"http://127.0.0.1:{reader.ports['prefect']}/api", reader.auth.partition(":")
    with httpx.Client(base_url=address, auth=(user, password), trust_env=False) as client:
        stranger = httpx.post(f"{address}/deployments/filter", json={}, headers={"Origin": "https://example.com"})
        assert stranger.status_code == httpx.codes.UNAUTHORIZED
        assert "access-control-allow-origin" not in stranger.headers
        while page := client.post("/deployments/filter", json={"limit": 200, "offset": len(found)}).json():
            found += page
    return {one["entrypoint"]: one["description"] for one in found if not one["entrypoint"].endswith(".start_here")}
