"""The command `fraqtl-serve`, and what happens before a server is up."""
