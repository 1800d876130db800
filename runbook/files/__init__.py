"""What runs write to disk: durable files, undo records, the chain of reports."""
