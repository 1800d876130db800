"""A server of advisories and packages on loopback, as OSV, a simple index and npm's registry speak: what tests know of
vulnerable and outdated packages comes from here, and never from the day's truth outside."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest

GHSA, CVE, PYSEC = "GHSA-aaaa-bbbb-cccc", "CVE-2020-12345", "PYSEC-2020-1"
NODE_GHSA, NODE_CVE = "GHSA-dddd-eeee-ffff", "CVE-2020-54321"
VECTOR = "CVSS:3.1/AV:N/AC:L/PR:N/UI:N/S:U/C:H/I:H/A:H"
Mode = Literal["right", "500", "garbage", "hangs"]


def vulnerable(package: str, fixed: str, ids: tuple[str, ...] = (PYSEC, CVE, GHSA), **more: Any) -> dict[str, Any]:
    """One record of OSV's schema, of a package of Python."""
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, *([{"fixed": fixed}] if fixed else [])]}]
    affected = [{"package": {"name": package, "ecosystem": "PyPI"}, "ranges": ranges}]
    record = {
        "schema_version": "1.4.0",
        "id": ids[0],
        "aliases": list(ids[1:]),
        "summary": f"{package} lets anybody in",
    }
    return record | {"affected": affected, "published": "2020-01-01T00:00:00Z"} | more


def node_advisory(package: str, below: str, severity: str = "high") -> dict[str, Any]:
    """One advisory as npm's registry tells it to pnpm (audits) and to npm (bulk)."""
    return {
        "module_name": package, "below": below, "severity": severity, "title": f"{package} lets anybody in",
        "url": f"https://github.com/advisories/{NODE_GHSA}", "github_advisory_id": NODE_GHSA, "cves": [NODE_CVE],
    }  # fmt: skip


