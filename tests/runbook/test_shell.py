"""Programs: real ones, real deaths."""

from __future__ import annotations

import errno
import os
import pwd
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runbook import shell
from runbook.errors import CommandFailed, OpsError
from runbook.wait import until
from tests.runbook.processes import Actor, is_alive

PYTHON = sys.executable


def test_it_returns_what_was_printed_and_how_long_it_took() -> None:
    started = time.monotonic()
    done = shell.run(
        [PYTHON, "-c", "import sys, time; time.sleep(.2); print('結果'); print('careful', file=sys.stderr)"]
    )
    assert (done.stdout, done.stderr) == ("結果\n", "careful\n")
    assert 0.2 <= done.seconds <= time.monotonic() - started


def test_arguments_reach_the_program_as_they_are() -> None:
    words = ["$HOME; touch /tmp/x", "*", "a b", "'\"", "候補者", "", "-n"]
    done = shell.run([PYTHON, "-c", "import sys; print(sys.argv[1:])", *words])
    assert done.stdout == f"{words}\n"


def test_more_output_than_a_pipe_holds_and_bytes_that_are_no_text() -> None:
    done = shell.run([PYTHON, "-c", "import sys; sys.stdout.buffer.write(b'\\xff' + b'x' * 3_000_000)"])
    assert len(done.stdout) == 3_000_001


def test_the_environment_is_added_and_the_directory_is_entered(tmp_path: Path) -> None:
    done = shell.run(
        [PYTHON, "-c", "import os; print(os.environ['OPS_X'], 'PATH' in os.environ, os.getcwd())"],
        environment={"OPS_X": "値"},
        directory=tmp_path,
    )
    assert done.stdout.split() == ["値", "True", str(tmp_path)]


def test_a_child_gets_none_of_this_process_s_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a scratch server, pg_rewind or a test suite prints of its environment."""
    secrets = {
        "PREFECT_API_AUTH_STRING": "u:s3cret",
        "OPS_POSTGRES_PASSWORD": "s3cret",
        "PGPASSWORD": "s3cret",
        "PIP_INDEX_URL": "https://u:s3cret@index",
        "https_proxy": "http://u:s3cret@proxy",
    }
    for name, value in {**secrets, "LC_TIME": "C", "PGSSLROOTCERT": "/ca.pem"}.items():
        monkeypatch.setenv(name, value)

    def seen(*inherit: str, **given: str) -> dict[str, str]:
        printed = shell.run(["env"], inherit=inherit, environment=given).stdout
        return dict(line.split("=", 1) for line in printed.splitlines())

    assert secrets.keys() & seen().keys() == set()
    assert seen().keys() >= {"PATH", "HOME", "LC_TIME", "PGSSLROOTCERT"}
    assert secrets.keys() & seen(*shell.NETWORK, "PIP_*").keys() == {"PIP_INDEX_URL", "https_proxy"}
    assert seen(PGPASSWORD="its own")["PGPASSWORD"] == "its own"


def test_no_caller_hands_all_of_its_environment_on() -> None:
    """`environment={**os.environ, …}` would undo the allow-list."""
    root = Path(__file__).parents[2]
    whole = re.compile(r"\*\*os\.environ|os\.environ\.copy|dict\(os\.environ|\| ?os\.environ")
    found = {
        str(path.relative_to(root))
        for layer in ("runbook", "blocks", "tasks", "flows", "deployments")
        for path in (root / layer).rglob("*.py")
        if whole.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"blocks/config/secrets.py"}, "which resolves the secrets that the TOML names"


def test_output_without_end_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "MOST_BYTES", 8 << 20)
    with pytest.raises(OpsError, match="yes printed more than 8 MB and was ended"):
        shell.run(["yes"])
    with pytest.raises(OpsError, match="printed more than 8 MB"):
        shell.run(["head", "-c", "9000000", "/dev/zero"])
    monkeypatch.setattr(shell, "MOST_ERROR_BYTES", 1 << 20)
    noisy = "echo first >&2; yes | head -c 30000000 >&2; echo last >&2; echo answer"
    done = shell.run(["sh", "-c", noisy])
    assert done.stdout == "answer\n"
    assert done.stderr.startswith("first\n")
    assert done.stderr.endswith("y\nlast\n")
    assert len(done.stderr) < 2 * shell.HEAD_BYTES + 9, "what was between is not kept"


def test_a_program_without_progress_is_ended_and_a_working_one_is_not() -> None:
    """By its own processor and bytes, by its children's, and by what a server does for it."""
    stall = shell.Stall(1.0)
    with pytest.raises(OpsError, match=r"sleep made no progress for 1 s and was ended — check the server's log"):
        shell.run(["sleep", "300"], stall=stall)
    busy = "import time\nfor _ in range(22): time.sleep(.1); open('/proc/self/stat').read()"
    assert shell.run(["sh", "-c", f'{PYTHON} -c "$0"; true', busy], stall=stall).seconds > 2
    assert shell.run(["sleep", "2.2"], stall=shell.Stall(1.0, time.monotonic)).seconds > 2

    def silent() -> int:
        raise OpsError("nobody answers")

    with pytest.raises(OpsError, match="made no progress"):
        shell.run(["sleep", "300"], stall=shell.Stall(1.0, silent))


