"""The application's source code, checked by its own tools."""
