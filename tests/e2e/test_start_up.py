"""What a user sees when the server can't start, and that nothing stays behind when it is stopped."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e import forks
from tests.e2e.engine import DEMO_MODEL
from tests.e2e.reports import metric
from tests.e2e.server import Launch, Server, forked, group_members, popen, remove_log, running, start, stop

COMPLETIONS = "/v1/completions"
MLA = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "vocab_size": 2048,
    "first_k_dense_replace": 2,
    "n_routed_experts": 2,
    "max_position_embeddings": 512,
}


def last_words(*arguments: str, port: int | None = None, launch: Launch = forks.launch) -> str:
    """The last line of a server that must fail to start, with exit status 2.

    launch: `popen` where the engine's process has to find the reason; a forked one doesn't begin as it would.
    """
    server = start(*arguments, port=port, launch=launch)
    try:
        assert server.process.wait(120) == 2, server.log[-3000:]
        wait_for_an_empty_group(server)  # of several workers one may take a moment longer
    finally:
        stop(server)
    said = server.log.strip().splitlines()[-1]
    remove_log(server)
    return said


def model_folder(tmp_path: Path, **config: object) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, folder)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_unknown_format() -> None:
    said = last_words("--kv-format", "int3", launch=popen)
    assert "unknown KV format 'int3': choose one of bf16, fp16, k8v8, k8v4, k4v4" in said


def test_another_kv_cache_dtype() -> None:
    said = last_words("--kv-cache-dtype", "fp8")
    assert said.startswith("fraqtl-serve: the packed KV cache does not support --kv-cache-dtype fp8")
    assert "--kv-format" in said


def test_mla_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, **MLA)
    assert "does not support MLA models" in last_words(str(folder))


def test_missing_path() -> None:
    assert last_words("/no/such/model") == "fraqtl-serve: model path /no/such/model does not exist"


def test_corrupt_weights(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    said = last_words(str(folder), launch=popen)
    assert said.startswith(f"fraqtl-serve: {weights} is not a readable safetensors file")


def test_speculative_decoding() -> None:
    flags = ("--speculative-config", '{"method": "ngram_gpu", "num_speculative_tokens": 3}')
    assert "does not support speculative decoding by ngram_gpu yet: choose one of ngram, draft_model" in last_words(
        *flags
    )


def test_pool_that_holds_no_sequence_and_the_two_ways_out() -> None:
    """Each of them is tried: the server starts with it."""
    said = last_words("--kv-cache-memory-bytes", "1M", launch=popen)
    found = re.fullmatch(
        r"fraqtl-serve: the longest sequence \(--max-model-len\), 8192 tokens, takes (\d+) bytes of KV memory, but "
        r"--kv-cache-memory-bytes is 1048576: give --kv-cache-memory-bytes (\d+), or --max-model-len (\d+)",
        said,
    )
    assert found, said
    need, more, shorter = found.groups()
    assert need == more
    for ways in (["--kv-cache-memory-bytes", more], ["--kv-cache-memory-bytes", "1M", "--max-model-len", shorter]):
        with forked(*ways) as server:
            assert httpx.get(f"{server.url}/plugins/fraqtl/capacity").json()["concurrency"] >= 1


def test_pool_that_nobody_chose_fits_a_long_context(tmp_path: Path) -> None:
    """Two million tokens of the demo model take 1.1 GB, more than our default."""
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    folder = model_folder(tmp_path, **{**config, "max_position_embeddings": 2 << 20})
    with forked(str(folder)) as server:
        capacity = httpx.get(f"{server.url}/plugins/fraqtl/capacity").json()
    assert capacity["max_model_len"] == 2 << 20
    assert capacity["blocks"] == (2 << 20) // 16 + 1


def test_what_a_layer_refuses() -> None:
    """Found in the engine's process, where the layers are built."""
    said = last_words("--additional-config", json.dumps({"fraqtl": {"prefill_keys": "raw"}}), launch=popen)
    assert said == "fraqtl-serve: prefill_keys 'raw' needs a GPU: on the CPU choose 'packed' or leave it out"


def test_weights_that_nothing_here_multiplies(tmp_path: Path) -> None:
    """Known before a worker starts, and long before one would miss an operator."""
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    said = last_words(str(model_folder(tmp_path, **config)), "--load-format", "dummy", "--tensor-parallel-size", "2")
    assert said.startswith("fraqtl-serve: weights quantized by fp8 need operators"), said


