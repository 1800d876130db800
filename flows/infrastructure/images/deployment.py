"""A version of the application deployed, with the way back (§4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol

from prefect import flow
from pydantic import Field

from blocks.environment import Environment
from flows.infrastructure.images.containers import Containers
from flows.infrastructure.images.releases import Unpack
from runbook.errors import OpsError
from runbook.guard.permit import Act, Permit
from runbook.report import Report
from runbook.run import runbook


class Way(Protocol):
    """How a version gets to where it runs, planned first."""

    @property
    def identity(self) -> str:
        """What would run: a commit, or the images."""

    def plan(self, report: Report) -> Sequence[Act]:
        """What is there, what would be done; returns what has to be permitted."""

    def carry_out(self, report: Report, permit: Permit) -> str:
        """Deployed and proven, or what was before again and RunbookFailed; returns what runs then."""


@flow(name="deploy-application", flow_run_name="deploy-application {environment} {version}")
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

    Brings a version to where it runs, in the way that the environment describes. Containers ([docker.containers]): the
    images are pulled, each container is made anew beside the one that runs, and takes its place. Files ([application]
    release): the parts of that tag, branch or commit of the repository are unpacked beside what runs, the packages
    that it wants are installed into an environment beside, the services stop, the parts are swapped by renames, the
    services start. Then the application's own health must be well within `health_seconds`, and stay so. Where it is
    not, what was before, which was kept, is put back and started, and the run fails with the end of the logs.

    Run it for a release, or with an older version to go back. While the old one stops and the new one starts, users
    wait. Migrations are apply-migrations' work. A run that was killed is launched again: what had been set aside is
    still the way back. Volumes and files that are no part of a release are kept; files that a container wrote
    elsewhere are not. Evidence: what ran before, what runs then, the health.

    Args:
        environment: 対象の環境
        version: 配備するバージョン (必須。イメージのタグ、またはリポジトリのタグ・ブランチ・コミット)
        roles: 対象のコンテナ ([docker.containers] の名前)。空ならすべて
        health_seconds: この秒数以内に正常にならなければ元のバージョンに戻す
        recreate: 同じバージョンでもやり直す (設定を変えたとき)
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Deploy application", env, confirm, plan, changes=True) as report:
        way = way_of(env, version, health_seconds, roles=roles, again=recreate)
        acts = way.plan(report)
        if isinstance(way, Unpack):
            report.pin("version", way.release.commit)  # a branch may move until it is confirmed
        report.pin_state("version", way.identity)
        permit = report.permit(*acts)
        report.outcome = way.carry_out(report, permit)
    return report


def way_of(
    env: Environment, version: str, seconds: int, *, roles: Sequence[str] = (), again: bool = False, commit: str = ""
) -> Way:
    """The environment's. `again`: also where that version runs already; `commit`: what is unpacked by that name.

    Raises:
        OpsError: it describes none, or there is no such version.
    """
    require_way(env)
    if not version:
        raise OpsError("no version is named", "name one, such as v1.2.3")
    if env.has("docker") and env.docker.containers:
        return Containers.found(env, version, seconds, again, roles)
    if roles:
        raise OpsError("the environment describes no container", "leave roles empty: a release is unpacked whole")
    return Unpack.found(env, version, seconds, again, commit)


def require_way(env: Environment) -> None:
    """Raises OpsError where the environment describes no way to deploy."""
    if (env.has("docker") and env.docker.containers) or (env.has("application") and env.application.release):
        return
    raise OpsError(
        f"{env.name} has no way to deploy: it describes neither containers nor a release to unpack",
        "add [docker.containers.backend], or [application] release, to its TOML",
    )
