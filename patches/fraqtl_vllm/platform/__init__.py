"""vLLM on machines without a GPU: with its own operators, or with ours in their place."""
