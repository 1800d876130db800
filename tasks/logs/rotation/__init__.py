"""Rotation of logs and removal of old ones."""
