"""Audit events (manual §6.4): a line in ``audit.log``, and a row of ``audit_events`` beside what it tells of."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from fastapi import Request

_logger = logging.getLogger("audit")


@dataclass(frozen=True)
class AuditEvent:
    """Who did what to which resource, from where, and whether it was allowed."""

    user_id: str
    action: str
    resource: str
    result: Literal["success", "failure"]
    ip_address: str
    user_agent: str
    occurred_at: datetime = field(default_factory=lambda: datetime.now(UTC))


def describe(
    request: Request, user_id: str, action: str, resource: str, result: Literal["success", "failure"]
) -> AuditEvent:
    """Return the event with the client's address and user agent of `request`."""
    address = request.client.host if request.client else ""
    # PostgreSQL stores no NUL, and a header may hold one.
    agent = request.headers.get("user-agent", "").replace("\0", "")[:500]
    return AuditEvent(user_id, action, resource, result, address, agent)


def write(event: AuditEvent) -> None:
    """Log `event`; called after its transaction is committed and before the client is answered."""
    _logger.info(
        "Audit Event",
        extra={
            "user_id": event.user_id,
            "action": event.action,
            "resource": event.resource,
            "result": event.result,
            "ip_address": event.ip_address,
            "user_agent": event.user_agent,
            "timestamp": event.occurred_at.isoformat(timespec="microseconds"),
        },
    )
