"""An application of one Python package and one node package, in a git checkout, with environments and a registry of its
own: one of each is outdated, and may be made vulnerable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tasks.dependencies import node_audit, osv, python_audit, python_packages
from tests.advisories import Registry
from tests.seeded import outdate

NAME = "trial"
TOML = """
name = "trial"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
[application]
python = "{python}"
advisories = "{url}"
{more}
"""
NODE = Path(__file__).parents[1] / ".venv" / "node" / "bin"
IN_GIT = """
repository = "{base}/grc"
backend_directory = "{base}/grc/backend"
requirements_lock = "requirements.lock"
test_command = ["python", "-m", "unittest", "-v"]
web_directory = "{base}/grc/web"
web_test_command = ["node", "--test", "apps/page/kit.test.mjs"]
web_build_command = ["node", "--check", "apps/page/kit.test.mjs"]
"""
TEST = """
import unittest, interviewkit
class Kit(unittest.TestCase):
    def test_its_version_is_1(self):
        self.assertTrue(interviewkit.VERSION.startswith("1."))
"""
NODE_TEST = """
import test from "node:test";
import chatkit from "chatkit";
test("its version is 1", () => { if (!chatkit.version.startsWith("1.")) throw new Error("it is " + chatkit.version); });
"""
_locks: dict[str, str] = {}
"""pnpm-lock.yaml by its package.json: it names no address, so one serves every test of this process."""


@dataclass(frozen=True)
class Packaged:
    """Where it is."""

    base: Path
    registry: Registry
    python: Path

    @property
    def root(self) -> Path:
        return self.base / "grc"

    def describe(self, more: str = "", python: str = "") -> None:
        inner = more.format(base=self.base)
        text = TOML.format(base=self.base, url=self.registry.url, python=python or self.python, more=inner)
        (self.base / "trial.toml").write_text(text)

    def git(self, *arguments: str) -> str:
        argv = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", *arguments]
        return subprocess.run(argv, cwd=self.root, capture_output=True, text=True, check=True).stdout

    def in_git(self) -> None:
        """Commit it: backend with a lock file and a test, a pnpm workspace with a lock file and a test."""
        outdate(self.registry)
        member = {"name": "page", "version": "1.0.0", "dependencies": {"chatkit": "1.0.0"}}
        files = {
            "backend/requirements.txt": "interviewkit==1.0.0\n",
            "backend/requirements.lock": "interviewkit==1.0.0\n",
            "backend/test_kit.py": TEST,
            "web/package.json": json.dumps({"name": "web", "version": "1.0.0", "private": True}),
            "web/pnpm-workspace.yaml": "packages:\n  - apps/*\n",
            "web/apps/page/package.json": json.dumps(member),
            "web/apps/page/kit.test.mjs": NODE_TEST,
            ".gitignore": "node_modules/\n__pycache__/\n",
        }
        for name, text in files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text)
        self.lock("pnpm", self.root / "web")
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "The application")
        self.describe(IN_GIT)

    def lock(self, tool: Literal["pnpm", "npm"], web: Path) -> None:
        """Make its lock file."""
        name, *argv = {
            "pnpm": ("pnpm-lock.yaml", "pnpm", "install", "--lockfile-only"),
            "npm": ("package-lock.json", "npm", "install", "--package-lock-only", "--no-audit"),
        }[tool]
        key = name + "".join(path.read_text() for path in sorted(web.rglob("package.json")))
        if key not in _locks:
            subprocess.run(argv, cwd=web, check=True, capture_output=True)
            _locks[key] = (web / name).read_text()
        (web / name).write_text(_locks[key])

    def untouched(self) -> bool:
        """Whether the live checkout is as it was, on its branch, with no worktree beside it."""
        clean = not self.git("status", "--porcelain") and self.git("branch", "--show-current").strip() == "main"
        return clean and len(self.git("worktree", "list").splitlines()) == 1

    def branches(self) -> list[str]:
        return self.git("for-each-ref", "--format=%(refname:short)", "refs/heads").split()


@pytest.fixture(scope="session")
def small_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has interviewkit 1.0.0 and nothing else; tests leave it as it is."""
    base = tmp_path_factory.mktemp("python")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", base / "venv"], check=True)
    put_in(base / "venv", Registry(base).wheel("interviewkit", "1.0.0"))
    return base / "venv/bin/python"


def put_in(venv: Path, wheel: Path) -> None:
    """Install a wheel of a test."""
    (site,) = (venv / "lib").glob("python*/site-packages")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, site], check=True)


@pytest.fixture
def packaged(tmp_path: Path, registry: Registry, small_python: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    """An environment whose Python has interviewkit 1.0.0 and nothing else; in_git() adds the rest."""
    assert (NODE / "pnpm").exists(), "run tests/node/install first (make test does)"
    registry.wheel("interviewkit", "1.0.0")
    made = Packaged(tmp_path, registry, small_python)
    made.describe()
    for name, value in {
        "OPS_ENVIRONMENT": NAME,
        "OPS_ENVIRONMENT_FILE": str(tmp_path / "trial.toml"),
        "PATH": f"{NODE}{os.pathsep}{os.environ['PATH']}",
        "PIP_CONFIG_FILE": os.devnull,  # this machine's may name other indexes, folders of wheels, constraints
        "PIP_INDEX_URL": f"{registry.url}/simple",
        "npm_config_registry": registry.url,
        "npm_config_cache": str(tmp_path / "npm-cache"),
        "npm_config_store_dir": str(tmp_path / "pnpm-store"),
        "npm_config_cache_dir": str(tmp_path / "pnpm-cache"),
    }.items():
        monkeypatch.setenv(name, value)
    # The registry is a thread of this process: on a busy machine it answers late.
    monkeypatch.setitem(node_audit.PATIENCE, "npm_config_fetch_timeout", "600000")
    monkeypatch.setitem(python_packages.PATIENCE, "PIP_TIMEOUT", "600")
    monkeypatch.setattr(python_audit, "SOCKET_SECONDS", 600)
    monkeypatch.setattr(osv, "SECONDS", 600.0)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    return made
