"""Replicas and Sentinels around a server: read, detached for a restore, attached again."""
