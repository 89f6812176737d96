"""The server people run: command line, HTTP plugin, reports."""
