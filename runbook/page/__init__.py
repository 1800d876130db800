"""What a report looks like: Markdown, pictures, links to the next runbook's form."""
