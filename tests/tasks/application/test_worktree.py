"""Worktrees on a branch: what is committed stays, everything else goes; killed runs' too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from runbook.errors import CommandFailed, OpsError
from runbook.guard.process import this_process
from tasks.application.worktree import PREFIX, inside, packages_of, require_repository, uncommitted, worktree
from tests.fixtures.application.checkouts import Checkout


@pytest.fixture
def repository(tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path / "app")
    made.root.mkdir()
    made.git("init", "--quiet", "--initial-branch=main")
    made.add("a b.txt", "one\n")
    return made


def test_what_is_committed_stays_on_the_branch_and_the_worktree_goes(repository: Checkout) -> None:
    (repository.root / "a b.txt").write_text("not committed\n")
    (repository.root / ".git/hooks").mkdir(exist_ok=True)
    hook = repository.root / ".git/hooks/pre-commit"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    before = repository.state()
    with worktree(repository.root, "ops/try") as tree:
        there = tree.at(repository.root / "a b.txt")
        assert there.read_text() == "one\n"
        there.write_text("two\n")
        (tree.directory / "left by a tool").touch()
        assert tree.changed() == ["a b.txt"]
        assert tree.commit("Two") == tree.head()
        assert tree.commit("Nothing") == ""
        assert "+two" in tree.diff()
    assert not tree.directory.parent.exists()
    assert repository.state() == before
    assert uncommitted(repository.root) == ["a b.txt"]
    assert repository.git("show", "--stat", "--format=%an", "ops/try").splitlines()[0] == "interview-ops"
    assert repository.git("ls-tree", "--name-only", "ops/try").splitlines() == ["a b.txt"]
    with pytest.raises(CommandFailed, match="already exists"), worktree(repository.root, "ops/try"):
        pass
    assert repository.branches() == ["main", "ops/try"]


def test_a_branch_without_a_commit_goes_too(repository: Checkout) -> None:
    with pytest.raises(ZeroDivisionError), worktree(repository.root, "ops/none") as tree:
        _ = 1 / 0
    assert not tree.directory.parent.exists()
    assert repository.branches() == ["main"]
    assert len(repository.git("worktree", "list").splitlines()) == 1


def test_the_worktree_of_a_run_that_was_killed_is_removed_by_the_next(repository: Checkout, tmp_path: Path) -> None:
    left = tmp_path / f"{PREFIX}-{replace(this_process(), ticks=0).text}.abc"
    own = tmp_path / "somebody's"
    repository.git("worktree", "add", "--quiet", "-b", "ops/killed", str(left / "tree"))
    repository.git("worktree", "add", "--quiet", "-b", "mine", str(own))
    with worktree(repository.root, "ops/next"):
        assert not left.exists()
    assert own.exists()
    assert "mine" in repository.branches()
    repository.git("worktree", "remove", str(own))


def test_what_is_no_repository_is_told(repository: Checkout, tmp_path: Path) -> None:
    for name, told in (
        ("", "names no repository"),
        (str(tmp_path / "none"), "does not exist"),
        (str(tmp_path), "not a usable git checkout"),
    ):
        with pytest.raises(OpsError, match=told):
            require_repository(name)
    assert require_repository(str(repository.root)) == repository.root.resolve()
    with pytest.raises(OpsError, match="not in the repository"):
        inside(repository.root, tmp_path / "elsewhere")


def test_the_outermost_node_modules_are_found(tmp_path: Path) -> None:
    for name in (
        "node_modules/x/node_modules",
        "apps/f/node_modules",
        "apps/f/node_modules.ops-superseded/node_modules",
    ):
        (tmp_path / name).mkdir(parents=True)
    assert packages_of(tmp_path) == [tmp_path / "apps/f/node_modules", tmp_path / "node_modules"]


def test_a_worktree_of_somebody_else_that_is_out_of_sight_stays_known(repository: Checkout, tmp_path: Path) -> None:
    repository.git("worktree", "add", "--quiet", "-b", "theirs", str(tmp_path / "theirs"))
    (tmp_path / "theirs").rename(tmp_path / "a mount that is away")
    with worktree(repository.root, "ops/mine"):
        pass
    assert str(tmp_path / "theirs") in repository.git("worktree", "list")
