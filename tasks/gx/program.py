"""`python -m tasks.gx.program`: validates suites of expectations, as often as it is asked.

Each line of standard input is a request, `{"host", "port", "user", "password", "database", "suites": {name: [{"type",
"kwargs"}]}, "evidence"}`; the answer is a line of standard output, `{"rows": [[name, expectation, holds, observed]],
"docs": path or null}` or `{"error": text}`. It ends with its input.
"""

from __future__ import annotations

import gc
import json
import os
import sys


def main() -> None:
    """Answer requests until the input ends. Whatever else prints goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        gc.disable()  # it costs a fifth of the import's time, and what is imported stays anyway
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
