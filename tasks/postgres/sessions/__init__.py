"""Sessions: who is connected, who blocks whom, what they run."""