def test_protection_from_the_oom_killer_is_not_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many containers let nobody lower a score: this process's is raised instead, and is said to be a protected one."""
    own, said = shell.OOM_SCORE, tmp_path / "oom_score_adj"
    said.write_text("-500\n")
    monkeypatch.setattr(shell, "OOM_SCORE", said)
    before = own.read_text()
    own.write_text("300")
    try:
        assert shell.run(["cat", own]).stdout == "0\n"
        said.write_text("0\n")
        assert shell.run(["cat", own]).stdout == "300\n", "it runs like this process, where that is not protected"
    finally:
        own.write_text(before)


@pytest.fixture
def typed() -> Iterator[None]:
    """Somebody typed a line into our terminal."""
    ours = os.dup(0)
    reading, writing = os.pipe()
    os.write(writing, b"yes\n")
    os.close(writing)
    os.dup2(reading, 0)
    yield
    os.dup2(ours, 0)
    os.close(reading)


@pytest.mark.usefixtures("typed")
def test_it_cannot_read_our_standard_input() -> None:
    assert shell.run([PYTHON, "-c", "import sys; print(repr(sys.stdin.read()))"]).stdout == "''\n"


def test_a_failure_has_the_last_lines_and_the_hint() -> None:
    script = "import sys; [print(f'line {n}', file=sys.stderr) for n in range(9)]; sys.exit(3)"
    with pytest.raises(CommandFailed) as error:
        shell.run([PYTHON, "-c", script], hint="look at the log")
    assert error.value.message == f"{Path(PYTHON).name} exited 3: line 6 / line 7 / line 8"
    assert error.value.hint == "look at the log"
    assert (error.value.exit_code, error.value.argv[0]) == (3, PYTHON)
    assert "line 0" in error.value.stderr


def test_a_failure_that_says_nothing() -> None:
    with pytest.raises(CommandFailed, match="false exited 1: no message"):
        shell.run(["false"])