def test_an_engine_that_is_killed() -> None:
    server = start()
    try:
        wait_for_log(server, "Starting to load model")
        psutil.Process(engine_of(server)).kill()
        assert server.process.wait(60) == 2
    finally:
        stop(server)
    said = server.log.strip().splitlines()[-1]
    assert said.startswith("fraqtl-serve: a process of the engine was killed while it started, mostly because"), said
    remove_log(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_during_the_start_is_obeyed_at_once(number: signal.Signals) -> None:
    """Before this, the one was lost and the other put off: the server came up and stayed."""
    server = start()
    try:
        wait_for_log(server, "Starting to load model")
        sent = time.monotonic()
        server.process.send_signal(number)
        assert server.process.wait(10) == 128 + number
        assert time.monotonic() - sent < 5  # 0.5 s on an idle machine
        wait_for_an_empty_group(server)
        assert f"fraqtl-serve: stopped by {number.name} while it started" in server.log
        assert "Traceback" not in server.log
    finally:
        stop(server)
        remove_log(server)


def wait_for_an_empty_group(server: Server) -> None:
    end = time.monotonic() + 10
    while group_members(server):
        assert time.monotonic() < end, group_members(server)
        time.sleep(0.1)


def wait_for_log(server: Server, text: str) -> None:
    end = time.monotonic() + 120
    while text not in server.log:
        assert server.process.poll() is None and time.monotonic() < end, server.log[-3000:]
        time.sleep(0.05)


def engine_of(server: Server) -> int:
    """The process id of its engine, which names itself."""
    [engine] = [
        p.pid for p in psutil.Process(server.process.pid).children(True) if "EngineCore" in " ".join(p.cmdline())
    ]
    return int(engine)


def test_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = last_words(port=taken.getsockname()[1])
    assert "is taken: choose another with --port" in said


def generate_slowly(server: Server) -> None:
    body = {"model": "fraqtl-demo", "prompt": "The farmer", "max_tokens": 4000, "ignore_eos": True}
    with suppress(httpx.HTTPError):  # cut off or answered with what there is: either is fine
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def test_a_stop_lets_running_requests_finish_and_refuses_others() -> None:
    """With a time to drain. One sequence at a time: the second request waits in the engine, and is let finish, too."""
    patience = 600  # seconds: beside other engines on the same cores this one may generate 4 tokens a second
    # The client is made before there is anything to miss: that takes a second where an engine keeps the cores busy.
    with (
        httpx.Client(timeout=patience) as client,
        running("--shutdown-timeout", str(patience), "--max-num-seqs", "1") as server,
    ):
        url, body = server.url + COMPLETIONS, {"model": "fraqtl-demo", "prompt": "The farmer", "ignore_eos": True}
        long = {**body, "max_tokens": 1000, "stream": True, "stream_options": {"include_usage": True}}
        with ThreadPoolExecutor() as threads, client.stream("POST", url, json=long) as first:
            lines = first.iter_lines()
            next(lines)  # it runs
            second = threads.submit(client.post, url, json={**body, "max_tokens": 100})
            wait_for(server, client, "waiting", 1)  # or it may come too late to be let finish
            server.process.send_signal(signal.SIGTERM)
            late = until_refused(url, {**body, "max_tokens": 1}, client)
            events = [line for line in lines if line.startswith("data: {")]
            answer = second.result()
        assert late.status_code == 503 and "shutting down" in late.json()["error"]["message"], late.text
        assert json.loads(events[-1][6:])["usage"]["completion_tokens"] == 1000
        assert answer.json()["usage"]["completion_tokens"] == 100
        assert server.process.wait(60) == 0


def test_a_stop_without_a_time_to_drain_fails_what_waits() -> None:
    """Without one: nobody gets an empty answer, or hears that the engine broke down."""
    with httpx.Client(timeout=120) as client, running("--max-num-seqs", "1") as server:
        url = server.url + COMPLETIONS
        body = {"model": "fraqtl-demo", "prompt": "The farmer", "max_tokens": 4000, "ignore_eos": True}
        with ThreadPoolExecutor() as threads:
            first = threads.submit(client.post, url, json=body)
            wait_for(server, client, "running", 1)
            waiting = threads.submit(client.post, url, json=body)
            streamed = threads.submit(client.post, url, json={**body, "stream": True})
            wait_for(server, client, "waiting", 2)
            server.process.send_signal(signal.SIGTERM)
        answer = first.result()  # the engine is killed soon: it depends on when if what it had said arrives
        if answer.status_code == 200:
            [choice] = answer.json()["choices"]
            assert choice["finish_reason"] == "abort" and choice["text"]
        else:
            assert answer.status_code == 503 and "shutting down" in answer.json()["error"]["message"]
        assert waiting.result().status_code == 503
        events = [json.loads(line[6:]) for line in streamed.result().text.splitlines() if line.startswith("data: {")]
        assert [event["error"]["code"] for event in events] == [503]


def wait_for(server: Server, client: httpx.Client, state: str, count: int) -> None:
    """Until so many requests are "running" or "waiting"."""
    end = time.monotonic() + 60
    while metric(server.url, f"vllm:num_requests_{state}", client) < count:
        assert time.monotonic() < end, f"{count} requests {state}: never"
        time.sleep(0.05)


def until_refused(url: str, body: dict[str, object], client: httpx.Client) -> httpx.Response:
    """The first answer that isn't 200; a question that was early enough to wait in the engine is taken back."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with suppress(httpx.ReadTimeout):
            answer = client.post(url, json=body, timeout=1)
            if answer.status_code != 200:
                return answer
    raise AssertionError("a server that was told to stop takes new requests")


def test_ctrl_c_during_generation_leaves_no_process() -> None:
    with running() as server:
        client = threading.Thread(target=generate_slowly, args=(server,))
        client.start()
        time.sleep(3)
        assert len(group_members(server)) >= 2
        server.process.send_signal(signal.SIGINT)
        try:
            server.process.wait(30)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running 30 s after Ctrl-C:\n{server.log[-3000:]}") from None
        client.join(30)
        deadline = time.monotonic() + 15
        while group_members(server) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert group_members(server) == []
