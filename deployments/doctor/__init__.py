"""What is wrong with an installation: one line for each thing that was looked at."""
