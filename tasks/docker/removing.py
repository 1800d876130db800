"""Remove the chosen objects: each is checked again right before, and never removed by force."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import docker.errors

from blocks.docker import engine, words
from runbook.guard.permit import Act
from runbook.kinds import action
from tasks.docker.choosing import Doomed, Kind
from tasks.docker.inventory import COUNT_SECONDS, STOPPED, moment


@dataclass(frozen=True)
class Removed:
    """The result for one object; `kept`: why it was kept, "" if it was removed."""

    doomed: Doomed
    kept: str


def _acts(doomed: Sequence[Doomed]) -> list[Act]:
    """Name each object by its id, too: another one can get the same name."""
    return [Act(f"remove {one.kind}", f"{one.name} {one.id}".strip()) for one in doomed]


@action(of=_acts, idempotent=True)
def remove(host: str, doomed: Sequence[Doomed]) -> list[Removed]:
    """Remove the chosen objects. One that is used now, or has been replaced, is kept with the reason.

    Raises:
        Unreachable: the engine does not answer; earlier removals stay done.
    """
    done = list[Removed]()
    with engine(host, seconds=COUNT_SECONDS) as client:
        for one in doomed:
            try:
                kept = _REMOVE[one.kind](client, one)
            except docker.errors.NotFound:  # removed meanwhile
                kept = ""
            except docker.errors.APIError as error:
                kept = words(error)
            done.append(Removed(one, kept))
    return done


def _container(client: Any, one: Doomed) -> str:
    """Keep its anonymous volumes: volumes are removed by name only."""
    state = client.api.inspect_container(one.id)["State"]
    if state["Status"] not in STOPPED:
        return f"it is {state['Status']} now"
    if moment(state["FinishedAt"]) > one.since:
        return "it ran meanwhile"
    client.api.remove_container(one.id)
    return ""


def _image(client: Any, one: Doomed) -> str:
    named = one.name if one.name not in one.id else one.id
    if client.api.inspect_image(named)["Id"] != one.id:
        return "the tag belongs to another image now"
    users = [item["Names"][0].lstrip("/") for item in client.api.containers(all=True) if item["ImageID"] == one.id]
    if users:
        return f"{', '.join(users)} uses it now"
    client.api.remove_image(named)
    return ""


def _network(client: Any, one: Doomed) -> str:
    for item in client.api.containers(all=True):
        if one.id in {used.get("NetworkID") for used in item["NetworkSettings"]["Networks"].values()}:
            return f"{item['Names'][0].lstrip('/')} uses it now"
    client.api.remove_network(one.id)
    return ""


def _volume(client: Any, one: Doomed) -> str:
    if moment(client.api.inspect_volume(one.name).get("CreatedAt") or "") != one.since:
        return "a new volume has that name now"
    users = client.api.containers(all=True, filters={"volume": one.name})
    if users:
        return f"{users[0]['Names'][0].lstrip('/')} mounts it now"
    client.api.remove_volume(one.name)
    return ""


def _cache(client: Any, one: Doomed) -> str:
    """The engine checks it again itself: recently used records are younger."""
    hours = max(int((datetime.now(UTC) - one.since).total_seconds() // 3600), 0)
    deleted = client.api.prune_builds(filters={"until": f"{hours}h"}, all=True).get("CachesDeleted")
    return "" if deleted else "a build uses it, or has used it since"


_REMOVE: dict[Kind, Callable[[Any, Doomed], str]] = {
    "container": _container,
    "image": _image,
    "network": _network,
    "volume": _volume,
    "build cache": _cache,
}
