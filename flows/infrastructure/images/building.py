"""Build and push the application's images (§4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from blocks.docker import Docker
from blocks.environment import Environment
from runbook.change import Change, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.page.markdown import fenced
from runbook.report import Evidence, Report, Status
from runbook.run import WithoutConfirm, runbook
from runbook.run_name import RunName
from runbook.units import counted, size
from tasks.docker.base_images import read_base_digests
from tasks.docker.building import (
    REVISION,
    BuildFailed,
    BuiltImage,
    build_image,
    check_version,
    push_image,
    read_digest,
    read_labels,
    read_pushed,
)
from tasks.docker.source import BuildSource, read_source


@flow(name="build-images", flow_run_name=RunName("build-images {environment} {version}"))
def build_images(
    environment: str,
    version: str = "",
    roles: tuple[str, ...] = (),
    push: bool = False,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """イメージのビルドとプッシュ (§4.1)

    Builds the images of [docker.containers] from the checkout. Tags each with the version and with its commit, and
    labels its origin (org.opencontainers.image.revision, version, created, source). With `push` and `confirm` it pushes
    both tags, and checks their digests in the registry. Run it for a release, then deploy-application.

    A build adds images and changes nothing that runs. A version that another commit already uses, locally or in the
    registry, is refused: one name must mean one image. A checkout with uncommitted changes is a WARN, and is not
    pushed. Evidence: the commit, the digests, the end of each build's output.

    Departs from the manual: no tag `latest`, because it changes with each build and cannot be rolled back to.

    Args:
        environment: Environment (lab, staging, production …)
        version: Version (required: tag of the images, e.g. v1.2.3)
        roles: Containers to build (names of [docker.containers]). Empty: all
        push: Push to the registry (needs confirm)
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to build and push. Empty: only plan the push (a build without push needs
            none)
    """
    env = Environment.find(environment)
    alone: WithoutConfirm = "reads" if push else "changes"
    with runbook("Build images", env, confirm, plan, changes=True, without_confirm=alone) as report:
        check_version(version)
        block = env.docker
        chosen = list(dict.fromkeys(roles)) or [role for role, one in block.containers.items() if one.dockerfile]
        if not chosen:
            raise OpsError("no container has a dockerfile", "add it under [docker.containers.<role>]")
        source = read_source(block.checkout)
        _judge_source(report, source, push)
        pushed = {role for role in chosen if _judge_version(report, block, role, version, source, push)}
        report.fail_if_critical()
        references = [f"{block.repository(role)}:{tag}" for role in chosen for tag in (version, source.short)]
        builds = [
            Change(
                partial(build_role, report, block, role, source, version),
                "build",
                f"{role}: {block.container(role).dockerfile} of {source.short}",
            )
            for role in chosen
            if role not in pushed
        ]
        if push:
            pushes = [Change(push_image.bind(block, reference), "push", reference) for reference in references]
            effect = Effect(
                f"builds and pushes {counted(len(chosen), 'image')} as {version}", "delete the tags in the registry"
            )
            pins = [lambda report: report.pin_state("commit", source.short)]
            with carrying_out(report, *builds, *pushes, effect=effect, pins=pins) as carry:
                _report_built(report, block, source, [carry(build) for build in builds])
                digests = [(one.detail, carry(one)) for one in pushes]
            report.table("In the registry", ("image", "digest"), digests)
        else:
            _report_built(report, block, source, [build.work() for build in builds])
        done = "built and pushed" if push else "built"
        report.outcome = f"{', '.join(references[::2])} {done} from {source.short}"
    return report


def _report_built(report: Report, block: Docker, source: BuildSource, built: Sequence[BuiltImage]) -> None:
    rows = [(one.role, one.references[0], one.id, size(one.bytes)) for one in built]
    report.table("Images", ("role", "image", "id", "bytes"), rows)
    digests = read_base_digests(block, source.directory, [one.role for one in built])
    pinned = [(name, digest or "not known: the tag is not pinned") for name, digest in digests.items()]
    report.table("Built from", ("FROM", "image by digest"), pinned)


def _judge_source(report: Report, source: BuildSource, push: bool) -> None:
    report.fact("checkout", f"{source.directory} at {source.revision}")
    changed = ", ".join(source.dirty[:5]) + (" …" if len(source.dirty) > 5 else "")
    report.require(
        "clean checkout",
        not source.dirty,
        "commit the changes, or build in a clean checkout: otherwise the image cannot be built again",
        value=f"uncommitted: {changed}" if changed else "clean",
        worst=Status.CRITICAL if push else Status.WARN,
    )


def _judge_version(report: Report, block: Docker, role: str, version: str, source: BuildSource, push: bool) -> bool:
    """Refuse a version of another commit, locally and in the registry. Returns whether an interrupted run has already
    pushed this image: then it is not built again, because a second build has another content."""
    reference = f"{block.repository(role)}:{version}"
    labels = read_labels(block.host, reference)
    revision = (labels or {}).get(REVISION, "unknown")
    clean = revision == source.revision and not source.dirty
    ours = labels is None or clean or revision == f"{source.revision}-dirty"
    report.require(
        f"local {reference}",
        ours,
        "choose another version: this one belongs to another commit",
        value=f"of {revision}" if labels is not None else "none yet",
    )
    if not push:
        return False
    if not block.registry:
        raise OpsError("the environment configures no registry", "add registry under [docker], or build without push")
    digest = read_digest(block, reference)
    pushed = bool(digest) and clean and digest in read_pushed(block.host, reference)
    report.require(
        f"{reference} in the registry",
        not digest or pushed,
        "choose another version: this one can be in use",
        value=f"{digest}, pushed from this engine" if pushed else digest or "none yet",
    )
    return pushed


def build_role(report: Report, block: Docker, role: str, source: BuildSource, version: str) -> BuiltImage:
    """Build one image; its output is evidence.

    Raises:
        BuildFailed: a step failed.
    """
    try:
        built = build_image(block, role, source, version)
    except BuildFailed as error:
        report.attach(Evidence(f"End of the build of {role}", text=fenced(error.log)))
        raise
    report.attach(Evidence(f"Build of {role}", text=fenced(built.log[-4000:])))
    return built
