"""Tokens of AI calls by day, provider and model, from the lines of AI calls ([logs] ai_message, §5.2)."""

from __future__ import annotations

import calendar
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING

from tasks.logs.reading.conditions import Conditions
from tasks.logs.reading.source import LogSource

if TYPE_CHECKING:
    from pandas import DataFrame


def calls(message: str) -> Conditions:
    """Lines of AI calls, by `[logs] ai_message`; none if it is not configured."""
    return Conditions().holds(call(message), *([message] if message else []))


def call(message: str) -> str:
    """The condition of `calls` as SQL."""
    quoted = message.replace("'", "''")
    return f"message = '{quoted}'" if message else "false"


def _number(name: str) -> str:
    return f"try_cast(json_extract_string(line, '$.{name}') AS BIGINT)"


_PROMPT, _COMPLETION, _TOTAL = map(_number, ("prompt_tokens", "completion_tokens", "total_tokens"))
# Any two of the three numbers give the third; some providers write no total, some no parts.
COLUMNS = {
    "day": "CAST(here AS DATE)",
    "provider": "coalesce(json_extract_string(line, '$.provider'), '?')",
    "model": "coalesce(json_extract_string(line, '$.model'), '?')",
    "prompt": f"coalesce({_PROMPT}, {_TOTAL} - {_COMPLETION})",
    "completion": f"coalesce({_COMPLETION}, {_TOTAL} - {_PROMPT})",
    "total": f"coalesce({_TOTAL}, {_PROMPT} + {_COMPLETION}, {_PROMPT}, {_COMPLETION})",
}
# A day is unusual if it is so many deviations, and at least half, above the median of the days before.
WINDOW_DAYS, LEAST_DAYS, DEVIATIONS, HALF_AGAIN = 28, 7, 5.0, 1.5
FORECAST_DAYS = 7


SUMS = ("calls", "prompt", "completion", "total")


@dataclass(frozen=True)
class TokenUse:
    """AI calls of one day, provider and model. `tokenless`: calls without token counts; `unsplit`: calls with a total
    only, whose cost is unknown."""

    day: date
    provider: str
    model: str
    calls: int
    tokenless: int
    unsplit: int
    prompt: int
    completion: int
    total: int

    def cost(self, prices: Mapping[str, Sequence[float]]) -> float | None:
        """The cost by prices per million tokens; None: the model has no price."""
        if self.model not in prices:
            return None
        prompt, completion = prices[self.model]
        return (self.prompt * prompt + self.completion * completion) / 1_000_000


def read_use(source: LogSource) -> list[TokenUse]:
    """AI calls of the table `picked` (COLUMNS), by day."""
    rows = source.rows(
        """
        SELECT day, provider, model, count(*), count(*) FILTER (total IS NULL),
               count(*) FILTER (total IS NOT NULL AND prompt IS NULL AND completion IS NULL), sum(coalesce(prompt, 0)),
               sum(coalesce(completion, 0)), sum(coalesce(total, 0))
        FROM picked WHERE day IS NOT NULL GROUP BY day, provider, model ORDER BY day, provider, model
        """
    )
    return [TokenUse(day, provider, model, *map(int, numbers)) for day, provider, model, *numbers in rows]


def frame_of(uses: Sequence[TokenUse], prices: Mapping[str, Sequence[float]]) -> DataFrame:
    """A row for each use: its fields, and its `cost`, NaN where the model has no price."""
    import pandas as pd

    rows = [(*vars(use).values(), use.cost(prices)) for use in uses]
    return pd.DataFrame(rows, columns=[*TokenUse.__dataclass_fields__, "cost"]).astype({"cost": float})


def by_day(uses: Sequence[TokenUse], first: date, last: date) -> dict[date, int]:
    """Tokens of every day of a span, those without any too."""
    found = defaultdict[date, int](int)
    for use in uses:
        found[use.day] += use.total
    return {day: found[day] for day in (first + timedelta(days=n) for n in range((last - first).days + 1))}


def unusual_days(days: Mapping[date, int], since: date) -> dict[date, float]:
    """Of consecutive days, those from `since` on with far more tokens than the median of the days before them: day →
    that median."""
    import pandas as pd

    tokens = pd.Series(days, dtype=float)
    before = tokens.shift(1).rolling(WINDOW_DAYS, min_periods=LEAST_DAYS)
    median = before.median()
    deviation = 1.4826 * before.apply(lambda window: (window - window.median()).abs().median())
    is_far = (tokens > median + DEVIATIONS * deviation) & (tokens > HALF_AGAIN * median) & (median > 0)
    return {day: float(usual) for day, usual in median[is_far].items() if day >= since}


def forecast(costs: Mapping[date, float], today: date) -> float:
    """The cost of the whole month of `today`: the cost so far, and for each remaining day the mean of the last full
    days."""
    import pandas as pd

    found = pd.Series(costs, dtype=float)
    month = found[[(day.year, day.month) == (today.year, today.month) for day in found.index]]
    last = [today - timedelta(days=n) for n in range(1, FORECAST_DAYS + 1)]
    full = found.reindex([day for day in last if day >= min(found.index, default=today)], fill_value=0.0)
    usual = full.mean() if len(full) else month.get(today, 0.0)
    left = calendar.monthrange(today.year, today.month)[1] - today.day
    return float(month.drop(today, errors="ignore").sum() + max(month.get(today, 0.0), usual) + left * usual)
