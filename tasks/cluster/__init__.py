"""Physical copies of a PostgreSQL cluster: taken, built as a private instance, checked, swapped in."""
