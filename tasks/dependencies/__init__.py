"""The application's packages, of Python and of node: what is installed, what is known of them, what is newer."""
