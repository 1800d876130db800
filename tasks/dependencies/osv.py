"""OSV's records of single vulnerabilities (google.github.io/osv.dev/api): pip-audit's answer has no severity."""

from __future__ import annotations

from collections.abc import Sequence

import httpx

from runbook.errors import OpsError, Unreachable
from tasks.dependencies.severity import Severity, of_vector, of_word

SECONDS = 20.0


class Osv:
    """One connection to it. After a failure to answer it is asked no more: the others would wait as long."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.lost = ""
        self._client = httpx.Client(timeout=SECONDS, follow_redirects=True)

    def __enter__(self) -> Osv:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def severity(self, ids: Sequence[str]) -> Severity:
        """The worst that any of these aliases' records says; unknown where none says any."""
        found = Severity.UNKNOWN
        for one in sorted(ids, key=lambda one: not one.startswith("GHSA-")):  # these have a word for it
            try:
                found = max(found, self._of(one))
            except Unreachable as error:
                self.lost = error.message
            except OpsError as error:
                self.lost = self.lost or error.message
            if found:
                break
        return found

    def _of(self, one: str) -> Severity:
        if self.lost:
            return Severity.UNKNOWN
        try:
            answer = self._client.get(f"{self.address}/v1/vulns/{one}")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unreachable(f"{self.address} does not answer: {type(error).__name__}") from None
        if answer.status_code == httpx.codes.NOT_FOUND:  # an alias that OSV keeps no record of
            return Severity.UNKNOWN
        try:
            record = answer.raise_for_status().json()
            word = of_word((record.get("database_specific") or {}).get("severity"))
            vectors = [str(item.get("score")) for item in record.get("severity") or []]
        except (httpx.HTTPError, ValueError, AttributeError, TypeError):
            raise OpsError(f"{self.address} answered {answer.status_code} with no record of {one}") from None
        return max([word, *map(of_vector, vectors)])
