"""The base images of the application: their age, their support, and newer ones (§4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, timedelta
from typing import Annotated

from pydantic import Field

from blocks.docker import Docker
from blocks.environment import Environment
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.next import Next
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report, Status
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.application.worktree import Worktree, worktree
from tasks.docker.base_images import BaseImage, forget_image, read_base_images, try_image
from tasks.docker.bases import Base, Support, read_support, replaced
from tasks.docker.building import build_image
from tasks.docker.source import read_source


@flow(name="check-base-images", flow_run_name=RunName("check-base-images {environment}"))
def check_base_images(environment: str, max_age_days: Annotated[int, Field(ge=1)] = 30) -> Report:
    """ベースイメージ更新: ベースイメージの確認 (§4.1)

    Reads the FROM lines of the application's Dockerfiles and checks each image: the age of the local one, whether the
    registry has a newer one under that name (with fixes that a build here lacks), and the end of support of its parts.
    The dates are in tasks/docker/releases.toml, with their source and day. Run it weekly.

    It changes nothing. An unsupported part is CRITICAL; half a year before its end it is WARN. A part that is in no
    table, or an unreachable registry, is “not known”. The next step is update-base-images.

    Args:
        environment: Environment (lab, staging, production …)
        max_age_days: Warn if a local base image is older than this many days
    """
    env = Environment.find(environment)
    with runbook("Check base images", env) as report:
        source = read_source(env.docker.checkout)
        report.fact("checkout", f"{source.directory} at {source.short}")
        images = read_base_images(env.docker, source.directory)
        today = date.today()
        for image in images:
            judge_support(report, image.base, today)
            judge_drift(report, image)
            judge_age(report, image, max_age_days)
        report_pins(report, images)
        _attach_images(report, images)
        report.outcome = f"{len(images)} base images in {len({one.dockerfile for one in images})} Dockerfiles"
    return report


@flow(name="update-base-images", flow_run_name=RunName("update-base-images {environment} {to}"))
def update_base_images(environment: str, to: tuple[str, ...] = (), pin: bool = False, branch: str = "") -> Report:
    """ベースイメージ更新: FROM行の更新 (§4.1)

    Writes new base images into the FROM lines, on a branch in a git worktree. Builds each image there with freshly
    pulled bases, and runs the container's `test` in it, without a network. Without `to`, pinned digests become the
    registry's current ones; lines with a tag only are built and tested with its current image, and with `pin` get its
    digest. Run it when check-base-images recommends it; then merge the branch and run build-images.

    The live checkout and the running containers are not changed. The branch and the pulled base images remain. If a
    build or a test fails the run fails, and the branch is kept. To undo: delete the branch. Evidence: the diff, the
    ends of builds and tests.

    Args:
        environment: Environment (lab, staging, production …)
        to: New image (e.g. python:3.12-slim-trixie); it replaces FROM lines of the same repository. Empty: tags stay
        pin: Also write the registry's current digest in FROM lines that only have a tag (if to is empty)
        branch: Name of the branch. Empty: base-images-<time>
    """
    env = Environment.find(environment)
    with runbook("Update base images", env, changes=True) as report:
        block, source = env.docker, read_source(env.docker.checkout)
        name = branch or f"base-images-{report.started:%Y%m%d-%H%M%S}"
        report.require(
            "clean checkout",
            not source.dirty,
            "commit the changes: the branch would not contain them",
            value=f"uncommitted: {', '.join(source.dirty[:5])}" if source.dirty else "clean",
        )
        report.fail_if_critical()
        images = read_base_images(block, source.directory)
        changes = _changes(images, to, pin)
        with worktree(source.directory, name) as tree:
            for dockerfile in {image.dockerfile for image, _ in changes}:
                _write(tree, dockerfile, [(image, by) for image, by in changes if image.dockerfile == dockerfile])
            if tree.commit(f"Base images: {', '.join(sorted({by for _, by in changes})) or 'unchanged'}"):
                report.attach(Evidence("Diff", text=fenced(tree.diff()[-8000:], "diff")))
                report.fact("branch", name)
            roles = list(dict.fromkeys(role for image in images for role in image.roles))
            for role in roles:
                _prove(report, block, tree, role)
        kept = f"; they are on the branch {name}" if changes else "; no FROM line had to change"
        report.outcome = f"{len(roles)} images built on {len(changes)} changed bases{kept}"
    return report


def _attach_images(report: Report, images: Sequence[BaseImage]) -> None:
    rows = [
        (
            one.base.reference,
            f"{one.dockerfile}:{one.base.line}",
            ", ".join(one.roles),
            one.built.date() if one.built else "not local",
            one.theirs or one.away,
        )
        for one in images
    ]
    report.table("Base images", ("image", "line", "roles", "built", "in the registry"), rows)


def _changes(images: Sequence[BaseImage], to: Sequence[str], pin: bool) -> list[tuple[BaseImage, str]]:
    """The new image of each FROM line that changes.

    Raises:
        OpsError: an entry of `to` is no image or matches no FROM line, or an image to pin has no known digest.
    """
    if not to:
        loose = [one for one in images if pin and not one.base.digest]
        if unknown := [f"{one.base.reference} ({one.away})" for one in loose if not one.pinned]:
            raise OpsError(
                f"no digest is known of {', '.join(unknown)}", "run this on a host that reaches the registry"
            )
        return [(one, one.pinned) for one in images if one in loose or (one.base.digest and one.drifted)]
    changes = []
    for reference in to:
        repository, _, tag = reference.rpartition(":")
        ours = [one for one in images if one.base.repository == repository]
        if not ours or not tag or "/" in tag:
            known = ", ".join(sorted({one.base.named for one in images}))
            raise OpsError(f"no FROM line can become “{reference[:80]}”", f"enter repository:tag of one of {known}")
        changes += [(one, reference) for one in ours if one.base.named != reference]
    return changes


def _write(tree: Worktree, dockerfile: str, changes: Sequence[tuple[BaseImage, str]]) -> None:
    path = tree.directory / dockerfile
    text = path.read_text(encoding="utf-8")
    for image, by in changes:
        text = replaced(text, image.base, by)
    path.write_text(text, encoding="utf-8")


def _prove(report: Report, block: Docker, tree: Worktree, role: str) -> None:
    """Build a role's image, run its test, and remove its trial tag.

    Raises:
        OpsError: the build or the test fails.
    """
    built = build_image(block, role, read_source(str(tree.directory)), f"try-{tree.head()[:12]}", trial=True)
    try:
        report.attach(Evidence(f"Build of {role}", text=fenced(built.log[-2000:])))
        test = block.container(role).test
        if not test:
            report.warn(
                f"test of {role}",
                f"add test under [docker.containers.{role}]: a command that proves that the image works",
                value="none is configured: the image builds, but is not tested",
            )
            return
        said = try_image(block, built.id, test)
        report.attach(Evidence(f"Test of {role}", text=fenced(said[-2000:])))
        report.passed(f"test of {role}", value="passed")
    finally:
        forget_image(block.host, built.references)


SOON = timedelta(days=183)
OLD_TABLE = timedelta(days=365)
NEWER = "plan a newer release"
UPDATE = Next("update-base-images", "build and test it on a branch")


def judge_support(report: Report, base: Base, today: date) -> None:
    """The end of support of each part; an unknown part is a WARN."""
    found = read_support(base)
    if not found:
        report.warn(
            f"support of {base.named}",
            "look up its end of support, and add it to tasks/docker/releases.toml",
            value="not known",
        )
    for one in found:
        judge_release(report, f"support of {base.named}: {one.product} {one.release}", one, today, NEWER)
    if base.tag == "latest" and not base.digest:
        report.warn(
            f"tag of {base.named}",
            "use a version as the tag: with latest each build can get another image",
            value="latest",
        )


def judge_release(report: Report, name: str, part: Support, today: date, hint: str) -> None:
    """The end of support of a part; `hint`: how to update it."""
    source = f"by {part.source}, read {part.checked}"
    if not part.known:
        report.warn(
            name,
            f"look up its end of support, and add it to tasks/docker/releases.toml: {part.source}",
            value="not known",
        )
    elif part.ends is None:
        report.prefer(
            name,
            today - part.checked <= OLD_TABLE,
            f"look it up again: {part.source}",
            value=f"no end announced, {source}",
        )
    else:
        over = part.ends < today
        report.require(
            name,
            part.ends - today > SOON,
            hint,
            value=f"{'ended' if over else 'until'} {part.ends}, {source}",
            expected=f"beyond {today + SOON}",
            worst=Status.CRITICAL if over else Status.WARN,
        )


def judge_drift(report: Report, image: BaseImage) -> None:
    """Whether the registry has another image under that name."""
    name = f"newest of {image.base.named}"
    if image.away:
        report.warn(
            name, "run this again when the registry answers, or correct the name", value=f"not known: {image.away}"
        )
    elif not image.ours and not image.base.digest:
        report.passed(name, value=f"not on this engine; the registry has {image.theirs}")
    else:
        report.prefer(
            name,
            not image.drifted,
            "build and test with the newer image",
            value=f"the registry has {image.theirs}" if image.drifted else "the local one",
            follow=[UPDATE],
        )


def report_pins(report: Report, images: Sequence[BaseImage]) -> None:
    """A tag moves: two builds of one commit can start from two images."""
    loose = {one.base.reference: one.pinned for one in images if not one.base.digest}
    for reference, pinned in loose.items():
        report.fact(
            f"{reference} is not pinned",
            f"to pin it: FROM {pinned} (update-base-images with pin writes that)"
            if pinned
            else "its digest is not known to the registry or the engine",
        )


def judge_age(report: Report, image: BaseImage, most_days: int) -> None:
    """An old image lacks all fixes since its build, even if the registry has no newer one."""
    if image.built:
        days = (report.started - image.built).days
        report.prefer(
            f"age of {image.base.named}",
            days <= most_days,
            "build with a newer image",
            value=f"{days} days",
            expected=f"≤ {most_days} days",
            follow=[UPDATE],
        )