def test_a_program_that_a_signal_ended() -> None:
    with pytest.raises(CommandFailed) as error:
        shell.run([PYTHON, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert error.value.exit_code == -9


def test_no_secret_is_in_the_message() -> None:
    secret = "s3cret/p@ss"
    script = "import os, sys; sys.exit(f\"cannot log in with {os.environ['PGPASSWORD']} to {os.environ['PGHOST']}\")"
    with pytest.raises(CommandFailed) as error:
        shell.run([PYTHON, "-c", script, "argument"], environment={"PGPASSWORD": secret, "PGHOST": "db-1"})
    everything = f"{error.value!r} {error.value} {error.value.stderr} {error.value.argv}"
    assert secret not in everything
    assert "cannot log in with ******** to db-1" in error.value.message


@pytest.mark.parametrize("program", ["no-such-program-4711", "/nowhere/pg_dump", "./pg_dump"])
def test_a_missing_program_is_named(program: str, tmp_path: Path) -> None:
    with pytest.raises(OpsError) as error:
        shell.run([program, "--version"], directory=tmp_path)
    assert error.value.message == f"there is no program {program}"
    assert "install it" in error.value.hint
    assert not isinstance(error.value, CommandFailed)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(OpsError, match="nowhere is not there"):
        shell.run(["true"], directory=tmp_path / "nowhere")


def test_a_program_of_its_directory_and_of_the_environment_s_path(tmp_path: Path) -> None:
    program = tmp_path / "mine"
    program.write_text("#!/bin/sh\necho mine\n")
    program.chmod(0o755)
    assert shell.run(["./mine"], directory=tmp_path).stdout == "mine\n"
    assert shell.run(["mine"], environment={"PATH": f"{tmp_path}:{os.environ['PATH']}"}).stdout == "mine\n"


def test_a_timeout_ends_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *words: Any, **options: Any) -> None:
            super().__init__(*words, **options)
            children.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    started = time.monotonic()
    with pytest.raises(OpsError) as error:
        shell.run(["sleep", "300"], timeout_seconds=1.5, hint="ask the server")
    assert error.value.message == "sleep did not end within 1.5 s"
    assert error.value.hint == "ask the server"
    assert time.monotonic() - started < 200
    (child,) = children
    assert not is_alive(child.pid)


def test_a_child_that_ignores_term_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "STOP_SECONDS", 0.3)
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(300)"
    with shell.spawn([PYTHON, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout
        assert child.stdout.readline() == b"deaf\n"
    assert child.returncode == -signal.SIGKILL


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_leaving_the_block_ends_the_child(error: type[BaseException]) -> None:
    def leave() -> None:
        with shell.spawn(["sleep", "300"]) as child:
            pids.append(child.pid)
            raise error

    pids: list[int] = []
    with pytest.raises(error):
        leave()
    assert not is_alive(pids[0])


def test_what_a_child_started_itself_is_ended_with_it(tmp_path: Path) -> None:
    """A launcher takes the signal alone; what it left behind would go on for nobody."""
    written = tmp_path / "pid"
    with shell.spawn(["sh", "-c", f"sleep 300 & echo $! >{written}; wait"]):
        grandchild = int(until(lambda: written.exists() and written.read_text().strip(), what="its pid", seconds=120))
    until(lambda: not is_alive(grandchild), what="the end of the grandchild", seconds=120)


def test_an_exit_code_may_be_an_answer() -> None:
    argv = [PYTHON, "-c", "print('found'); raise SystemExit(1)"]
    done = shell.run(argv, accepted=(0, 1))
    assert (done.code, done.stdout) == (1, "found\n")
    with pytest.raises(CommandFailed):
        shell.run(argv)


def test_the_child_of_a_killed_run_dies_within_a_second(tmp_path: Path, actors: list[Actor]) -> None:
    written = tmp_path / "pid"
    actors.append(Actor(tmp_path / "out", "actor", "child", written))
    actors[0].says("running")
    child = int(until(lambda: written.exists() and written.read_text(), what="the child", seconds=120))
    assert is_alive(child)
    actors[0].kill()
    until(lambda: not is_alive(child), what="the child's end", seconds=120, every_seconds=0.02)


@pytest.fixture
def groups() -> Iterator[None]:
    """We are in more groups than our own."""
    ours = os.getgroups()
    os.setgroups([0, 4])
    yield
    os.setgroups(ours)


@pytest.mark.system
@pytest.mark.usefixtures("groups")
def test_root_runs_it_as_another_user() -> None:
    done = shell.run(["id"], user="nobody")
    account = pwd.getpwnam("nobody")
    assert f"uid={account.pw_uid}(nobody) gid={account.pw_gid}" in done.stdout
    assert "(root)" not in done.stdout
    assert "(adm)" not in done.stdout, "root's groups are not kept"


@pytest.mark.system
def test_another_user_s_child_dies_with_us_too() -> None:
    script = (
        "import ctypes; number = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(number)); print(number.value)"
    )
    assert shell.run(["python3", "-c", script], user="nobody").stdout == f"{int(signal.SIGTERM)}\n"


@pytest.mark.system
@pytest.mark.parametrize(
    ("user", "numbers"), [("64001", "uid=64001 gid=64001 "), ("64001:64002", "uid=64001 gid=64002 ")]
)
def test_a_container_s_user_is_its_numbers(user: str, numbers: str) -> None:
    assert f"{shell.run(['id'], user=user).stdout.strip()} ".startswith(numbers)


@pytest.mark.system
def test_an_unknown_user_is_named() -> None:
    with pytest.raises(OpsError, match="there is no user no-such-user on this host — correct os_user"):
        shell.run(["true"], user="no-such-user")


def test_a_program_is_heard_where_the_disk_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """tempfile finds no directory then: this one is as good as full."""
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    assert shell.run(["echo", "heard"]).stdout == "heard\n"


def test_a_program_whose_output_is_read_meanwhile() -> None:
    received = list[bytes]()
    done = shell.drain(["sh", "-c", "head -c 3000000 /dev/zero; echo said >&2"], received.append)
    assert (sum(map(len, received)), done.stderr) == (3_000_000, "said\n")

    def full(_: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    started = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        shell.drain(["sh", "-c", "yes"], full)
    assert time.monotonic() - started < 60, "the program is ended"
    with pytest.raises(CommandFailed, match="why"):
        shell.drain(["sh", "-c", "echo why >&2; exit 3"], received.append)
