"""Clearing what may go (§2.2): which keys are meant, and their end in small pages."""
