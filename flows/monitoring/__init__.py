"""付録B, 付録C: what is watched, and who is told."""
