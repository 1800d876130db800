"""JSON reports as a chain of hashes: one chain per host and environment, appended under a file lock.

An edit or a removal in the middle is detected by `verify_chain`. A cut at the end is detected only where the newest
hash is kept elsewhere: every report's artifact in Prefect carries its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runbook.files import durable

GENESIS = "0" * 64


def hash_of(report: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a report without its own hash."""
    body = {key: value for key, value in report.items() if key != "hash"}
    text = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()


def append(directory: Path, name: str, report: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Write a report behind the newest of this host's chain; returns its path and content."""
    directory.mkdir(parents=True, exist_ok=True)
    host = _host()
    with durable.open_lock(directory / f".chain-{host}.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        head = directory / f".chain-{host}"
        number, previous = _recovered(directory, host, *_head(head))
        content = {**report, "chain": host, "number": number + 1, "previous": previous}
        content["hash"] = hash_of(content)
        stamp = re.sub(r"[-:]", "", str(report["started"]))[:15]
        path = directory / f"{stamp}Z-{host}-{number + 1:06d}-{name}.json"
        text = json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
        # File names that are not UTF-8 reach us as lone surrogates: written as JSON's own escapes.
        durable.write(path, text, errors="backslashreplace", mode=durable.PRIVATE)
        durable.write(head, f"{number + 1} {content['hash']}\n", mode=durable.PRIVATE)
    return path, content


def reports_in(directory: Path) -> list[Path]:
    """The files in `directory` that should be reports of a chain, oldest first. What runs note down for later ones
    lies beside them under other names."""
    return sorted(directory.glob("*Z-*-*-*.json"))


def verify_chain(directory: Path) -> list[str]:
    """Every way in which the chains in `directory` are broken, as sentences; empty when they are whole."""
    while True:
        with contextlib.ExitStack() as stack:  # no run appends meanwhile
            locks = set(directory.glob(".chain-*.lock"))
            for lock in locks:
                fcntl.flock(stack.enter_context(durable.open_lock(lock)), fcntl.LOCK_SH)
            problems = _verify(directory)
            if set(directory.glob(".chain-*.lock")) == locks:  # otherwise a host's first report was being written
                return problems


def _verify(directory: Path) -> list[str]:
    chains: dict[str, list[tuple[int, Path, dict[str, Any]]]] = {}
    problems = []
    for path in reports_in(directory):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            chains.setdefault(report["chain"], []).append((int(report["number"]), path, report))
        except (ValueError, KeyError, TypeError):
            problems.append(f"{path.name} is not a report of the chain")
    for head in directory.glob(".chain-*"):
        if head.suffix != ".lock":
            chains.setdefault(head.name.removeprefix(".chain-"), [])
    for host, reports in chains.items():
        problems += _verify_one(directory / f".chain-{host}", sorted(reports, key=lambda item: item[0]))
    return problems


def _verify_one(head: Path, reports: list[tuple[int, Path, dict[str, Any]]]) -> list[str]:
    problems, ends, previous, expected = [], [(0, GENESIS)], GENESIS, 1
    for number, path, report in reports:
        if report.get("hash") != hash_of(report):
            problems.append(f"{path.name} was changed after it was written")
        if number != expected or report.get("previous") != previous:
            problems.append(f"{path.name} does not follow the report before it: one is missing or was replaced")
        previous, expected = str(report.get("hash")), number + 1
        ends.append((number, previous))
    if _head(head) not in ends[-2:]:  # a run that was killed between its report and the head leaves it one behind
        problems.append(f"the chain of {head.name.removeprefix('.chain-')} does not end where its head says")
    return problems


def _head(head: Path) -> tuple[int, str]:
    try:
        number, last = head.read_text().split()
        return int(number), last
    except (FileNotFoundError, ValueError):  # damaged: the chain begins anew, which `verify_chain` tells
        return 0, GENESIS


def _recovered(directory: Path, host: str, number: int, last: str) -> tuple[int, str]:
    """The head, moved on past a report whose run was killed before it could do that."""
    for path in directory.glob(f"*Z-{host}-{number + 1:06d}-*.json"):
        with contextlib.suppress(ValueError, AttributeError):
            report = json.loads(path.read_text(encoding="utf-8"))
            if report.get("chain") == host and report.get("previous") == last and report.get("hash") == hash_of(report):
                return number + 1, report["hash"]
    return number, last


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "host"
