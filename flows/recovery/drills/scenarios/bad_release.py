"""A live release does not start: back to the previous one (§8.4, フェーズ4: アプリケーションデプロイ)."""

from __future__ import annotations

from blocks.environment import Environment
from flows.infrastructure.images.deployment import deploy_application
from flows.recovery.drills import control, detection
from flows.recovery.drills.scenario import Drill, Refusal, Scenario, Targets
from runbook.errors import OpsError
from runbook.kinds import Bound
from runbook.report import Report
from tasks.application.worktree import git, sweep
from tasks.faults.disposable import Fault
from tasks.faults.release import break_release, spoiled_branch
from tasks.releases.release import Release, find_differences, find_release, read_live

# For the sabotaged release, which never becomes healthy: the runbook must go back after this time.
CONTROL_SECONDS = 10


class BadRelease(Scenario):
    """Bad release."""

    name = "bad_release"
    title = "Bad release"
    situation = "A release that does not start was deployed by hand"
    goal = "Rollback to the previous release (§4.1)"
    checks = "The files are the previous release's and every function works; no data is lost"
    backups = ()
    sensors = ("application",)

    def targets(self, env: Environment) -> Targets:
        """The environment's RTO; no data is touched."""
        return Targets(env.rto_seconds, 0.0, 0)

    def fault(self, env: Environment) -> Bound[..., Fault]:
        """Return what copies a release over the live one."""
        return break_release.bind(env)

    def judge(self, report: Report, env: Environment) -> None:
        """The live files are those of a commit: there is a release to go back to."""
        hint = "run deploy-application with a commit of the repository: the drill goes back to it"
        try:
            live = read_live(env.application)
            changed = find_differences(find_release(env.application, live.commit)) if live.known else []
            problem = ", ".join(changed[:3]) or ("" if live.known else "the live commit is not known")
        except OpsError as error:
            hint, problem = error.hint, error.message
        report.require(
            "steady state: release", not problem, hint, value=problem or live.commit, expected="as committed"
        )

    def strike(self, drill: Drill, fault: Bound[..., Fault]) -> Fault:
        """Copy a commit with a defect over the live files."""
        application = drill.env.application
        good = find_release(application, read_live(application).commit)
        branch = f"drill/{drill.directory.name}"
        drill.note(good=good.commit, version=read_live(application).version, branch=branch)
        bad = spoiled_branch(good, application.source, branch)
        return fault(find_release(application, bad))

    def decide(self, drill: Drill) -> None:
        """Find the live commit and the previous one; then the plan of going back."""
        application, good = drill.env.application, drill.half_done.notes["good"]
        live = read_live(application)
        before = git(find_release(application, live.commit).repository, "rev-parse", f"{live.commit}^").strip()
        drill.report.fact("diagnosis", f"{live.commit[:12]} is live; before it was {before[:12]}")
        drill.report.require(
            "the diagnosis is right",
            before == good,
            "compare the release file with the history of the repository",
            value=before,
            expected=good,
        )
        drill.note(before=before)
        plan = drill.run(deploy_application, version=before)
        drill.done["strategy"] = f"deploy-application: {plan.plan_steps[0].detail}"

    def restore(self, drill: Drill) -> Report:
        """Deploy the previous release."""
        version = drill.half_done.notes["before"]
        done = drill.run(deploy_application, version=version, confirm=drill.env.name)
        drill.done["deployed"] = done.outcome
        return done

    def verify(self, drill: Drill) -> None:
        """To be verified: the files are those of the previous release; the expectations are satisfied."""
        changed = find_differences(self._good(drill))
        drill.report.require(
            "previous release restored",
            not changed,
            "find out what else writes to these files",
            value=", ".join(changed[:3]) or "every file as committed",
        )
        detection.require_expectations(drill)

    def control(self, drill: Drill) -> list[Refusal]:
        """The runbook deploys the bad release, and must go back; and a commit without the release's files."""
        env, notes = drill.env, drill.half_done.notes
        derived = env.derived({}, reports=drill.directory / "control" / "reports")
        repository = self._good(drill).repository
        control.require_accepted(derived, deploy_application, version=notes["good"])
        nothing = git(repository, "hash-object", "-t", "tree", "/dev/null").strip()
        empty = git(repository, "commit-tree", "-m", "nothing", "-p", notes["good"], nothing).strip()
        sabotaged = {"a release that does not start": notes["branch"], "a commit that lacks the release's files": empty}
        found = [
            control.try_sabotaged(
                derived, deploy_application, what, version=version, health_seconds=CONTROL_SECONDS, confirm=env.name
            )
            for what, version in sabotaged.items()
        ]
        wrong = [*find_differences(self._good(drill))[:3], *filter(None, [detection.quick(env)["application"]])]
        drill.report.require(
            "the previous release runs after the negative controls",
            not wrong,
            "fix deploy-application before you use it: it does not go back",
            value=", ".join(wrong) or "healthy, every file as committed",
        )
        self.heal(drill)
        return found

    def heal(self, drill: Drill) -> None:
        """Deploy the good release unless it is live and healthy; delete the drill's branch."""
        env, notes = drill.env, drill.half_done.notes
        if "good" not in notes:
            return
        good = self._good(drill)
        if detection.quick(env)["application"] or find_differences(good):
            drill.run(deploy_application, version=notes["good"], recreate=True, confirm=env.name)
        sweep(good.repository)  # the worktree of a killed run: git keeps its branch otherwise
        if git(good.repository, "for-each-ref", f"refs/heads/{notes['branch']}").strip():
            git(good.repository, "branch", "--quiet", "-D", notes["branch"])

    def _good(self, drill: Drill) -> Release:
        return find_release(drill.env.application, drill.half_done.notes["good"])
