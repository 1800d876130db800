"""Frontend of the AI interview system: one page, and whether the backend can be reached."""
