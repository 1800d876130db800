"""A load of users on the application, made by Locust as a program of its own, and what the system does under it."""
