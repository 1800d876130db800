"""What a new lab is filled with."""
