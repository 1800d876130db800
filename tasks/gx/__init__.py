"""Great Expectations in a separate process: importing it takes seconds of processor time."""
