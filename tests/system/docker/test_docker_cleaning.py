"""clean_docker on a real engine."""

from __future__ import annotations

import http.server
import io
import tarfile
import threading
from collections.abc import Callable
from typing import Any

import docker.errors
import httpx
import pytest

from flows.infrastructure.images import cleaning
from flows.infrastructure.images.cleaning import clean_docker
from runbook.errors import NotConfirmed
from runbook.kinds import action
from runbook.report import Status
from runbook.wait import until
from tasks.docker.removing import remove
from tests.fixtures.engine import NAME, Engine

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("environment")]


def exists(get: Callable[[str], Any], name: str) -> bool:
    try:
        return bool(get(name))
    except docker.errors.NotFound:
        return False


def test_what_nobody_uses_goes_as_planned(engine: Engine, environment: Callable[[str], None]) -> None:
    client, prefix = engine.client, engine.prefix
    for number in range(3):
        engine.image(
            "app",
            f"LABEL number={number}",
            f"COPY big /big{number}",
            tags=(str(number),),
            files={"big": bytes([number]) * 50_000},
        )
    for name in ("ended", "backend"):  # the second is the application's own
        engine.run(name, "true", image=f"{prefix}-app:0").wait()
    engine.run("runs", image=f"{prefix}-app:1")
    volumes = [client.volumes.create(f"{prefix}-{name}").name for name in ("left", "precious")]
    client.networks.create(f"{prefix}-net", driver="bridge")
    chosen: dict[str, Any] = {"older_than_hours": 0, "keep_tags": 1, "volumes": (volumes[0],)}
    try:
        plan = clean_docker.fn(NAME, **chosen)
        assert plan.status is Status.PLANNED
        assert {step.detail.split(":")[0] for step in plan.plan_steps} == {
            f"{prefix}-ended",
            f"{prefix}-net",
            volumes[0],
        }
        assert exists(client.containers.get, f"{prefix}-ended")
        with pytest.raises(NotConfirmed):
            clean_docker.fn(NAME, confirm="production", **chosen)
        client.containers.get(f"{prefix}-backend").remove()
        client.containers.get(f"{prefix}-ended").remove()
        plan = clean_docker.fn(NAME, **chosen)
        (image,) = [step for step in plan.plan_steps if step.step == "remove image"]
        assert image.detail.startswith(f"{prefix}-app:0: not of the newest 1")
        assert 50_000 <= image.bytes < 60_000
        report = clean_docker.fn(NAME, confirm=NAME, **chosen)
        assert report.status is Status.OK, report.sentence()
        assert not exists(client.images.get, f"{prefix}-app:0")
        assert exists(client.images.get, f"{prefix}-app:1"), "it runs"
        assert exists(client.images.get, f"{prefix}-app:2"), "the newest"
        assert not exists(client.networks.get, f"{prefix}-net")
        assert not exists(client.volumes.get, volumes[0])
        assert exists(client.volumes.get, volumes[1])
        assert "nothing" in clean_docker.fn(NAME, older_than_hours=0, keep_tags=1, confirm=NAME).outcome
    finally:
        for volume in volumes:
            if exists(client.volumes.get, volume):
                client.volumes.get(volume).remove()
        if exists(client.networks.get, f"{prefix}-net"):
            client.networks.get(f"{prefix}-net").remove()


def test_what_was_started_or_used_meanwhile_stays(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    client, prefix = engine.client, engine.prefix
    engine.run("ended", "sh", "-c", "if mkdir /once; then exit 0; else sleep 1000; fi").wait()
    for number in range(3):
        engine.image("app", f"LABEL other={number}", tags=(str(number),))
    volume = client.volumes.create(f"{prefix}-left")
    network = client.networks.create(f"{prefix}-net", driver="bridge")

    @action(of=remove.of)
    def meanwhile(host: str, doomed: Any) -> Any:
        client.containers.get(f"{prefix}-ended").start()
        engine.run("uses", image=f"{prefix}-app:0", volumes=[f"{prefix}-left:/left"], network_mode=f"{prefix}-net")
        client.images.get(f"{prefix}-app:2").tag(f"{prefix}-app", "1")
        return remove.work(host, doomed)

    monkeypatch.setattr(cleaning, "remove", meanwhile)
    try:
        report = clean_docker.fn(NAME, older_than_hours=0, keep_tags=1, volumes=(volume.name,), confirm=NAME)
        assert report.status is Status.WARN
        (table,) = [one for one in report.evidence if one.name == "Removed"]
        kept = {row[1].removeprefix(f"{prefix}-"): row[3] for row in table.rows}
        assert kept == {
            "ended": "it is running now",
            "app:0": f"{prefix}-uses uses it now",
            "app:1": "the tag belongs to another image now",
            "net": f"{prefix}-uses uses it now",
            "left": f"{prefix}-uses mounts it now",
        }
        assert report.outcome.startswith("0 of 5 removed")
    finally:
        client.containers.get(f"{prefix}-uses").remove(force=True)
        network.remove()
        volume.remove()


class _Context(http.server.BaseHTTPRequestHandler):
    """A build's context, from memory."""

    def do_GET(self) -> None:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            for name, text in (("Dockerfile", b"FROM scratch\nCOPY big /big\n"), ("big", b"x" * 70_000)):
                entry = tarfile.TarInfo(name)
                entry.size = len(text)
                archive.addfile(entry, io.BytesIO(text))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content.getvalue())


def test_the_build_cache_goes(engine: Engine) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Context) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with httpx.Client(transport=httpx.HTTPTransport(uds=engine.host.removeprefix("unix://")), timeout=60) as client:
            context = f"http://127.0.0.1:{server.server_port}/context.tar"
            asked = {"version": "2", "remote": context, "t": f"{engine.prefix}-kit:1"}
            said = client.post("http://docker/build", params=asked).text
        server.shutdown()
    engine.client.images.remove(f"{engine.prefix}-kit:1")

    def cache() -> list[dict[str, Any]]:
        return engine.client.df()["BuildCache"] or []

    assert sum(one["Size"] for one in cache()) > 70_000, said[-500:]
    until(lambda: not any(one["InUse"] for one in cache()), what="that the build lets go of it", seconds=120)
    plan = clean_docker.fn(NAME, parts=("build cache",), older_than_hours=0)
    assert [step.step for step in plan.plan_steps] == ["remove build cache"]
    assert plan.plan_steps[0].bytes > 70_000

    def cleaned() -> bool:
        """The engine may hold records a moment longer than it says: the report is a WARN then, and says so."""
        report = clean_docker.fn(NAME, parts=("build cache",), older_than_hours=0, confirm=NAME)
        assert report.status is Status.OK or "a build uses it" in report.sentence()
        return not any(one["Size"] for one in cache())

    until(cleaned, what="that it is gone", seconds=120, every_seconds=1)
