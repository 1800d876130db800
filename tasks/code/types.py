"""Types as mypy and TypeScript's compiler see them (§3.3). Both are asked in a way that proves what they looked at, and
that writes nothing into the checkout.

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
from tasks.code.problem import Checked, Problem, Severity, shown

IMPORTING = ("PYTHONPATH", "MYPYPATH")
"""Where mypy finds its plugins and the application's imports."""
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
) -> Checked:
    """Ask mypy in the backend's directory: the chosen `files`, else what its configuration names, else everything.
    `html` is where it writes its report, for which it needs lxml.

    Raises:
        OpsError: it is missing, hangs, fails, or its answer has no last line that says how much it checked.
    """
    backend = application.source
    mypy = python_program(application, "mypy")
    version = answer([mypy, "--version"], backend, seconds=seconds, inherit=IMPORTING).stdout.strip()
    if not version.startswith("mypy "):
        raise OpsError(f"mypy says that its version is “{excerpt(version)}”", f"look at {mypy}: this is not mypy")
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
    said, notes = _with_html(argv, files, backend, seconds, html)
    end = _MYPY_END.search(said.stdout)
    if not end and not _MYPY_STOPPED.search(said.stdout):
        raise OpsError(
            f"mypy did not say what it checked: {excerpt(said.stdout)}",
            "run mypy by hand: its answer cannot be used, which is no pass",
        )
    if not end:
        notes = (*notes, "mypy stopped at an error that prevents further checking: correct it first")
    problems = tuple(
        Problem(
            "mypy",
            shown(repository, backend / found["file"]),
            int(found["line"] or 0),
            found["code"] or "",
            found["message"],
            _severity(found["severity"]),
        )
        for line in said.stdout.splitlines()
        if (found := _MYPY.fullmatch(line))
    )
    if said.code and not problems:
        raise OpsError(
            f"mypy exited {said.code} and named no error: {excerpt(said.stdout)}",
            "run mypy by hand: its answer cannot be used, which is no pass",
        )
    return Checked("mypy", version, int(end[1]) if end else 0, problems, said.seconds, notes)


def _with_html(
    argv: Sequence[str | Path], files: Sequence[Path], backend: Path, seconds: float, html: Path
) -> tuple[Completed, tuple[str, ...]]:
    try:
        return _targeted([*argv, "--html-report", html], files, backend, seconds), ()
    except CommandFailed as error:
        if "lxml" not in error.stderr:
            raise
    note = "no HTML report: it needs lxml beside mypy (pip install lxml)"
    return _targeted(argv, files, backend, seconds), (note,)


def _targeted(argv: Sequence[str | Path], files: Sequence[Path], backend: Path, seconds: float) -> Completed:
    """What is configured, where that names anything. Exit code 2 is a syntax error too, told on stdout."""
    quiet = {"PYTHONDONTWRITEBYTECODE": "1"}

    def asked(*targets: str | Path) -> Completed:
        said = answer(
            [*argv, *targets], backend, seconds=seconds, accepted=(0, 1, 2), environment=quiet, inherit=IMPORTING
        )
        if said.code == 2 and not said.stdout.strip():
            raise CommandFailed([str(part) for part in argv], 2, said.stderr, "run mypy by hand")
        return said

    if files:
        return asked("--", *files)
    try:
        return asked()
    except CommandFailed as error:
        if "Missing target" not in error.stderr:
            raise
    return asked("src" if (backend / "src").is_dir() else ".")


@probe
def read_tsc(web: Path, repository: Path, files: Sequence[Path], *, strict: bool, seconds: float) -> Checked:
    """Ask the workspace's TypeScript compiler for each of its projects. A file argument would make it ignore
    tsconfig.json, so the whole is checked, and of `files`, where there are any, the errors are kept.

    Raises:
        OpsError: it is missing, hangs, fails, or checked no file.
    """
    tsc = web_program(web, "tsc")
    version = answer([tsc, "--version"], web, seconds=seconds).stdout.strip()
    if not re.fullmatch(r"Version \d+\.\d+\.\S+", version):
        raise OpsError(f"tsc says that its version is “{excerpt(version)}”", f"look at {tsc}: this is not TypeScript's")
    looked_at, problems, took = set[Path](), dict[Problem, None](), 0.0
    projects = _projects(web)
    for project in projects:
        said = _compile(tsc, web, project, strict, seconds)
        took += said.seconds
        looked_at |= _sources(said.stdout, web)
        problems |= dict.fromkeys(_tsc_problems(said, web, repository))
        others = (one.parent.resolve() for one in projects if one.parent != web)
        if project.parent == web and all(any(path.is_relative_to(one) for path in looked_at) for one in others):
            break  # the workspace's own project covers its packages
    if not looked_at:
        raise OpsError("tsc checked no file of the workspace", "look at include and files in its tsconfig.json")
    if missed := [shown(repository, path) for path in files if path.resolve() not in looked_at]:
        raise OpsError(f"tsc did not look at {', '.join(missed[:3])}", "add them to include in a tsconfig.json")
    chosen = {shown(repository, path) for path in files}
    # A project or a file that cannot be read keeps tsc from looking at the types of all others: that is told too.
    kept = tuple(
        one for one in problems if not chosen or one.file in chosen or not one.line or _TSC_STOPS.fullmatch(one.code)
    )
    return Checked("tsc", version, len(files) or len(looked_at), kept, took)


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
    """Composite projects write their state even when they emit nothing: it goes to a place that goes too."""
    with tempfile.TemporaryDirectory(prefix="ops-tsc-") as scratch:
        state = Path(scratch, "state.tsbuildinfo")
        options: list[str | Path] = ["--noEmit", "--pretty", "false", "--listFiles", "--incremental"]
        options += ["--tsBuildInfoFile", state, *(["--strict"] if strict else [])]
        return answer([tsc, *options, "--project", project], web, seconds=seconds, accepted=(0, 1, 2))


def _sources(printed: str, web: Path) -> set[Path]:
    """The workspace's own files among those that were read, without declarations of packages."""
    paths = (Path(line) for line in printed.splitlines() if line.startswith("/"))
    return {path for path in paths if path.is_relative_to(web.resolve()) and "node_modules" not in path.parts}


def _tsc_problems(said: Completed, web: Path, repository: Path) -> list[Problem]:
    """
    Raises:
        OpsError: it failed without naming anything.
    """
    found = list[Problem]()
    for line in said.stdout.splitlines():
        if at := _TSC.fullmatch(line):
            file = shown(repository.resolve(), (web / at["file"]).resolve())
            found.append(Problem("tsc", file, int(at["line"]), at["code"], at["message"], _severity(at["severity"])))
        elif whole := _TSC_WHOLE.fullmatch(line):
            found.append(Problem("tsc", "tsconfig.json", 0, whole["code"], whole["message"]))
    if said.code and not found:
        raise OpsError(
            f"tsc exited {said.code} and named no error: {excerpt(said.stdout)}",
            "run tsc by hand: its answer cannot be used, which is no pass",
        )
    return found


def _severity(word: str) -> Severity:
    return "warning" if word == "warning" else "error"
