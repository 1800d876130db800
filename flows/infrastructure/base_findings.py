"""Findings of check-base-images."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta

from runbook.report import Report, Status
from tasks.docker.base_images import BaseImage
from tasks.docker.bases import Base, Support, read_support

SOON = timedelta(days=183)
OLD_TABLE = timedelta(days=365)
NEWER = "plan a newer release: update-base-images builds and tests it"


def judge_support(report: Report, base: Base, today: date) -> None:
    """Until when each part gets fixes; a part that nobody knows is told."""
    found = read_support(base)
    if not found:
        report.warn(
            f"support of {base.named}", "look it up, and add it to tasks/docker/releases.toml", value="not known"
        )
    for one in found:
        judge_release(report, f"support of {base.named}: {one.product} {one.release}", one, today, NEWER)
    if base.tag == "latest" and not base.digest:
        report.warn(
            f"tag of {base.named}", "name a version: nobody knows what the next build will take", value="latest"
        )


def judge_release(report: Report, name: str, part: Support, today: date, hint: str) -> None:
    """Until when it gets fixes; `hint` says how a newer one comes."""
    told = f"by {part.source}, read {part.checked}"
    if not part.known:
        report.warn(name, f"look it up, and add it to tasks/docker/releases.toml: {part.source}", value="not known")
    elif part.ends is None:
        report.expect(name, today - part.checked <= OLD_TABLE, f"look it up again: {part.source}",
                      value=f"no end announced, {told}", otherwise=Status.WARN)  # fmt: skip
    else:
        over = part.ends < today
        report.expect(name, part.ends - today > SOON, hint,
                      value=f"{'ended' if over else 'until'} {part.ends}, {told}", expected=f"beyond {today + SOON}",
                      otherwise=Status.CRITICAL if over else Status.WARN)  # fmt: skip


def judge_drift(report: Report, image: BaseImage) -> None:
    """Whether the registry has another image under that name by now."""
    name = f"newest of {image.base.named}"
    if image.away:
        report.warn(name, "ask again when the registry answers, or correct the name", value=f"not known: {image.away}")
    elif not image.ours and not image.base.digest:
        report.expect(name, True, "", value=f"not on this engine; the registry has {image.theirs}")
    else:
        report.expect(name, not image.drifted, "update-base-images builds with it and tests it",
                      value=f"the registry has {image.theirs}" if image.drifted else "is the one here",
                      otherwise=Status.WARN)  # fmt: skip


def tell_pins(report: Report, images: Sequence[BaseImage]) -> None:
    """A tag moves: two builds of one commit may begin from two images."""
    loose = {one.base.reference: one.pinned for one in images if not one.base.digest}
    for reference, pinned in loose.items():
        report.fact(f"{reference} is not pinned", f"FROM {pinned} pins it: update-base-images with pin writes that"
                    if pinned else "its digest is not known: neither a registry nor the engine tells one")  # fmt: skip


def judge_age(report: Report, image: BaseImage, most_days: int) -> None:
    """An old image lacks the fixes since, whatever the registry has."""
    if image.built:
        days = (report.started - image.built).days
        report.expect(f"age of {image.base.named}", days <= most_days, "build with a fresh one: update-base-images",
                      value=f"{days} days", expected=f"at most {most_days}", otherwise=Status.WARN)  # fmt: skip
