"""Which server the examples talk to."""

from __future__ import annotations

import os
import sys

from openai import APIConnectionError, OpenAI

URL = os.environ.get("FRAQTL_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("VLLM_API_KEY", "none")
QUESTION = "The code for apple is 4821. The code for tiger is 1357.\nWhat is the code for tiger?"


def connect() -> tuple[OpenAI, str]:
    """A client, and the name of the model to ask. Ends with one sentence where no server answers."""
    client = OpenAI(base_url=f"{URL}/v1", api_key=KEY)
    try:
        return client, os.environ.get("FRAQTL_MODEL") or client.models.list().data[0].id
    except APIConnectionError:
        sys.exit(f"no server answers at {URL}: start one with make serve, or set FRAQTL_URL")
