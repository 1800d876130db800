"""Physical copies of a whole PostgreSQL cluster: taken, built beside, asked, swapped in."""
