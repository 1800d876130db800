"""Who is alerted, and who approves."""
