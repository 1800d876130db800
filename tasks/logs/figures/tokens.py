"""Tokens that AI calls took, by day, provider and model: from the lines of AI calls ([logs] ai_message, §5.2)."""

from __future__ import annotations

import calendar
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from tasks.logs.reading.conditions import Conditions
from tasks.logs.reading.source import Source


def calls(message: str) -> Conditions:
    """Lines of AI calls, by `[logs] ai_message`; none where it is not configured."""
    return Conditions().holds(call(message), *([message] if message else []))


def call(message: str) -> str:
    """The same as SQL."""
    quoted = message.replace("'", "''")
    return f"message = '{quoted}'" if message else "false"


def _number(name: str) -> str:
    return f"try_cast(json_extract_string(line, '$.{name}') AS BIGINT)"


_PROMPT, _COMPLETION, _TOTAL = map(_number, ("prompt_tokens", "completion_tokens", "total_tokens"))
# Of the three numbers any two tell the third; some providers write no total, some no parts.
COLUMNS = {
    "day": "CAST(here AS DATE)",
    "provider": "coalesce(json_extract_string(line, '$.provider'), '?')",
    "model": "coalesce(json_extract_string(line, '$.model'), '?')",
    "prompt": f"coalesce({_PROMPT}, {_TOTAL} - {_COMPLETION})",
    "completion": f"coalesce({_COMPLETION}, {_TOTAL} - {_PROMPT})",
    "total": f"coalesce({_TOTAL}, {_PROMPT} + {_COMPLETION}, {_PROMPT}, {_COMPLETION})",
}
# A day is unlike others when it is so many deviations over the median of those before, and half as much again.
WINDOW_DAYS, LEAST_DAYS, DEVIATIONS, HALF_AGAIN = 28, 7, 5.0, 1.5
FORECAST_DAYS = 7


@dataclass(frozen=True)
class Use:
    """Of one day, provider and model. `tokenless`: calls whose line tells no tokens; `unsplit`: calls that tell a total
    only, so that their cost is not known."""

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
        """By a table of prices per million tokens; None where the model is not in it."""
        if self.model not in prices:
            return None
        prompt, completion = prices[self.model]
        return (self.prompt * prompt + self.completion * completion) / 1_000_000


def read_use(source: Source) -> list[Use]:
    """Of what was picked with COLUMNS, by day."""
    rows = source.rows(
        """
        SELECT day, provider, model, count(*), count(*) FILTER (total IS NULL),
               count(*) FILTER (total IS NOT NULL AND prompt IS NULL AND completion IS NULL), sum(coalesce(prompt, 0)),
               sum(coalesce(completion, 0)), sum(coalesce(total, 0))
        FROM picked WHERE day IS NOT NULL GROUP BY day, provider, model ORDER BY day, provider, model
        """
    )
    return [Use(day, provider, model, *map(int, numbers)) for day, provider, model, *numbers in rows]


def by_day(uses: Sequence[Use], first: date, last: date) -> dict[date, int]:
    """Tokens of every day of a span, those without any too."""
    found = defaultdict[date, int](int)
    for use in uses:
        found[use.day] += use.total
    return {day: found[day] for day in (first + timedelta(days=n) for n in range((last - first).days + 1))}


def unusual_days(days: Mapping[date, int], since: date) -> dict[date, float]:
    """Days from `since` on with far more tokens than the median of the days before them: day → that median."""
    found = dict[date, float]()
    for day, tokens in days.items():
        before = [days[other] for other in days if day - timedelta(days=WINDOW_DAYS) <= other < day]
        if day < since or len(before) < LEAST_DAYS:
            continue
        median = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(other - median) for other in before)
        if median and tokens > max(median + DEVIATIONS * deviation, HALF_AGAIN * median):
            found[day] = median
    return found


def forecast(costs: Mapping[date, float], today: date) -> float:
    """Cost of the whole month of `today`: what was, and for each day that is left the mean of the last full days."""
    month = {day: cost for day, cost in costs.items() if (day.year, day.month) == (today.year, today.month)}
    full = [
        costs.get(today - timedelta(days=n), 0.0)
        for n in range(1, FORECAST_DAYS + 1)
        if today - timedelta(days=n) >= min(costs, default=today)
    ]
    usual = statistics.mean(full) if full else month.get(today, 0.0)
    left = calendar.monthrange(today.year, today.month)[1] - today.day
    return sum(cost for day, cost in month.items() if day != today) + max(month.get(today, 0.0), usual) + left * usual
