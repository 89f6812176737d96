"""`fraqtl-serve chat` against a server that does what the test says."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest

from fraqtl_serve.cli.chat import printable, saving, size
from fraqtl_serve.cli.main import main
from tests.serve.fake_chat_server import REPORT, serving
from tests.terminal import CTRL_C, CTRL_D, fraqtl_serve, terminal

SAVING = "KV memory: 25.5 KiB in k4v4 instead of 96.0 KiB, 73 % saved; 40 tokens in 3 blocks, 2 of them shared"


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Pipe lines into the chat; gives its exit status, what it printed and what it complained of."""
    monkeypatch.setenv("COLUMNS", "20")  # too narrow for any line: nothing may wrap
    monkeypatch.delenv("VLLM_API_KEY", raising=False)

    def run(lines: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        status = 0
        try:
            main(["chat", *arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


def test_a_question_a_line(ask: Any) -> None:
    with serving() as server:
        status, out, err = ask("Hi\n\n  And you? \n", "--url", server.url + "/v1/")
    assert (status, err) == (0, "")
    assert out == f"Hello there.\n  {SAVING}\n" * 2
    assert server.seen[1] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello there."},
        {"role": "user", "content": "And you?"},
    ]


def test_markup_and_control_characters_of_the_model(ask: Any) -> None:
    with serving(pieces=("[bold]x[/] \x1b[31mred\x07", "\ttab é")) as server:
        _, out, _ = ask("Hi", "--url", server.url)
    assert out.startswith("[bold]x[/] [31mred")
    assert "\x1b" not in out and "é" in out
    assert printable("a\nb\r\x00") == "a\nb"


def test_no_server(ask: Any) -> None:
    with serving() as server:
        url = server.url
    status, out, err = ask("Hi", "--url", url)
    assert (status, out) == (2, "")
    assert err == (
        f"fraqtl-serve: no server answers at {url}: start one with fraqtl-serve serve, or name another with --url\n"
    )


@pytest.mark.parametrize("url", ["localhost:8000", "", "http://a:b", "ftp://x"])
def test_no_url(ask: Any, url: str) -> None:
    status, _, err = ask("Hi", "--url", url)
    assert status == 2
    assert err.endswith("is no URL: give one like http://127.0.0.1:8000\n"), err


def test_api_key(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(key="sesame") as server:
        url = ("--url", server.url)
        assert "wants an API key: give it with --api-key or VLLM_API_KEY" in ask("Hi", *url)[2]
        assert "refuses this API key" in ask("Hi", *url, "--api-key", "wrong")[2]
        assert ask("Hi", *url, "--api-key", "sesame")[0] == 0
        monkeypatch.setenv("VLLM_API_KEY", "sesame")
        assert ask("Hi", *url)[0] == 0


def test_model(ask: Any) -> None:
    with serving() as server:
        assert ask("Hi", "--url", server.url, "--model", "second")[0] == 0
        status, _, err = ask("Hi", "--url", server.url, "--model", "third")
    assert status == 2 and "has no model third: choose one of first, second" in err


def test_not_a_fraqtl_server(ask: Any) -> None:
    with serving(is_fraqtl=False) as server:
        status, _, err = ask("Hi", "--url", server.url)
    assert (status, err) == (
        2,
        f"fraqtl-serve: the server at {server.url} is no fraqtl server: start one with fraqtl-serve serve\n",
    )


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("refuse", "the server answered 400: the prompt is too long"),
        ("error", "the server gave up: the engine died"),
    ],
)
def test_failed_answer(ask: Any, broken: str, said: str) -> None:
    with serving(broken=broken) as server:
        status, _, err = ask("Hi", "--url", server.url)
    assert (status, err) == (2, f"fraqtl-serve: {said}\n")


def test_answer_without_a_report(ask: Any) -> None:
    with serving(broken="cut") as server:
        assert ask("Hi", "--url", server.url)[1].endswith("the server sent no report of its KV memory\n")


def test_saving() -> None:
    assert saving(REPORT) == SAVING
    assert saving({**REPORT, "bytes": 0}) == "no KV memory was held"
    assert [size(n) for n in (0, 1023, 1024, 1536, 20 << 30, 5 << 50)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "20.0 GiB",
        "5120.0 TiB",
    ]


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_ctrl_d_ends() -> None:
    with serving(endless=True) as server, terminal(*fraqtl_serve("chat", "--url", server.url)) as user:
        user.wait_for("you> ")
        assert "first at http" in user.text and "KV cache k4v4" in user.text
        user.press("Tell me everything\n")
        user.wait_for(" more more")
        user.press(CTRL_C)
        user.wait_for(f"stopped; {SAVING}")
        assert server.hung_up.wait(10)
        user.wait_for("you> ", times=2)
        time.sleep(0.5)  # Python's input() sees a signal right behind its prompt only when the next key comes
        user.press(CTRL_C)
        user.wait_for("Ctrl-D ends", times=2)
        server.endless = False
        user.press("And now?\n")
        user.wait_for("Hello there.", times=1)
        user.wait_for(SAVING, times=2)
        user.wait_for("you> ", times=4)  # what is typed before is not read
        user.press(CTRL_D)
        assert user.wait_for_end() == 0
        assert "Traceback" not in user.text
    roles = [message["role"] for message in server.seen[-1]]
    assert roles == ["user", "assistant", "user"]  # what there was of the stopped answer stays in the talk


def test_failed_answer_in_a_terminal_does_not_end_the_chat() -> None:
    with serving(broken="refuse") as server, terminal(*fraqtl_serve("chat", "--url", server.url)) as user:
        user.wait_for("you> ")
        user.press("Hi\n")
        user.wait_for("the prompt is too long")
        server.broken = None
        user.wait_for("you> ", times=2)
        user.press("Hi again\n")
        user.wait_for(SAVING)
        user.wait_for("you> ", times=3)  # what is typed before is not read
        user.press(CTRL_D)
        assert user.wait_for_end() == 0
    assert server.seen[-1] == [{"role": "user", "content": "Hi again"}]
