"""`make bench`: this project against the manual's own commands, both sides in one run, in turns."""
