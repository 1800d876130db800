"""The phases of a full restore."""
