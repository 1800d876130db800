"""The packaged application, served: a live directory with an environment of its own, under a real supervisord; releases
of its repository are unpacked there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.infrastructure import unpack_way
from lab.environment import clean_environment
from lab.supervision import Program, Supervisor
from runbook.wait import until
from tests.packaged import Packaged, put_in
from tests.servers import free_port

PASSWORD = "super-4713"
# What is told of one that ends at once. Where that takes it a second, its supervisor has believed it by then.
DEAD = re.compile("backend does not start|backend at .* does not answer")
SERVER = """import http.server, json, sys
import interviewkit

GREETING = "one"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"status": "ok", "kit": interviewkit.VERSION, "greeting": GREETING}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
SERVICES = """[services]
kind = "supervisor"
url = "http://127.0.0.1:{port}"
username = "ops"
password_env = "OPS_SUPERVISOR_PASSWORD"
names = {{ backend = "grc-backend" }}
"""
LIVE = """
url = "http://127.0.0.1:{port}"
health_path = "/health"
directory = "{base}/live"
backend_directory = "{base}/live/backend"
backend_source = "{base}/grc/backend"
release = ["backend/kit_server.py", "backend/requirements.txt", "backend/requirements.lock"]
"""


@dataclass(frozen=True)
class Served(Packaged):
    """Where it is, and how it is asked."""

    port: int
    supervisor: Supervisor

    @property
    def live(self) -> Path:
        return self.base / "live"

    def describe(self, more: str = "", python: str = "") -> None:
        """As the packaged one's, but that it runs from the live directory."""
        own = "\n".join(line for line in more.splitlines() if not line.startswith("backend_directory"))
        super().describe(own + LIVE.replace("{port}", str(self.port)), python)
        path = self.base / "trial.toml"
        services = SERVICES.format(port=self.supervisor.port)
        path.write_text(path.read_text().replace("[services]\nnames = {}\n", services))

    def release(self, name: str, old: str, new: str) -> str:
        """Commit a change of the server on main, and tag it."""
        path = self.root / "backend/kit_server.py"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        self.git("commit", "--quiet", "--all", "--message", name)
        self.git("tag", name)
        return self.git("rev-parse", "HEAD").strip()

    def answer(self) -> dict[str, Any]:
        """What users get."""
        return dict(httpx.get(f"http://127.0.0.1:{self.port}/health", trust_env=False, timeout=60).json())

    def left(self) -> list[str]:
        """What a deployment has beside the live directory."""
        return sorted(path.name for path in self.base.glob("live.*"))


@pytest.fixture
def served(packaged: Packaged, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """It runs: what was copied there by hand, with interviewkit 1.0.0."""
    base, port = packaged.base, free_port()
    (base / "log").mkdir()
    supervisor = Supervisor(base / "supervisord.conf", free_port(), PASSWORD, base / "log")
    live = base / "live" / "backend"
    python = live / "venv" / "bin" / "python"
    made = Served(base, packaged.registry, python, port, supervisor)
    monkeypatch.setenv("OPS_SUPERVISOR_PASSWORD", PASSWORD)
    monkeypatch.setattr(unpack_way, "STEADY", 4)  # a second
    (made.root / "backend").mkdir(parents=True)
    (made.root / "backend/kit_server.py").write_text(SERVER)
    made.in_git()
    live.mkdir(parents=True)
    for name in ("kit_server.py", "requirements.txt", "requirements.lock"):
        shutil.copy(made.root / "backend" / name, live / name)
    (live / "notes.txt").write_text("a user's\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", live / "venv"], check=True)
    put_in(live / "venv", packaged.registry.directory / "interviewkit-1.0.0-py3-none-any.whl")
    supervisor.write([Program("grc-backend", (python, "kit_server.py", str(port)), live, autostart=True)])
    supervisor.launch({**clean_environment(), "PATH": os.environ["PATH"]})
    try:
        until(lambda: _answers(made), what="the application's first answer", seconds=60)
        yield made
    finally:
        supervisor.shutdown()


def _answers(made: Served) -> bool:
    try:
        return made.answer()["status"] == "ok"
    except httpx.HTTPError:
        return False
