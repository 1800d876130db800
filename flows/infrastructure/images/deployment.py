"""Deploy a version of the application, with an automatic rollback (§4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Protocol

from pydantic import Field

from blocks.environment import Environment
from flows.infrastructure.images.containers import ContainerDeployment
from flows.infrastructure.images.releases import ReleaseDeployment
from runbook.change import Carrier, Line, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName


class Deployment(Protocol):
    """One version and how it is deployed: planned first, then carried out."""

    @property
    def identity(self) -> str:
        """What would be deployed: a commit, or the images."""

    @property
    def lines(self) -> Sequence[Line[..., Any]]:
        """The planned changes."""

    def judge(self) -> None:
        """Report the live version, and what prevents its replacement."""

    def carry_out(self, carry: Carrier) -> str:
        """Deploy and prove it; returns what runs then. On failure roll back and raise RunbookFailed."""


@flow(name="deploy-application", flow_run_name=RunName("deploy-application {environment} {version}"))
def deploy_application(
    environment: str,
    version: str = "",
    roles: tuple[str, ...] = (),
    health_seconds: Annotated[int, Field(ge=1)] = 120,
    recreate: bool = False,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """Dockerイメージ更新: バージョンの配備と切り戻し (§4.1)

    Deploys a version as the environment configures it:

    - Containers ([docker.containers]): pulls the images, creates each container alongside the running one, and swaps
      them.
    - Files ([application] release): unpacks the parts of a tag, branch or commit alongside the live ones, installs the
      packages it needs into a staged environment, stops the services, swaps the parts by rename, starts the services.

    Then the application must become healthy within `health_seconds`, and stay healthy. Otherwise the run restores and
    starts the previous version, and fails with the end of the logs.

    Run it for a release, or with an older version to roll back. Users wait while the old version stops and the new one
    starts. Migrations are not applied: use apply-migrations. It is safe to run again after a kill: the previous version
    is kept until then. Volumes, and files outside the release, are kept; files that a container wrote elsewhere are
    lost. Evidence: the versions before and after, the health.

    Args:
        environment: Environment (lab, staging, production …)
        version: Version to deploy (required: tag of the images, or tag, branch or commit of the repository)
        roles: Containers (names of [docker.containers]). Empty: all
        health_seconds: If the application is not healthy within this many seconds, roll back
        recreate: Recreate it even if the version is the same (after a change of its configuration)
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Deploy application", env, confirm, plan, changes=True) as report:
        deployment = deployment_of(report, env, version, health_seconds, roles=roles, again=recreate)
        deployment.judge()
        if isinstance(deployment, ReleaseDeployment):
            report.pin("version", deployment.release.commit)  # a branch can move before the confirmation
        effect = Effect(
            f"{version} is deployed",
            "deploy-application with the version before",
            down="users wait while the services restart",
        )
        pins = [lambda report: report.pin_state("version", deployment.identity)]
        with carrying_out(report, *deployment.lines, effect=effect, pins=pins) as carry:
            report.outcome = deployment.carry_out(carry)
    return report


def deployment_of(
    report: Report,
    env: Environment,
    version: str,
    seconds: int,
    *,
    roles: Sequence[str] = (),
    again: bool = False,
    commit: str = "",
) -> Deployment:
    """The deployment of a version. `seconds`: deadline for its health; `again`: also if it runs already; `commit`: the
    commit of the version, if known.

    Raises:
        OpsError: the environment configures no deployment, or the version does not exist.
    """
    require_deployment(env)
    if not version:
        raise OpsError("no version is given", "enter a version, such as v1.2.3")
    if env.has("docker") and env.docker.containers:
        return ContainerDeployment.find(report, env, version, seconds, again, roles)
    if roles:
        raise OpsError("the environment configures no container", "leave roles empty: a release is deployed completely")
    return ReleaseDeployment.find(report, env, version, seconds, again, commit)


def require_deployment(env: Environment) -> None:
    """Raises OpsError if the environment configures no deployment."""
    if (env.has("docker") and env.docker.containers) or (env.has("application") and env.application.release):
        return
    raise OpsError(
        f"{env.name} configures no deployment: neither containers nor a release",
        "add [docker.containers.backend], or [application] release, to its TOML",
    )
