"""A prototype for models with MLA (DeepSeek, Kimi, GLM): their latent through the server's codec.

    python -m fraqtl_bench.quality.latent --out bench/results/cpu/quality/latent.json

trains a small DeepSeek-V3 on the demo model's corpus, and measures how far its next token moves for every form in which
the latent can be kept. docs/concepts/mla.md says what follows for a server.
"""
