"""Triton kernels over packed pages. Needs torch and Triton, and nothing of vLLM."""
