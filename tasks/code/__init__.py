"""The application's source code, as its own tools judge it."""
