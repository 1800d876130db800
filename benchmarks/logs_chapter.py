"""What the chapter of logs adds (§5.2, §6.3, §6.4): token usage and error summary against jq as the manual uses it, the
audit log searched, and the memory that many gigabytes take."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure
from lab.progress import Tell
from lab.state.base import CHECKOUT
from runbook import shell
from runbook.errors import OpsError

NAME = "logs"
LINES, AUDIT_LINES, GIGABYTES = 1_000_000, 10_000_000, 10
ROUNDS = 2
BEGIN = datetime(2026, 2, 14, tzinfo=UTC)
SECONDS = 2 * 86_400
TOKENS = "flows.ai_providers.usage:report_token_usage"
ERRORS = "flows.logs.errors:summarise_errors"
AUDIT = "flows.logs.audit:search_audit_log"
PEER = CHECKOUT / "benchmarks" / "logs_peer.sh"
TOML = """
name = "{name}"
timezone = "Asia/Tokyo"
reports = "{base}/reports"
[objectives]
rpo = "1h"
rto = "4h"
[services]
names = {{}}
[logs]
app = "{base}/app.log"
audit = "{base}/audit.log"
"""


@dataclass(frozen=True)
class LogsChapter:
    """The measurements; each returns its lines of the table."""

    tell: Tell

    def figures(self) -> list[Figure]:
        """All of them.

        Raises:
            OpsError: jq is missing, or a side failed.
        """
        if shutil.which("jq") is None:
            raise OpsError("jq is missing", "apt install jq")
        with _place() as base:
            _write(base / "app.log", LINES, _application_line)
            ratios = [
                self._against(base, "token usage", "tokens", TOKENS, month="2026-02"),
                self._against(base, "error summary", "errors", ERRORS, hours=24, until="2026-02-16T00:00:00+00:00"),
            ]
            return [*ratios, *self._audit(base), self._memory(base)]

    def _against(self, base: Path, what: str, peer: str, flow: str, **parameters: Any) -> Figure:
        ours, theirs = list[float](), list[float]()
        for number in range(ROUNDS):
            ours.append(_flow(flow, **parameters)[0])
            theirs.append(shell.run([PEER, peer, base / "app.log"]).seconds)
            self.tell(f"{what} {number + 1}: ours {ours[-1]:.2f} s, jq {theirs[-1]:.2f} s")
        size = (base / "app.log").stat().st_size / 1e6
        return Figure.ratio(f"{what}, 1 M lines ({size:.0f} MB), the whole flow ÷ jq", ours, theirs, 0.20)

    def _audit(self, base: Path) -> list[Figure]:
        _write(base / "audit.log", AUDIT_LINES, _audit_line)
        _read(base / "audit.log")
        ours = [_flow(AUDIT, user="user-123")[0] for _ in range(ROUNDS)]
        size = (base / "audit.log").stat().st_size / 1e9
        self.tell(f"audit log: {min(ours):.2f} to {max(ours):.2f} s")
        (base / "audit.log").unlink()
        return [Figure.seconds(f"a user's history and unusual log-ins of 10 M audit lines ({size:.1f} GB)", ours, 3.0)]

    def _memory(self, base: Path) -> Figure:
        """The same file again and again, as rotated ones."""
        source = base / "app.log"
        for number in range(1, GIGABYTES * 1_000_000_000 // source.stat().st_size + 1):
            shutil.copy2(source, base / f"app.log.{number}")
        seconds, peak = _flow(TOKENS, month="2026-02")
        self.tell(f"{GIGABYTES} GB: {seconds:.1f} s, {peak / 1e6:.0f} MB")
        shown = f"{peak / 1e6:,.0f} MB, in {seconds:.1f} s"
        return Figure(f"memory of token usage over {GIGABYTES} GB of logs", peak / 1e9, 1.0, unit="GB", shown=shown)


@contextmanager
def _place() -> Iterator[Path]:
    kept = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="ops-bench-") as directory:
        base = Path(directory)
        (base / "logs.toml").write_text(TOML.format(name=NAME, base=base))
        os.environ |= {"OPS_ENVIRONMENT": NAME, "OPS_ENVIRONMENT_FILE": str(base / "logs.toml")}
        try:
            yield base
        finally:
            os.environ.clear()
            os.environ.update(kept)


def _write(path: Path, count: int, line: Any) -> None:
    with path.open("w", encoding="utf-8", buffering=1 << 20) as file:
        for number in range(count):
            at = BEGIN + timedelta(seconds=number * SECONDS / count)
            file.write(line(number, at.isoformat()))


def _application_line(number: int, at: str) -> str:
    head = f'{{"timestamp": "{at}", "level": '
    if number % 5 == 0:
        return (
            f'{head}"INFO", "module": "ai", "message": "AI API Call", "provider": "azure", "model": "gpt-4o", '
            f'"prompt_tokens": {number % 900}, "completion_tokens": {number % 300}, '
            f'"total_tokens": {number % 900 + number % 300}}}\n'
        )
    if number % 100 == 1:
        return f'{head}"ERROR", "module": "interview", "message": "session {number} ended after {number % 60} s"}}\n'
    said = f"GET /api/sessions/{number}"
    return f'{head}"INFO", "module": "http", "message": "{said}", "status": 200, "ms": {number % 90}}}\n'


def _audit_line(number: int, at: str) -> str:
    action = ("login", "create_session", "answer", "evaluate", "read")[number % 5]
    return (
        f'{{"timestamp": "{at}", "level": "INFO", "logger": "audit", "user_id": "user-{number % 1009}", '
        f'"action": "{action}", "resource": "session_{number % 7919}", "result": "success", '
        f'"ip_address": "10.0.{number % 1009 % 250}.{number % 1009 % 7}"}}\n'
    )


def _read(path: Path) -> None:
    """Into the cache."""
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def _flow(target: str, **parameters: Any) -> tuple[float, float]:
    """Seconds of the flow's function in a process of its own, and the most memory in bytes that one of them took."""
    argv = [
        sys.executable,
        "-m",
        "benchmarks.call",
        target,
        json.dumps({"environment": NAME, **parameters}),
        "--direct",
    ]
    told: dict[str, Any] = json.loads(shell.run(argv, directory=CHECKOUT, inherit=("*",)).stdout.splitlines()[-1])
    return float(told["seconds"]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
