"""Type errors that mypy and TypeScript's compiler find (§3.3). Both must list the files that they checked, and write
nothing into the checkout.

Source: https://mypy.readthedocs.io/en/stable/command_line.html, https://www.typescriptlang.org/docs/handbook/compiler-options.html
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from blocks.places import Application
from runbook.errors import CommandFailed, OpsError, excerpt
from runbook.kinds import probe
from runbook.shell import Completed
from tasks.application.programs import answer, python_program, web_program
from tasks.code.problem import CheckedCode, Problem, Severity, shown

IMPORTING = ("PYTHONPATH", "MYPYPATH")
"""Variables by which mypy finds its plugins and the application's imports."""
_MYPY = re.compile(
    r"(?P<file>[^:\n]+):(?:(?P<line>\d+):)? (?P<severity>error|warning): (?P<message>.*?)"
    r"(?:  \[(?P<code>[a-z0-9-]+)\])?"
)
_MYPY_END = re.compile(
    r"^(?:Success: no issues found in|Found \d+ errors? in \d+ files? \(checked) (\d+) source files?", re.M
)
_MYPY_STOPPED = re.compile(r"^Found \d+ errors? in \d+ files? \(errors prevented further checking\)", re.M)
_TSC = re.compile(r"(?P<file>.+?)\((?P<line>\d+),\d+\): (?P<severity>error|warning) (?P<code>TS\d+): (?P<message>.*)")
_TSC_STOPS = re.compile(r"TS[15]\d{3}")  # syntax, settings
_TSC_WHOLE = re.compile(r"error (?P<code>TS\d+): (?P<message>.*)")


@probe
def read_mypy(
    application: Application,
    repository: Path,
    files: Sequence[Path],
    *,
    strict: bool,
    seconds: float,
    cache: Path,
    html: Path,
) -> CheckedCode:
    """Run mypy in the backend's directory: on the chosen `files`, else those of its configuration, else all. `html`:
    the directory of its HTML report, which needs lxml.

    Raises:
        OpsError: it is missing, hangs, fails, or does not print the number of checked files.
    """
    backend = application.source
    mypy = python_program(application, "mypy")
    version = answer([mypy, "--version"], backend, seconds=seconds, inherit=IMPORTING).stdout.strip()
    if not version.startswith("mypy "):
        raise OpsError(f"mypy reports its version as “{excerpt(version)}”", f"check {mypy}: it is not mypy")
    argv: list[str | Path] = [
        mypy,
        "--cache-dir",
        cache,
        "--no-pretty",
        "--show-error-codes",
        "--hide-error-context",
        "--hide-error-end",
        "--hide-column-numbers",
        "--no-color-output",
        "--error-summary",
    ]
    if application.python and Path(application.python).exists():
        argv += ["--python-executable", application.python]
    argv += ["--strict"] if strict else []
    done, notes = _with_html(argv, files, backend, seconds, html)
    end = _MYPY_END.search(done.stdout)
    if not end and not _MYPY_STOPPED.search(done.stdout):
        raise OpsError(
            f"mypy did not print what it checked: {excerpt(done.stdout)}",
            "run mypy by hand: without a valid answer the check has not passed",
        )
    if not end:
        notes = (*notes, "mypy stopped at an error that prevents further checking: fix it first")
    problems = _mypy_problems(done.stdout, repository, backend)
    if done.code and not problems:
        raise OpsError(
            f"mypy exited {done.code} without naming an error: {excerpt(done.stdout)}",
            "run mypy by hand: without a valid answer the check has not passed",
        )
    return CheckedCode("mypy", version, int(end[1]) if end else 0, problems, done.seconds, notes)


def _mypy_problems(printed: str, repository: Path, backend: Path) -> tuple[Problem, ...]:
    return tuple(
        Problem(
            "mypy",
            shown(repository, backend / found["file"]),
            int(found["line"] or 0),
            found["code"] or "",
            found["message"],
            _severity(found["severity"]),
        )
        for line in printed.splitlines()
        if (found := _MYPY.fullmatch(line))
    )


def _with_html(
    argv: Sequence[str | Path], files: Sequence[Path], backend: Path, seconds: float, html: Path
) -> tuple[Completed, tuple[str, ...]]:
    try:
        return _targeted([*argv, "--html-report", html], files, backend, seconds), ()
    except CommandFailed as error:
        if "lxml" not in error.stderr:
            raise
    note = "no HTML report: it needs lxml in mypy's environment (pip install lxml)"
    return _targeted(argv, files, backend, seconds), (note,)


