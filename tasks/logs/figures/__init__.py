"""Figures from log lines: errors, requests, tokens, log-ins."""
