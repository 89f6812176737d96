"""Calibration at start-up: one short built-in prompt through the model fixes the constants of every layer.

vLLM's workers call `calibrate_worker` when the model is loaded and before the first graph is captured, so no
page is ever written without its constants. They are kept on disk (`files.py`), so a model is run once.

Every tensor-parallel rank calibrates the KV heads that it holds. Ranks run the model together, so they decide
together: if one has no file, all calibrate.
"""
