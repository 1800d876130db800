"""The lab's servers and services."""
