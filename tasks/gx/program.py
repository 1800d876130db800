"""`python -m tasks.gx.program`: validates suites of expectations, one request after the other.

Each line of standard input is a request, `{"host", "port", "user", "password", "database", "suites": {name: [{"type",
"kwargs"}]}, "evidence"}`; the answer is a line of standard output, `{"rows": [[name, expectation, holds, observed]],
"docs": path or null}` or `{"error": text}`. A request `{"render": evidence}` renders the Data Docs of that validation,
which its own request left out by `"later": true`. The program ends at the end of its input.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import threading
import types
from collections.abc import Iterable
from typing import Any

# Great Expectations imports these for cloud sources only; it treats them as not installed.
LEFT_OUT = ("boto3", "botocore", "google.auth", "google.cloud")
# It imports these for two expectations and one picture: nearly half of its import time.
LATER = ("scipy.stats", "altair")


class _Later(types.ModuleType):
    """A module that is imported when one of its attributes is used (LazyLoader does it at the next `import`)."""

    _lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        with self._lock:
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
            return getattr(importlib.import_module(self.__name__), name)


def import_little(left_out: Iterable[str] = LEFT_OUT) -> None:
    """Import Great Expectations without the parts that suites rarely need."""
    sys.modules.update(dict.fromkeys(left_out))  # type: ignore[arg-type]
    sys.modules.update({name: _Later(name) for name in LATER})
    importlib.import_module("tasks.gx.validation")


def main() -> None:
    """Answer requests until the input ends. All other output goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        gc.disable()  # it takes a fifth of the import time, and imported modules stay anyway
        import_little()
        from tasks.gx import validation

        gc.freeze()
        gc.enable()
        for line in sys.stdin:
            try:
                found = validation.answer(json.loads(line))
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {str(error).strip()[:200]}"}
            print(json.dumps(found, ensure_ascii=False), file=answers, flush=True)


if __name__ == "__main__":
    main()
