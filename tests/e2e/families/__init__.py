"""Every family of models that the table of supported models names, tried with a small random model of its own.

    python -m tests.e2e.families --out bench/results/cpu/families.json

makes each model, serves it packed by vLLM's engine in a process of its own, and compares with transformers on the same
weights: log-probabilities and texts in every format, texts under chunked prefill, prefix hits and preemption, tokens
that fit into equal memory, and what the accounts say against a witness in the block manager. A family that is refused
has its sentence in the table. Exits with 1 if a row isn't what `models.FAMILIES` says.

`models.py` has the families, `serve.py` all that vLLM does with one (`engine.py`, `accounts.py`), `judge.py` what must
hold, by transformers (`reference.py`), `row.py` what is written down, `run.py` the processes.
"""
