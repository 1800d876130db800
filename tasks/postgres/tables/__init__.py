"""Single tables: found, compared, replaced in one transaction."""
