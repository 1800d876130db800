"""§6 of the manual: logs."""
