"""The application's installed packages: node_modules of the web workspace, the backend's virtual environment."""
