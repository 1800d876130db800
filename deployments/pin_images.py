"""The images of compose.yaml and the base of the worker's image, by digest: a tag that moves changes nothing then.

    python -m deployments.pin_images /etc/interview-ops/compose.env          # shows them
    python -m deployments.pin_images /etc/interview-ops/compose.env --write  # and writes them into the file

The engine queries the registry. An image that no registry has (built here, or moved here by hand) is pinned by the
digest under which the engine has it, or is reported as not pinned.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blocks.docker import Docker
from runbook.drivers import exit_code
from runbook.errors import OpsError, Unreachable
from runbook.files import durable
from tasks.docker.bases import Base
from tasks.docker.building import read_digest, read_pushed

HERE = Path(__file__).parent
BASE = "BASE_IMAGE"
_SERVICE = re.compile(r"image: \$\{(\w+):-([^}]+)\}")
_ARGUMENT = re.compile(r"^ARG BASE=(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Image:
    """An image by the variable that names it. `pinned` is empty where no digest is known: `why` says the reason."""

    variable: str
    reference: str
    pinned: str
    why: str = ""


def images_of(given: Mapping[str, str]) -> dict[str, str]:
    """The variables of compose.yaml that name images, and the base of the Dockerfile: each with what the env file
    gives, else with its default."""
    found = dict(_SERVICE.findall((HERE / "compose.yaml").read_text(encoding="utf-8")))
    found |= {BASE: _ARGUMENT.findall((HERE / "Dockerfile").read_text(encoding="utf-8"))[0]}
    return {name: given.get(name) or default for name, default in found.items()}


def resolve(block: Docker, images: Mapping[str, str]) -> Iterator[Image]:
    """The digest of each image: the registry's of now, else the engine's.

    Raises:
        Unreachable: the engine does not answer.
    """
    for variable, reference in images.items():
        named = Base(reference, reference, 0).named
        try:
            digest, why = read_digest.work(block, named), "the registry has no image of that name"
        except OpsError as error:
            digest, why = "", error.message
        try:
            digest = digest or next(iter(read_pushed.work(block.host, named)), "")
        except Unreachable:
            raise
        except OpsError as error:
            why = f"{why}; {error.message}"
        yield Image(variable, reference, f"{named}@{digest}" if digest else "", "" if digest else why)


def with_images(text: str, found: Sequence[Image]) -> str:
    """An env file's text with the pinned images: each in the place of its line, also of a commented one."""
    for one in found:
        if not one.pinned:
            continue
        line, place = f"{one.variable}={one.pinned}", re.compile(rf"^#? ?{one.variable}=.*$", re.MULTILINE)
        set_lines = [match for match in place.finditer(text) if not match[0].startswith("#")]
        where = (set_lines or list(place.finditer(text)))[-1:]
        if where:
            text = f"{text[: where[0].start()]}{line}{text[where[0].end() :]}"
        else:
            text = f"{text.rstrip()}\n{line}\n" if text.strip() else f"{line}\n"
    return text


def main() -> int:
    """The command line. Exit code 1: an image is not pinned."""
    parser = argparse.ArgumentParser(prog="python -m deployments.pin_images", description="pin images by digest")
    parser.add_argument("file", type=Path, help="compose.env")
    parser.add_argument("--write", action="store_true", help="write the digests into the file")
    parser.add_argument("--host", default="", help="the engine: unix:///… or tcp://…; empty: this host's own")
    given = parser.parse_args()
    try:
        text = given.file.read_text(encoding="utf-8")
        named = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
        found = list(resolve(Docker(host=given.host), images_of(named)))
        if given.write and (new := with_images(text, found)) != text:
            durable.write(given.file, new)
    except OSError as error:
        raise OpsError(f"{given.file}: {error.strerror}", "correct the path, or run it as root") from None
    for one in found:
        state = "pinned" if one.pinned == one.reference else "written" if given.write else "not written: --write"
        print(f"{one.variable}={one.pinned} ({state})" if one.pinned else f"{one.variable}: not pinned, {one.why}")
    return int(not all(one.pinned for one in found))


if __name__ == "__main__":
    sys.exit(exit_code(main))
