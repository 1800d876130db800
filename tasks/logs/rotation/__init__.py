"""Rotation of logs, and deletion of old ones."""
