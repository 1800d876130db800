"""A drill's clients, which write all the time; their ledgers; the writes that the system has lost."""
