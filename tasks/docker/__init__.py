"""What a Docker Engine holds, and what is done to it."""
