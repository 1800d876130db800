"""Who else runs `certbot renew` on this host: Debian's cron file, a systemd timer, the manual's line in a crontab."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from runbook.kinds import probe

ROOT = Path("/")
CRONTABS = ("etc/crontab", "etc/cron.d/*", "etc/cron.daily/*", "var/spool/cron/crontabs/*", "var/spool/cron/*")
TIMERS = "etc/systemd/system/timers.target.wants/*certbot*.timer"
_RENEWS = re.compile(r"^\s*[^#\s].*\bcertbot\b.*\brenew\b|^\s*[^#\s].*\bcertbot\b.*-q\b")


@dataclass(frozen=True)
class Schedules:
    """Where a renewal is scheduled, and what could not be read."""

    found: tuple[str, ...]
    unread: tuple[str, ...]


@probe
def find_schedules() -> Schedules:
    """Look at this host's crontabs and enabled timers."""
    systemd = (ROOT / "run/systemd/system").exists()
    found = [str(path) for path in ROOT.glob(TIMERS)] if systemd else []
    unread = []
    for path in (path for pattern in CRONTABS for path in sorted(ROOT.glob(pattern))):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        except OSError:
            unread.append(str(path))
            continue
        # Debian's own line does nothing where systemd runs: its timer does.
        if any(_RENEWS.match(line) and not (systemd and "run/systemd/system" in line) for line in lines):
            found.append(str(path))
    return Schedules(tuple(found), tuple(unread))
