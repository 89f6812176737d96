"""The counts of a report through LangChain.

python examples/langchain_chat.py
"""

from __future__ import annotations

import sys

from server import KEY, QUESTION, URL, connect

try:
    from langchain_openai import ChatOpenAI
except ImportError:
    sys.exit("this example needs LangChain: pip install langchain-openai")


def main() -> None:
    _, model = connect()
    chat = ChatOpenAI(model=model, base_url=f"{URL}/v1", api_key=KEY, temperature=0, include_response_headers=True)
    answer = chat.invoke(QUESTION)
    print(answer.content)
    print(answer.response_metadata["token_usage"]["kv_cache"])
    print({k: v for k, v in answer.response_metadata["headers"].items() if k.startswith("x-fraqtl")})
    # Streams of LangChain drop the report. The server keeps it: GET /plugins/fraqtl/requests/{id of the response}.


if __name__ == "__main__":
    main()
