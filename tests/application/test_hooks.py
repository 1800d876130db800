"""install_pre_commit: merged into what is there, run for real, on a branch."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from flows.application.hooks import BRANCH, install_pre_commit
from runbook.errors import NotConfirmed, OpsError, RunbookFailed
from runbook.report import Status
from tasks.code.hooks import ESLINT, FILE, RUFF, HooksPlace, eslint_packages, merged, read_hooks, remote_hooks
from tests.application.test_types import finding
from tests.fixtures.application.checkouts import NAME, Checkout, bring, program, replace
from tests.fixtures.application.seeded import PYTHON_FILE, ill_type

OWN = """# What we agreed on.
default_stages: [pre-commit]
repos:
- repo: local  # ours
  hooks:
  - id: no-secrets
    name: no secrets
    entry: "true"
    language: system

# until the next release
fail_fast: false
"""


@pytest.fixture
def bare(sources: Checkout, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """ruff is on PATH, as for whoever commits; of ESLint only its version is asked."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("GIT_ALLOW_PROTOCOL", "file")
    program(sources.web / "node_modules/.bin/eslint", "echo v10.15.0")
    return sources


@pytest.fixture
def tools(bare: Checkout, node: Path) -> Checkout:
    """With the real ESLint."""
    shutil.rmtree(bare.web / "node_modules")
    bring(node, bare)
    return bare


@pytest.mark.parametrize(
    "text",
    ["", "repos: []\n", OWN, "fail_fast: true\n", "repos:\n  - repo: meta\n    hooks:\n      - id: identity\n# end\n"],
    ids=["none", "empty", "own", "no repos", "indented"],
)
def test_every_line_that_was_there_stays(text: str) -> None:
    added = [{"repo": "local", "hooks": [{"id": "ruff", "name": "ruff"}]}]
    result = merged(text, added)
    lines = iter(result.splitlines())
    assert [line for line in text.splitlines() if "[]" not in line and line not in lines] == []
    assert yaml.safe_load(result)["repos"][-1] == added[0]
    assert list(read_hooks(result))[-1] == "ruff"


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(OpsError, match="no lines can be added"):
        merged("repos: [{repo: meta, hooks: [{id: identity}]}]\n", [{"repo": "local", "hooks": []}])
    with pytest.raises(OpsError, match="cannot be read"):
        read_hooks("repos: [")
    with pytest.raises(OpsError, match="cannot be read"):
        read_hooks("repos:\n- 1\n")


def test_hooks_are_merged_run_and_installed(tools: Checkout) -> None:
    """Their repositories cannot be reached here: they become local ones."""
    tools.add(FILE, OWN)
    ill_type(tools)
    (tools.root / ".git/hooks").mkdir(exist_ok=True)
    program(tools.root / ".git/hooks/pre-commit", "exit 0")
    before = tools.state()
    plan = install_pre_commit.fn(NAME)
    assert plan.status is Status.PLANNED
    assert "hook repositories" in {found.name for found in plan.findings if found.status is Status.WARN}
    assert tools.state() == before
    text = tools.git("show", f"{BRANCH}:{FILE}")
    assert [line for line in OWN.splitlines() if line not in text.splitlines()] == []
    assert list(read_hooks(text)) == ["no-secrets", "ruff", "ruff-format", "eslint"]
    assert "import os" not in tools.git("show", f"{BRANCH}:{PYTHON_FILE}")
    assert tools.git("log", "--format=%s", f"main..{BRANCH}").splitlines()[0] == "Repairs of the hooks"
    assert finding(plan, "hooks on all files").startswith("WARN: failed: ruff check, eslint")
    with pytest.raises(NotConfirmed):
        install_pre_commit.fn(NAME, confirm="production")
    report = install_pre_commit.fn(NAME, confirm=NAME)
    assert "exists already" in report.facts["branch"]
    assert "pre-commit.com" in (tools.root / ".git/hooks/pre-commit").read_text()
    assert (tools.root / ".git/hooks/pre-commit.legacy").stat().st_mode & stat.S_IXUSR
    tools.git("merge", "--quiet", "--ff-only", BRANCH)
    (tools.root / PYTHON_FILE).write_text("import os\nimport os\n")
    refused = subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--all", "--message", "no"],
        cwd=tools.root,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert "ruff check" in refused.stderr


def test_the_tools_own_repositories_are_pinned_to_the_application_s_versions(
    bare: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ruff's is served from here: git is told where it is."""
    bare.add(FILE, OWN.replace("no-secrets", "eslint"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RunbookFailed, match="cannot be reached"):
        install_pre_commit.fn(NAME, origin="repositories")
    version = "v" + subprocess.run(["ruff", "--version"], capture_output=True, text=True).stdout.split()[1]
    served = Checkout(tmp_path / "served")
    served.root.mkdir()
    served.git("init", "--quiet")
    hooks = (f"- id: {hook}\n  name: {hook}\n  entry: 'true'\n  language: system\n" for hook in ("ruff", "ruff-format"))
    served.add(".pre-commit-hooks.yaml", "".join(hooks))
    served.git("tag", version)
    (tmp_path / ".gitconfig").write_text(f'[url "file://{served.root}"]\n insteadOf = {RUFF}\n')
    plan = install_pre_commit.fn(NAME, origin="repositories")
    assert finding(plan, "hooks on all files").startswith("OK: 3 ran")
    text = bare.git("show", f"{BRANCH}:{FILE}")
    assert read_hooks(text) == {"eslint": "", "ruff": version, "ruff-format": version}
    place = HooksPlace(
        "ruff", "0.1.2", "web/node_modules/.bin/eslint", "9.1.0", "backend", "web", "web/eslint.config.js"
    )
    (eslint,) = remote_hooks(place, ["eslint"], eslint_packages(bare.web))
    assert (eslint["repo"], eslint["rev"]) == (ESLINT, "v9.1.0")
    assert eslint["hooks"][0]["additional_dependencies"] == [
        "eslint@10.15.0",
        "typescript@6.0.3",
        "typescript-eslint@8.74.0",
    ]


@pytest.mark.parametrize("text", ["exit 0", "echo garbage", "exit 3"], ids=["silent", "garbage", "failing"])
def test_a_pre_commit_that_gives_no_answer_is_told(bare: Checkout, tmp_path: Path, fake: Path, text: str) -> None:
    environment = tmp_path / "trial.toml"
    environment.write_text(replace(environment.read_text(), 'python = "', 'python = "/nowhere'))
    program(fake / "pre-commit", text)
    with pytest.raises(RunbookFailed, match="pre-commit"):
        install_pre_commit.fn(NAME, origin="local", confirm=NAME)
    assert not (bare.root / ".git/hooks/pre-commit").exists()
