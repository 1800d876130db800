"""In what order, and with what judgement: one folder per chapter of the manual, one file per topic."""
