"""The report at the end of a stream.

python examples/streaming.py
"""

from __future__ import annotations

from typing import Any

from server import QUESTION, connect


def main() -> None:
    client, model = connect()
    report: dict[str, Any] = {}
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=40, temperature=0, stream=True
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        report = (chunk.model_extra or {}).get("fraqtl", report)  # on the last chunk only
    print(f"\n\n{report['bytes']:,} bytes of KV memory, {report['saved_bytes']:,} saved")


if __name__ == "__main__":
    main()
