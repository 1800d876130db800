"""Install the application by copying, as a release is deployed: ``backend/`` and ``frontend/`` below one folder."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).parent
BACKEND_PARTS = ("grc_backend", "ai_providers", "alembic", "alembic.ini")
FRONTEND_PARTS = ("grc_frontend",)
PACKAGES = (
    "alembic",
    "fastapi",
    "psycopg[binary]",
    "pydantic",
    "python-dotenv",
    "redis",
    "sqlalchemy",
    "starlette",
    "uvicorn",
)
REQUIRED = ("HOST", "PORT", "DATABASE_URL", "REDIS_URL", "AI_PROVIDERS_URL", "LOG_DIRECTORY", "FRONTEND_PORT")
# Manual §1.5.
POOL_DEFAULTS: Mapping[str, str] = {
    "DATABASE_POOL_SIZE": "20",
    "DATABASE_MAX_OVERFLOW": "10",
    "DATABASE_POOL_TIMEOUT": "30",
    "DATABASE_POOL_RECYCLE": "3600",
    "DATABASE_ECHO": "false",
    "AI_RATE_LIMIT": "100",
}
FRONTEND_KEYS = ("HOST", "FRONTEND_PORT", "BACKEND_URL")
_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+,?&=~\[\]-]*")
_README = "応募者がアップロードした書類の置き場所です。バックアップの対象です。\n"


def install(target: Path, settings: Mapping[str, str]) -> None:
    """Copy the code to ``target/backend`` and ``target/frontend`` and write their ``.env`` files (mode 0600).

    `settings` are the keys of both ``.env`` files; ``BACKEND_URL`` and the pool's keys have defaults. May be repeated:
    code is put beside the old one and renamed over it, and ``backend/uploads`` with the users' files is never touched
    once it exists. Raises `ValueError` when keys are missing and `OSError` when files cannot be written.
    """
    missing = [key for key in REQUIRED if not settings.get(key)]
    if missing:
        raise ValueError(f"settings without {', '.join(missing)}")
    values = {"BACKEND_URL": f"http://{settings['HOST']}:{settings['PORT']}", **POOL_DEFAULTS, **settings}
    backend, frontend = target / "backend", target / "frontend"
    for folder, parts in ((backend, BACKEND_PARTS), (frontend, FRONTEND_PARTS)):
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts:
            _replace(SOURCE / part, folder / part)
    (backend / "requirements.txt").write_text(requirements(), encoding="utf-8")
    of_frontend = {key: values[key] for key in FRONTEND_KEYS}
    of_backend = {key: value for key, value in values.items() if key not in {"FRONTEND_PORT", "BACKEND_URL"}}
    _write_environment(backend / ".env", of_backend)
    _write_environment(frontend / ".env", of_frontend)
    uploads = backend / "uploads"
    if not uploads.exists():
        uploads.mkdir()
        (uploads / "README.txt").write_text(_README, encoding="utf-8")


def requirements() -> str:
    """What the backend imports, pinned in the versions that are installed here."""
    return "".join(f"{name}=={version(name.partition('[')[0])}\n" for name in PACKAGES)


def _replace(source: Path, target: Path) -> None:
    """Put a copy of `source` in the place of `target`, without a moment in which half of it is there."""
    fresh, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    for leftover in (fresh, old):
        _remove(leftover)
    if source.is_dir():
        shutil.copytree(source, fresh, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, fresh)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def environment_text(values: Mapping[str, str]) -> str:
    """``KEY=value`` lines."""
    return "".join(f"{key}={_quoted(value)}\n" for key, value in values.items())


def _write_environment(path: Path, values: Mapping[str, str]) -> None:
    """Write them, readable by the owner only from the first byte on."""
    fresh = path.with_name(".env.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(environment_text(values))
    fresh.replace(path)


def _quoted(value: str) -> str:
    if _PLAIN.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
