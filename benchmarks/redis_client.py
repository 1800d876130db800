"""Another client of a Redis, in a process of its own: a GET and a SET every 5 ms until its standard input ends.

    python -m benchmarks.redis_client PORT      # the password is in REDISCLI_AUTH

Prints each call's seconds as one line of JSON.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

import redis

EVERY_SECONDS = 0.005


def main(port: str) -> int:
    """Calls are timed from when they were due: one that waits makes the next ones late, too."""
    client = redis.Redis(port=int(port), password=os.environ["REDISCLI_AUTH"], socket_timeout=30)
    seconds = []
    due = time.monotonic()
    while not select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
        client.set("bench:client", due)
        client.get("bench:client")
        seconds.append(time.monotonic() - due)
        due = max(due + EVERY_SECONDS, time.monotonic())
    print(json.dumps(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
