"""A git checkout of the application: the lab's web workspace with its packages, and some of the backend's modules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.application.sources import PYPROJECT
from tasks.worktree import packages_of

ROOT = Path(__file__).resolve().parents[1]
NODE = ROOT / ".venv" / "node"
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
repository = "{root}"
directory = "{root}"
backend_directory = "{root}/backend"
python = "{python}"
web_directory = "{root}/web"
"""


@dataclass(frozen=True)
class Checkout:
    """Where its parts are, and what is done to them."""

    root: Path

    @property
    def web(self) -> Path:
        return self.root / "web"

    @property
    def backend(self) -> Path:
        return self.root / "backend"

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.root, capture_output=True, text=True, check=True)
        return done.stdout

    def add(self, name: str, text: str) -> None:
        """Commit a file."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        self.commit(f"Add {name}")

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "--message", message)

    def branches(self) -> list[str]:
        return self.git("for-each-ref", "--format=%(refname:short)", "refs/heads").split()

    def state(self) -> dict[str, tuple[int, int, int]]:
        """Everything in it but git's own: inode, bytes and time of each file."""
        found = {}
        for folder, names, files in os.walk(self.root):
            names[:] = [name for name in names if name not in (".git", ".pnpm")]
            for name in files:
                status = Path(folder, name).lstat()
                found[os.path.relpath(Path(folder, name), self.root)] = (
                    status.st_ino,
                    status.st_size,
                    status.st_mtime_ns,
                )
        return found


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Path:
    """What tests/node/install put there: its programs are found first, and pnpm needs no registry."""
    assert (NODE / ".installed").exists(), "run tests/node/install first (make test does)"
    monkeypatch.setenv("PATH", f"{NODE / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("npm_config_store_dir", str(NODE / "store"))
    monkeypatch.setenv("npm_config_offline", "true")
    return NODE


@pytest.fixture
def sources(tmp_path: Path, node: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkout]:
    """Clean, everything committed, no packages."""
    made = Checkout(tmp_path / "grc")
    package = made.backend / "grc_backend"
    package.mkdir(parents=True)
    for name in ("__init__.py", "settings.py", "passwords.py"):
        shutil.copy(ROOT / "lab" / "application" / "grc_backend" / name, package / name)
    (made.backend / "pyproject.toml").write_text(PYPROJECT)
    shutil.copytree(node / "web", made.web, ignore=shutil.ignore_patterns("node_modules", "dist"))
    (made.root / ".gitignore").write_text("venv*\n__pycache__/\n")
    made.git("init", "--quiet", "--initial-branch=main")
    made.commit("The application")
    (tmp_path / "trial.toml").write_text(TOML.format(base=tmp_path, root=made.root, python=sys.executable))
    monkeypatch.setenv("OPS_ENVIRONMENT", NAME)
    monkeypatch.setenv("OPS_ENVIRONMENT_FILE", str(tmp_path / "trial.toml"))
    caches = tmp_path / "reports" / "cache"
    caches.mkdir(parents=True)
    (tmp_path.parent / "mypy").mkdir(exist_ok=True)  # of all tests: the standard library is read once
    (caches / "mypy").symlink_to(tmp_path.parent / "mypy")
    yield made
    left = made.git("worktree", "list").splitlines()
    assert len(left) == 1, left


@pytest.fixture
def checkout(sources: Checkout, node: Path) -> Checkout:
    """With packages."""
    bring(node, sources)
    return sources


def bring(node: Path, made: Checkout) -> None:
    """Packages: second names of the files, not copies."""
    for path in packages_of(node / "web"):
        subprocess.run(["cp", "-al", path, made.web / path.relative_to(node / "web")], check=True)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is first on PATH, for programs that hang or print nonsense."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def program(path: Path, text: str) -> None:
    """A shell script in the place of a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def replace(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)
