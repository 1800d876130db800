"""The language that every flow speaks: run, report, permit, lock, steps, errors, shell."""
