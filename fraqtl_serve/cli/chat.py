"""`fraqtl-serve chat`: talk to a running server, and see what each answer saved."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

from rich.console import Console

from fraqtl_kernels.errors import FraqtlError
from fraqtl_serve.cli.chat_client import Answer, ChatClient

PROMPT = "you> "


def add_command(commands: Any) -> None:
    parser = commands.add_parser("chat", help="talk to a running server and see what each answer saves")
    parser.description = f"{__doc__} Ctrl-C stops an answer, Ctrl-D ends; reads a question a line if piped."
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"), help="default: VLLM_API_KEY")
    parser.add_argument("--model", help="default: the first that the server has")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Exits with 130 if Ctrl-C comes where there is no answer to stop."""
    try:
        chat(args)
    except KeyboardInterrupt:
        sys.exit(130)


def chat(args: argparse.Namespace) -> None:
    console = Console(highlight=False)
    with ChatClient(args.url, args.api_key, args.model) as client:
        kv_format = client.connect()
        if sys.stdin.isatty():
            about = f"{client.model} at {client.url}, KV cache {kv_format}. Ctrl-C stops an answer, Ctrl-D ends."
            console.print(about, style="dim", markup=False, soft_wrap=True)
        messages: list[dict[str, str]] = []
        for question in questions(console):
            messages.append({"role": "user", "content": question})
            answer = ask(client, messages, console)
            if answer.text:
                messages.append({"role": "assistant", "content": answer.text})
            else:
                messages.pop()  # roles must take turns


def questions(console: Console) -> Iterator[str]:
    """Lines of the standard input that aren't empty; on a terminal with a prompt, until Ctrl-D."""
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  # gives input() a history and keys to edit with
    while True:
        try:
            line = input(PROMPT) if interactive else sys.stdin.readline()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\nCtrl-D ends", style="dim")
            continue
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()


def ask(client: ChatClient, messages: list[dict[str, str]], console: Console) -> Answer:
    """Print the answer as it comes, and under it what it saved. Ctrl-C stops it, not the chat."""
    answer = Answer()
    note = ""
    try:
        with closing(client.stream(messages, answer)) as pieces:  # closed, the server stops as well
            for piece in pieces:
                console.print(printable(piece), end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        note = "stopped; "
        answer.report = client.report_of_stopped(answer)
    except FraqtlError as error:
        if not sys.stdin.isatty():
            raise
        console.print(f"\n{error}", style="red", markup=False)
        return answer
    console.print()
    console.print(f"  {note}{saving(answer.report)}", style="dim", markup=False, soft_wrap=True)
    return answer


def printable(text: str) -> str:
    """Without control characters: a model's text must not steer the terminal."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


def saving(report: dict[str, Any] | None) -> str:
    """What the report says, in one line."""
    if report is None:
        return "the server sent no report of its KV memory"
    if not report["bytes"]:
        return "no KV memory was held"
    share = 100 * report["saved_bytes"] / report["baseline_bytes"]
    line = (
        f"KV memory: {size(report['bytes'])} in {report['kv_format']} instead of {size(report['baseline_bytes'])}, "
        f"{share:.0f} % saved; {report['tokens']:,} tokens in {report['blocks']:,} blocks"
    )
    return line + (f", {report['shared_blocks']:,} of them shared" if report["shared_blocks"] else "")


def size(count: int) -> str:
    """Bytes for people: 512 B, 1.5 KiB, 20.0 GiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