def _targeted(argv: Sequence[str | Path], files: Sequence[Path], backend: Path, seconds: float) -> Completed:
    """Run mypy on `files`, else on its configured targets. Exit code 2 can also be a syntax error, then on stdout."""
    quiet = {"PYTHONDONTWRITEBYTECODE": "1"}

    def run(*targets: str | Path) -> Completed:
        done = answer(
            [*argv, *targets], backend, seconds=seconds, accepted=(0, 1, 2), environment=quiet, inherit=IMPORTING
        )
        if done.code == 2 and not done.stdout.strip():
            raise CommandFailed([str(part) for part in argv], 2, done.stderr, "run mypy by hand")
        return done

    if files:
        return run("--", *files)
    try:
        return run()
    except CommandFailed as error:
        if "Missing target" not in error.stderr:
            raise
    return run("src" if (backend / "src").is_dir() else ".")


@probe
def read_tsc(web: Path, repository: Path, files: Sequence[Path], *, strict: bool, seconds: float) -> CheckedCode:
    """Run the workspace's TypeScript compiler on each of its projects. A file argument would make it ignore
    tsconfig.json: so it checks everything, and only the errors of `files`, if given, are kept.

    Raises:
        OpsError: it is missing, hangs, fails, or checked no file.
    """
    tsc = web_program(web, "tsc")
    version = answer([tsc, "--version"], web, seconds=seconds).stdout.strip()
    if not re.fullmatch(r"Version \d+\.\d+\.\S+", version):
        raise OpsError(
            f"tsc reports its version as “{excerpt(version)}”", f"check {tsc}: it is not TypeScript's compiler"
        )
    checked, problems, took = set[Path](), dict[Problem, None](), 0.0
    projects = _projects(web)
    for project in projects:
        done = _compile(tsc, web, project, strict, seconds)
        took += done.seconds
        checked |= _sources(done.stdout, web)
        problems |= dict.fromkeys(_tsc_problems(done, web, repository))
        others = (one.parent.resolve() for one in projects if one.parent != web)
        if project.parent == web and all(any(path.is_relative_to(one) for path in checked) for one in others):
            break  # the workspace's own project covers its packages
    if not checked:
        raise OpsError("tsc checked no file of the workspace", "check include and files in its tsconfig.json")
    if missed := [shown(repository, path) for path in files if path.resolve() not in checked]:
        raise OpsError(f"tsc did not check {', '.join(missed[:3])}", "add them to include in a tsconfig.json")
    chosen = {shown(repository, path) for path in files}
    # A project or file that cannot be read prevents the check of all others: its error is kept too.
    kept = tuple(
        one for one in problems if not chosen or one.file in chosen or not one.line or _TSC_STOPS.fullmatch(one.code)
    )
    return CheckedCode("tsc", version, len(files) or len(checked), kept, took)


def _projects(web: Path) -> list[Path]:
    """The workspace's own project first, then those of its packages."""
    found = [path for path in sorted(web.glob("*/*/tsconfig.json")) if "node_modules" not in path.parts]
    own = web / "tsconfig.json"
    if own.is_file():
        found.insert(0, own)
    if not found:
        raise OpsError(f"there is no tsconfig.json in {web}", "add one, or correct [application] web_directory")
    return found


def _compile(tsc: Path, web: Path, project: Path, strict: bool, seconds: float) -> Completed:
    """Composite projects write state even if they emit nothing: it goes to a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="ops-tsc-") as scratch:
        state = Path(scratch, "state.tsbuildinfo")
        options: list[str | Path] = ["--noEmit", "--pretty", "false", "--listFiles", "--incremental"]
        options += ["--tsBuildInfoFile", state, *(["--strict"] if strict else [])]
        return answer([tsc, *options, "--project", project], web, seconds=seconds, accepted=(0, 1, 2))


def _sources(printed: str, web: Path) -> set[Path]:
    """The workspace's own checked files, without declarations of packages."""
    paths = (Path(line) for line in printed.splitlines() if line.startswith("/"))
    return {path for path in paths if path.is_relative_to(web.resolve()) and "node_modules" not in path.parts}


def _tsc_problems(done: Completed, web: Path, repository: Path) -> list[Problem]:
    """The problems in tsc's output.

    Raises:
        OpsError: it failed without naming a problem.
    """
    found = list[Problem]()
    for line in done.stdout.splitlines():
        if at := _TSC.fullmatch(line):
            file = shown(repository.resolve(), (web / at["file"]).resolve())
            found.append(Problem("tsc", file, int(at["line"]), at["code"], at["message"], _severity(at["severity"])))
        elif whole := _TSC_WHOLE.fullmatch(line):
            found.append(Problem("tsc", "tsconfig.json", 0, whole["code"], whole["message"]))
    if done.code and not found:
        raise OpsError(
            f"tsc exited {done.code} without naming an error: {excerpt(done.stdout)}",
            "run tsc by hand: without a valid answer the check has not passed",
        )
    return found


def _severity(word: str) -> Severity:
    return "warning" if word == "warning" else "error"
