"""The interview application that the lab breaks and restores: backend, frontend, AI providers, schema history.

It is installed by copying (:mod:`lab.application.install`) and runs from there; nothing in it knows the lab.
"""
