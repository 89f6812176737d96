"""The vLLM plugin: packed KV blocks in vLLM's own pool, and vLLM's engine on machines without a GPU."""
