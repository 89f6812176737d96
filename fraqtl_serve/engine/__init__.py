"""Between the HTTP server and vLLM's engine: what is watched there, and what is made of it."""
