"""The attention backend: what vLLM asks of it, and one layer's work on each device."""
