"""How metrics leave this project: the address on which a watcher serves them, and the watchers of other hosts."""

from __future__ import annotations

import re

from prefect.blocks.core import Block
from pydantic import Field, field_validator

_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:]+\]|[^\s:/]+):(?P<port>\d{1,5})")


class Monitoring(Block):
    """Prometheus metrics (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

    _block_type_name = "Ops monitoring"
    _block_type_slug = "ops-monitoring"

    metrics_address: str = Field(default="", description="where the watcher serves /metrics: 127.0.0.1:9187; empty: no")
    watcher: bool = Field(
        default=False, description="a supervised watcher takes the checks of every few minutes; Prefect's are hourly"
    )
    hosts: dict[str, str] = Field(
        default={}, description="host, as [postgres] or [redis] names it → the address of /metrics of its watcher"
    )

    @field_validator("metrics_address")
    @classmethod
    def _is_address(cls, text: str) -> str:
        if text and not ((found := _ADDRESS.fullmatch(text)) and 0 < int(found["port"]) < 65536):
            raise ValueError(f"{text} is no address; one is 127.0.0.1:9187")
        return text

    @field_validator("hosts")
    @classmethod
    def _are_urls(cls, hosts: dict[str, str]) -> dict[str, str]:
        for url in hosts.values():
            if not re.fullmatch(r"https?://[^\s/]+/\S*", url):
                raise ValueError(f"{url} is no address of a watcher; one is http://db1.example.com:9187/metrics")
        return hosts

    def listens(self) -> tuple[str, int] | None:
        """Host and port of `metrics_address`; None: metrics are not served."""
        found = _ADDRESS.fullmatch(self.metrics_address)
        return (found["host"].strip("[]"), int(found["port"])) if found else None
