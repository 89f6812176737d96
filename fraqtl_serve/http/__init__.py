"""The web application: middleware around vLLM's, routes beside its own."""
