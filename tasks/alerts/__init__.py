"""Notifying people: incidents on disk, messages, and channels."""
