"""Great Expectations, in a process of its own: importing it takes seconds of processor time."""
