"""Faults for drills: real ones. Every one refuses an environment that is not disposable, and takes a permit."""
