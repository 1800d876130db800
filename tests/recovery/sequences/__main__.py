"""Random sequences against a small real system.

python -m tests.recovery.sequences --rounds 300 --seed 1
python -m tests.recovery.sequences --seed 17 --steps "write:3 drop-database:5 full-restore:9"
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.fixtures.ports import export_ports

export_ports()
os.environ.setdefault("OPS_LAB_BASE", tempfile.mkdtemp(prefix="ops-sequences-", dir="/var/tmp"))


def main() -> int:
    """One line a round; the smallest failing sequence at a failure."""
    from tests.recovery.sequences.rounds import play, sequence_of, shrink, variant_of
    from tests.recovery.sequences.world import running_world

    faulthandler.register(signal.SIGUSR1)
    parser = argparse.ArgumentParser(prog="python -m tests.recovery.sequences", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--steps", default="", help="this sequence in the place of the seed's")
    parser.add_argument("--verbose", action="store_true", help="print every report")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--by-form", type=float, default=0.5, help="how often a plan is confirmed by its own form")
    parser.add_argument("--tolerate", type=re.compile, default=None, help="problems that are known")
    parser.add_argument("--failures", type=Path, default=None, help="append each failure with its reports to this file")
    given = parser.parse_args()
    broken, seeds = 0, list(range(given.seed, given.seed + given.rounds))
    began = time.monotonic()
    while seeds:
        variant = variant_of(seeds[0])
        with running_world(variant) as world:
            world.by_form, world.tolerated, world.verbose = given.by_form, given.tolerate, given.verbose
            while seeds and variant_of(seeds[0]) == variant:
                seed = seeds.pop(0)
                done = play(world, seed, given.steps.split() or sequence_of(seed))
                print(done.line, flush=True)
                if done.stuck:
                    print(f"    refused last: {done.stuck[:600]}", flush=True)
                if done.failure:
                    broken += 1
                    smallest = done if given.no_shrink else shrink(world, done)
                    print(
                        f'    {smallest.failure.partition(chr(10))[0]}\n    --seed {seed} --steps "{" ".join(smallest.words)}"',
                        flush=True,
                    )
                    if given.failures:
                        with given.failures.open("a") as file:
                            file.write(
                                f'\n===== {smallest.line}\n--seed {seed} --steps "{" ".join(smallest.words)}"\n{smallest.failure}\n'
                            )
    print(f"{given.rounds} rounds in {time.monotonic() - began:.0f} s, {broken} broke a promise", flush=True)
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main())
