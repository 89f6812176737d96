"""Clients that need an environment of their own, against a running server: run.sh makes the environments."""
