"""Reports of the past as DataFrames, the oldest row first: their tables, and how long their runs took.

pandas is imported by the first call. Its import takes half a second or more, which only reviews should pay.
https://pandas.pydata.org/docs/reference/frame.html
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tasks.reports.past import FiledReport

if TYPE_CHECKING:
    from pandas import DataFrame

OF_REPORT = ("began", "status", "report")
_NAME = re.compile(r".*?-\d{6}-")


def tables(
    reports: Iterable[FiledReport], name: str, facts: Sequence[str] = (), columns: Sequence[str] = ()
) -> DataFrame:
    """The rows of the table `name` in each report, as text. `began` (aware), `status`, `report` (its file's name) and
    the named `facts` are the report's. `columns`: names to use instead of the table's headings."""
    import pandas as pd

    found = [
        pd.DataFrame(
            [row for row in item["rows"] if len(row) == len(columns or item["columns"])],
            columns=list(columns or item["columns"]),
        ).assign(
            began=one.started,
            status=one.status,
            report=one.path.name,
            **{fact: one.facts.get(fact, "") for fact in facts},
        )
        for one in reports
        for item in one.content["evidence"]
        if item["name"] == name and item["rows"]
    ]
    if not found:
        return pd.DataFrame(columns=[*OF_REPORT, *facts])
    return pd.concat(found, ignore_index=True).sort_values("began", kind="stable", ignore_index=True)


def durations(reports: Iterable[FiledReport]) -> DataFrame:
    """A row for each run: `runbook` (as in its file's name), `began`, `status`, `seconds`, and the `bytes` that it
    measured."""
    import pandas as pd

    rows = [
        (
            _NAME.sub("", one.path.stem),
            one.started,
            one.status,
            float(one.content["seconds"]),
            sum(int(measure.get("bytes") or 0) for measure in one.content.get("measures") or []),
        )
        for one in reports
    ]
    return pd.DataFrame(rows, columns=["runbook", "began", "status", "seconds", "bytes"]).sort_values(
        "began", kind="stable", ignore_index=True
    )


def slope_per_day(began: Iterable[object], values: Iterable[float]) -> float:
    """By how much values grow a day, by least squares; 0 where less than a day lies between the first and the last."""
    import numpy as np
    import pandas as pd

    days = pd.Series(list(began)).astype("datetime64[ns, UTC]").astype("int64") / 86_400e9
    if len(days) < 2 or days.max() - days.min() < 1:
        return 0.0
    return float(np.polyfit(days - days.max(), list(values), 1)[0])
