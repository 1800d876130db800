"""The chain of reports: what was changed, removed or cut is told; what was only interrupted is not."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest

from runbook.files import chain, record
from tasks.redis.topology.topology import RECORD as REDIS_DETACHED
from tasks.redis.topology.topology import ReplicationTopology
from tests.runbook.processes import Actor

# A file's name that is not UTF-8, as Python reads it.
FACTS = {"名前": "値", "file": b"\xff\xe9".decode(errors="surrogateescape")}
_numbers = itertools.count()


def report() -> dict[str, object]:
    return {"started": "2026-11-25T01:02:03.456789+00:00", "facts": FACTS, "seconds": next(_numbers)}


def write(directory: Path, count: int) -> list[Path]:
    return [chain.append(directory, "full-restore", report())[0] for _ in range(count)]


def head_of(directory: Path) -> Path:
    (head,) = [path for path in directory.glob(".chain-*") if path.suffix != ".lock"]
    return head


def test_reports_follow_each_other(tmp_path: Path) -> None:
    paths = write(tmp_path / "new" / "directory", 3)
    read = [json.loads(path.read_text()) for path in paths]
    host = head_of(paths[0].parent).name.removeprefix(".chain-")
    assert paths[0].name == f"20261125T010203Z-{host}-000001-full-restore.json"
    assert [one["number"] for one in read] == [1, 2, 3]
    assert [one["previous"] for one in read] == [chain.GENESIS, read[0]["hash"], read[1]["hash"]]
    assert read[0]["facts"] == FACTS
    assert chain.verify_chain(paths[0].parent) == []


def test_append_returns_what_it_wrote(tmp_path: Path) -> None:
    path, content = chain.append(tmp_path, "backup", report())
    assert content == json.loads(path.read_text())
    assert content["hash"] == chain.hash_of(content)


def test_an_empty_directory_is_whole(tmp_path: Path) -> None:
    assert chain.verify_chain(tmp_path) == []


@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_edited_report_is_told(tmp_path: Path, index: int) -> None:
    path = write(tmp_path, 3)[index]
    path.write_text(path.read_text().replace("値", "他"))
    assert f"{path.name} was changed after it was written" in chain.verify_chain(tmp_path)


@pytest.mark.parametrize("index", [0, 1])
def test_an_edited_report_with_a_new_hash_of_its_own_is_told(tmp_path: Path, index: int) -> None:
    path, after = write(tmp_path, 3)[index : index + 2]
    content = json.loads(path.read_text()) | {"facts": {}}
    content["hash"] = chain.hash_of(content)
    path.write_text(json.dumps(content))
    assert [problem.split()[0] for problem in chain.verify_chain(tmp_path)] == [after.name]


@pytest.mark.parametrize("index", [0, 1])
def test_a_removed_report_is_told(tmp_path: Path, index: int) -> None:
    paths = write(tmp_path, 3)
    paths[index].unlink()
    assert chain.verify_chain(tmp_path) == [
        f"{paths[index + 1].name} does not follow the report before it: one is missing or was replaced"
    ]


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_cut_end_is_told_while_the_head_is_kept(tmp_path: Path, left: int) -> None:
    for path in write(tmp_path, 3)[left:]:
        path.unlink()
    (problem,) = chain.verify_chain(tmp_path)
    assert problem.endswith("does not end where its head says")


@pytest.mark.parametrize("text", ["", "garbage", "x y", "7 8 9"])
def test_a_damaged_head_is_told_and_stops_no_run(tmp_path: Path, text: str) -> None:
    write(tmp_path, 3)
    head_of(tmp_path).write_text(text)
    assert chain.verify_chain(tmp_path) != []
    write(tmp_path, 1)
    assert chain.verify_chain(tmp_path) != []


def test_a_strange_file_is_told(tmp_path: Path) -> None:
    write(tmp_path, 1)
    named = "20261201T000000Z-host-000001-notes.json", "20261201T000000Z-host-000002-broken.json"
    for name, text in zip(named, ("[1, 2]", "{"), strict=True):
        (tmp_path / name).write_text(text)
    assert chain.verify_chain(tmp_path) == [f"{name} is not a report of the chain" for name in named]


def test_what_runs_note_down_beside_the_reports_is_no_report(tmp_path: Path) -> None:
    write(tmp_path, 1)
    record.write(tmp_path / REDIS_DETACHED, ReplicationTopology("127.0.0.1:1", ""))
    (tmp_path / "recoverability.json").write_text("{}")
    assert chain.verify_chain(tmp_path) == []


def test_a_run_killed_between_its_report_and_the_head_breaks_nothing(tmp_path: Path) -> None:
    write(tmp_path, 2)
    head = head_of(tmp_path)
    before = head.read_text()
    third = write(tmp_path, 1)
    head.write_text(before)
    assert chain.verify_chain(tmp_path) == []
    (fourth,) = write(tmp_path, 1)
    assert json.loads(fourth.read_text())["previous"] == json.loads(third[0].read_text())["hash"]
    assert chain.verify_chain(tmp_path) == []


def test_two_hosts_in_one_directory_have_a_chain_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 2)
    monkeypatch.setattr("runbook.files.chain.socket.gethostname", lambda: "worker-2.example.com")
    other = write(tmp_path, 2)
    assert json.loads(other[0].read_text())["number"] == 1
    assert len(list(tmp_path.glob("*.json"))) == 4, "two hosts' runs of one second have files of their own"
    assert chain.verify_chain(tmp_path) == []
    other[0].unlink()
    assert len(chain.verify_chain(tmp_path)) == 1


def test_processes_beside_each_other_keep_one_chain(tmp_path: Path, actors: list[Actor]) -> None:
    actors += [Actor(tmp_path / "out", "actor", "append", tmp_path, 60) for _ in range(2)]
    for actor in actors:
        actor.says("ready")
    (tmp_path / "go").touch()
    seen = []
    while any(actor.process.poll() is None for actor in actors):
        seen += chain.verify_chain(tmp_path)  # reading beside them raises no false alarm
    assert [actor.process.returncode for actor in actors] == [0, 0]
    assert seen == []
    numbers = [json.loads(path.read_text())["number"] for path in tmp_path.glob("*.json")]
    assert sorted(numbers) == list(range(1, 121))
    assert chain.verify_chain(tmp_path) == []


def test_the_first_report_of_a_host_is_written_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is not there yet when the reader begins."""
    verify, halves = chain._verify, [["half a report"]]

    def meanwhile(directory: Path) -> list[str]:
        if halves:
            write(tmp_path, 1)
            return halves.pop()
        return verify(directory)

    monkeypatch.setattr(chain, "_verify", meanwhile)
    assert chain.verify_chain(tmp_path) == []


def test_a_copy_elsewhere_can_be_verified(tmp_path: Path) -> None:
    write(tmp_path / "a", 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert chain.verify_chain(tmp_path / "b") == []
