"""logrotate's configuration of the lab (§6.2). Nothing runs it: the application opens a renamed log again by itself."""

from __future__ import annotations

from lab.state.layout import Layout


def rotation(layout: Layout) -> str:
    """The manual's block, without the reload that its application needs."""
    return f"""{layout.application_logs}/*.log {{
    daily
    rotate 30
    compress
    delaycompress
    notifempty
    missingok
    create
}}
"""
