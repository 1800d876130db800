"""Whether a container of compose.yaml is well: its health check. Cheap: it runs every ten seconds.

python -m deployments.health api | services | worker
"""

from __future__ import annotations

import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

HEARTBEAT_SECONDS = 60.0
WORKERS = "prefect:workers"
"""Where the background services leave their heartbeats in Redis (docket's): a host's name, # and a process id. The
API's own are in prefect-server:workers."""


def api() -> str:
    """The API answers that it is ready, its database included."""
    return _asked(f"{os.environ['PREFECT_API_URL']}/ready")


def worker() -> str:
    """The worker has polled its pool lately (`--with-healthcheck`)."""
    return _asked(f"http://127.0.0.1:{os.environ['PREFECT_WORKER_WEBSERVER_PORT']}/health")


def services() -> str:
    """The background services of this host have left a heartbeat within a minute."""
    import redis  # the other two need no more than the standard library

    try:
        with redis.Redis.from_url(os.environ["PREFECT_SERVER_DOCKET_URL"], socket_timeout=5) as client:
            beats = client.zrevrange(WORKERS, 0, -1, withscores=True)
    except redis.RedisError as error:
        return f"Redis: {type(error).__name__}"
    own = [score for name, score in beats if name.decode().startswith(f"{socket.gethostname()}#")]
    if not own:
        return "no heartbeat yet"
    age = time.time() - max(own)
    return "" if age <= HEARTBEAT_SECONDS else f"the last heartbeat was {age:.0f} s ago"


def _asked(address: str) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(address, timeout=8) as answer:
            return "" if answer.status == 200 else f"{address} answers {answer.status}"
    except (urllib.error.URLError, OSError) as error:
        return f"{address}: {error}"


KINDS: Mapping[str, Callable[[], str]] = {"api": api, "services": services, "worker": worker}


def main() -> int:
    """The command line: nothing where it is well, else why not."""
    kind = KINDS.get(sys.argv[1] if len(sys.argv) > 1 else "")
    if kind is None:
        print(f"say one of {', '.join(KINDS)}", file=sys.stderr)
        return 2
    if why := kind():
        print(why, file=sys.stderr)
    return int(bool(why))


if __name__ == "__main__":
    sys.exit(main())
