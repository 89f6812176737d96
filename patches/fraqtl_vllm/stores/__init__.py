"""Packed blocks outside the pool: in memory beside it, and in files that outlive the engine."""
