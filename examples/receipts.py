"""The memory report of an answer, wherever it stands.

python examples/receipts.py
"""

from __future__ import annotations

from typing import Any

from server import QUESTION, connect


def main() -> None:
    client, model = connect()
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=40, temperature=0
    )
    answer: Any = raw.parse()
    print(answer.choices[0].message.content)

    report = answer.model_extra["fraqtl"]
    print(f"\nformat        {report['kv_format']}")
    print(f"tokens        {report['tokens']} in {report['blocks']} blocks of {report['block_size']}")
    print(f"from cache    {report['shared_blocks']} blocks")
    print(f"KV memory     {report['bytes']:,} bytes instead of {report['baseline_bytes']:,}")
    print(f"saving        {report['ratio']:.2f} times less")

    print("\nalso in usage   ", answer.usage.model_extra["kv_cache"])
    print("and in headers  ", {k: v for k, v in raw.headers.items() if k.startswith("x-fraqtl")})


if __name__ == "__main__":
    main()
