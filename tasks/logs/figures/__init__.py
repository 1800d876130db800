"""What the lines of logs say: errors, requests, tokens, log-ins."""
