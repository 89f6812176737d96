"""Formats, reference maths and kernels of the packed KV cache. Needs torch, and nothing of vLLM."""