@dataclass
class Registry:
    """What it serves may be changed while it runs."""

    directory: Path
    url: str = ""
    mode: Mode = "right"
    osv: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    node: list[dict[str, Any]] = field(default_factory=list)
    packages: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    ends: threading.Event = field(default_factory=threading.Event)

    def knows(self, package: str, *records: dict[str, Any], severities: Mapping[str, dict[str, Any]]) -> None:
        """Serve these of a package of Python, and what each id's own record says of its severity."""
        self.osv[package] = list(records)
        self.records.update({one: {"id": one, **said} for one, said in severities.items()})

    def wheel(self, name: str, version: str, requires: tuple[str, ...] = (), code: str = "") -> Path:
        """A wheel of one module, served by the simple index."""
        known = f"{name}-{version}.dist-info"
        needs = "".join(f"Requires-Dist: {one}\n" for one in requires)
        files = {
            f"{name}.py": code or f'VERSION = "{version}"\n',
            f"{known}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
            f"{known}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        files[f"{known}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{known}/RECORD"))
        path = self.directory / f"{name}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for inner, content in files.items():
                archive.writestr(inner, content)
        return path

    def tarball(self, name: str, version: str, code: str = "", **manifest: Any) -> None:
        """A package of node, the newest of its name, served by the registry."""
        content = {"name": name, "version": version, "main": "index.js", **manifest}
        memory = io.BytesIO()
        with gzip.GzipFile(fileobj=memory, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
            files = {"package.json": json.dumps(content), "index.js": code or f"exports.version = {version!r};\n"}
            for inner, text in files.items():
                entry = tarfile.TarInfo(f"package/{inner}")
                entry.size = len(text.encode())
                tar.addfile(entry, io.BytesIO(text.encode()))
        data = memory.getvalue()
        file = f"{name.rpartition('/')[2]}-{version}.tgz"
        (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / name / file).write_bytes(data)
        known = self.packages.setdefault(name, {"name": name, "versions": {}, "time": {}})
        sri = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
        known["versions"][version] = content | {"dist": {
            "integrity": sri, "shasum": hashlib.sha1(data).hexdigest(),  # noqa: S324 (npm's own)
            "tarball": f"{self.url}/{name}/-/{file}",
        }}  # fmt: skip
        known["time"][version] = "2020-01-01T00:00:00.000Z"
        known["dist-tags"] = {"latest": version}

    def answer(self, path: str, body: bytes) -> object:
        """A document, or bytes; None where there is none."""
        parts = path.strip("/").split("/")
        match parts:
            case ["v1", "query"]:
                asked = json.loads(body)
                known = self.osv.get(asked["package"]["name"], [])
                found = [one for one in known if one.get("everywhere") or _has(one, asked["version"])]
                return {"vulns": found} if found else {}
            case ["v1", "vulns", one]:
                return self.records.get(one)
            case ["simple", name]:
                links = [
                    p.name
                    for p in sorted(self.directory.glob("*.whl"))
                    if p.name.split("-")[0].replace("_", "-") == name
                ]
                return "".join(f'<a href="{self.url}/files/{one}">{one}</a>\n' for one in links).encode() or None
            case ["files", name]:
                return (self.directory / name).read_bytes()
            case [*name, "-", file] if name:
                return (self.directory / "/".join(name) / file).read_bytes()
            case ["-", "npm", "v1", "security", "audits", *_]:
                return self._audits(json.loads(body))
            case ["-", "npm", "v1", "security", "advisories", "bulk"]:
                return self._bulk(json.loads(body))
            case [_] | [_, _]:  # a scope's too: @types/react
                return self.packages.get("/".join(parts))
        return None

    def _audits(self, tree: dict[str, Any]) -> dict[str, Any]:
        found = dict[str, Any]()
        for number, advisory in enumerate(self.node, 1):
            versions = [v for name, v in _flat(tree) if name == advisory["module_name"] and v < advisory["below"]]
            if versions:
                found[str(number)] = advisory | {
                    "id": number, "vulnerable_versions": f"<{advisory['below']}", "patched_versions": f">={advisory['below']}",
                    "findings": [{"version": version, "paths": [advisory["module_name"]]} for version in versions],
                }  # fmt: skip
        counts = dict.fromkeys(("info", "low", "moderate", "high", "critical"), 0)
        metadata = {
            "vulnerabilities": counts,
            "dependencies": len(set(_flat(tree))),
            "totalDependencies": len(set(_flat(tree))),
        }
        return {"actions": [], "advisories": found, "muted": [], "metadata": metadata}

    def _bulk(self, asked: dict[str, list[str]]) -> dict[str, Any]:
        return {
            one["module_name"]: [{"id": 1, "url": one["url"], "title": one["title"], "severity": one["severity"],
                                  "vulnerable_versions": f"<{one['below']}", "cwe": [], "cvss": {"score": 0}}]
            for one in self.node if any(version < one["below"] for version in asked.get(one["module_name"], []))
        }  # fmt: skip


def _has(record: dict[str, Any], version: str) -> bool:
    events = [event for one in record["affected"][0]["ranges"] for event in one["events"]]
    fixes = [event["fixed"] for event in events if "fixed" in event]
    return all(version < fixed for fixed in fixes)


def _flat(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, inner in (tree.get("dependencies") or {}).items():
        if "version" in inner:
            yield name, str(inner["version"])
        yield from _flat(inner)


class _Handler(BaseHTTPRequestHandler):
    registry: Registry

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        registry = self.registry
        registry.asked.append(f"{self.command} {self.path}")
        if registry.mode == "hangs":
            registry.ends.wait()
            return
        found = (
            registry.answer(self.path.partition("?")[0].replace("%2F", "/"), body)
            if registry.mode == "right"
            else b"\0{oops"
        )
        status = 500 if registry.mode == "500" else 404 if found is None else 200
        data = found if isinstance(found, bytes) else json.dumps(found or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(found, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _serve

    def log_message(self, *_: object) -> None:
        """Nothing: what was asked is in `asked`."""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A server of its own for each test."""
    directory = tmp_path / "served"
    directory.mkdir()
    served = Registry(directory)
    handler = type("Handler", (_Handler,), {"registry": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield served
    served.ends.set()
    server.shutdown()
    server.server_close()
    thread.join()
