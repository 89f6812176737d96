"""Everything of vLLM's, and of its web server's, that the HTTP server replaces, and why.

`fraqtl_vllm.compat` says what a hook is, `fraqtl_vllm.hooks` has those of the engine and its workers. Several hooks may
replace one method: each wraps what it finds. tests/serve/test_hooks.py fails where vLLM has changed what one is for.
"""

from __future__ import annotations

from fraqtl_vllm.compat import Hook, Symptom

OUTPUT_PROCESSOR = "vllm.v1.engine.output_processor:OutputProcessor"
NO_ACCOUNT = Symptom("vllm.v1.metrics.stats:FinishedRequestStats", lacks=("block", "kv_bytes"))
ACCOUNTS_END = "vLLM's output of a request says what KV memory it held"
ENGINE_ERRORS = "https://github.com/vllm-project/vllm/issues/57725, https://github.com/vllm-project/vllm/issues/43920"
SHUTDOWN_RFC = "https://github.com/vllm-project/vllm/issues/24885"

# Accounts: which HTTP request a sequence belongs to, and what the engine says of it

GENERATE = Hook(
    target="AsyncLLM.generate",
    user="fraqtl_serve.engine.accounting",
    without="a report can't know how many sequences its HTTP request asked for",
    until=ACCOUNTS_END,
    symptoms=(NO_ACCOUNT,),
)
ADD_REQUEST = Hook(
    target="OutputProcessor.add_request",
    user="fraqtl_serve.engine.accounting",
    without="the engine's id of a sequence can't be told from one that a client chose",
    until=ACCOUNTS_END,
    symptoms=(Symptom(f"{OUTPUT_PROCESSOR}.add_request", has=("request_id = request.request_id",)),),
)
SEND = Hook(
    target="AsyncMPClient.add_request_async",
    user="fraqtl_serve.engine.accounting",
    without="a sequence that could not be sent to the engine is waited for, and an integer that is too long for the "
    "message is answered with 500",
    until="vLLM takes a request that it could not send out of its output processor again",
    symptoms=(
        Symptom(
            "vllm.v1.engine.core_client:AsyncMPClient.add_request_async",
            has=("await self._send_input(EngineCoreRequestType.ADD, request)",),
            lacks=("except", "abort_requests"),
        ),
    ),
)
OUTPUTS = Hook(
    target="OutputProcessor.process_outputs",
    user="fraqtl_serve.engine.accounting",
    without="the accounts that the engine sends would go on to clients, as `kv_transfer_params`",
    until=ACCOUNTS_END,
    symptoms=(Symptom(f"{OUTPUT_PROCESSOR}.process_outputs", has=("engine_core_output.kv_transfer_params",)),),
)
ABORTS = Hook(
    target="OutputProcessor.abort_requests",
    user="fraqtl_serve.engine.held",
    without="an answer that the server itself cuts off ends before the engine has said what it held",
    until=ACCOUNTS_END,
    symptoms=(Symptom(f"{OUTPUT_PROCESSOR}.abort_requests", has=("req_state.queue.put(request_output)",)),),
)
ERRORS_RELEASE = Hook(
    target="OutputProcessor.propagate_error",
    user="fraqtl_serve.engine.held",
    without="an answer that is held when the engine dies is held for ever",
    until=ACCOUNTS_END,
    symptoms=(Symptom(f"{OUTPUT_PROCESSOR}.propagate_error", has=("state.queue.put(e)",)),),
)
BEAM_SEARCH = Hook(
    target="BeamSearchOnlineMixin.beam_search",
    user="fraqtl_serve.engine.beams",
    without="every round of a beam search counts as sequences of its own",
    until="a beam is known by something that a client can't choose",
    symptoms=(
        Symptom(
            "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin.beam_search",
            has=('f"{request_id_batch}-beam-{i}"',),
        ),
    ),
)

# Errors and spans

GRAMMARS_START = Hook(
    target="OutputProcessor.add_request",
    user="fraqtl_serve.engine.grammars",
    without="see GRAMMARS_FAIL: nobody knows which requests have a grammar",
    until="GRAMMARS_FAIL goes",
    symptoms=(Symptom(f"{OUTPUT_PROCESSOR}.add_request", has=("queue: RequestOutputCollector | None",)),),
)
GRAMMARS_FAIL = Hook(
    target="OutputProcessor.process_outputs",
    user="fraqtl_serve.engine.grammars",
    without="a grammar that the engine can't compile is answered with 500, though it is the client's mistake",
    until="vLLM answers 400",
    symptoms=(
        Symptom(
            "vllm.entrypoints.generate.base.serving:GenerateBaseServing._raise_if_error",
            has=('raise GenerationError("Internal server error")',),
            lacks=("grammar",),
        ),
    ),
    upstream=ENGINE_ERRORS,
)
SPANS = Hook(
    target="OutputProcessor.do_tracing",
    user="fraqtl_serve.engine.tracing",
    without="spans say nothing of KV memory",
    until="plugins can add attributes to the span of a request",
    symptoms=(Symptom(f"{OUTPUT_PROCESSOR}.do_tracing", has=('span_name="llm_request"',), lacks=("plugin",)),),
)

# Start and stop

START = Hook(
    target="utils.wait_for_engine_startup",
    user="fraqtl_serve.cli.start_stop",
    without="SIGTERM while the engine starts is lost, and Ctrl-C waits until it is up",
    until="a KeyboardInterrupt ends the wait for the engine, and the engine",
    symptoms=(
        Symptom("vllm.utils.network_utils:zmq_socket_ctx", has=("except KeyboardInterrupt:",), lacks=("raise",)),
    ),
    upstream=SHUTDOWN_RFC,
)
STOP = Hook(
    target="AsyncLLM.shutdown",
    user="fraqtl_serve.http.shutdown",
    without="requests that come while the server stops are answered with 200 and no token",
    until="vLLM answers 503 while it stops",
    symptoms=(Symptom("vllm.v1.engine.async_llm:AsyncLLM.shutdown", lacks=("503", "SERVICE_UNAVAILABLE")),),
    upstream=SHUTDOWN_RFC,
)
STOP_OUTPUTS = Hook(
    target="OutputProcessor.process_outputs",
    user="fraqtl_serve.http.shutdown",
    without="see STOP: a request that the engine turns away is an answer without a token",
    until="STOP goes",
    symptoms=(Symptom(f"{OUTPUT_PROCESSOR}.process_outputs", lacks=("503", "SERVICE_UNAVAILABLE")),),
    upstream=SHUTDOWN_RFC,
)
STOP_ERRORS = Hook(
    target="OutputProcessor.propagate_error",
    user="fraqtl_serve.http.shutdown",
    without="what is cut off by a stop is answered with 500, as if the engine had broken down",
    until="STOP goes",
    symptoms=(Symptom(f"{OUTPUT_PROCESSOR}.propagate_error", lacks=("503", "SERVICE_UNAVAILABLE")),),
    upstream=SHUTDOWN_RFC,
)
STOP_SEND = Hook(
    target="AsyncMPClient.add_request_async",
    user="fraqtl_serve.http.shutdown",
    without="a request that comes when the engine has stopped is answered with 500",
    until="STOP goes",
    symptoms=(Symptom("vllm.v1.engine.exceptions:EngineDeadError", lacks=("503", "SERVICE_UNAVAILABLE")),),
    upstream=SHUTDOWN_RFC,
)
CONNECTIONS = Hook(
    target="Config.timeout_graceful_shutdown",  # uvicorn's
    user="fraqtl_serve.http.shutdown",
    without="a connection that nobody will ever answer keeps a stopped server alive",
    until="vLLM gives uvicorn a limit by itself",
    symptoms=(
        Symptom("vllm.entrypoints.launchers.launcher", has=("uvicorn.Config(",), lacks=("timeout_graceful_shutdown=",)),
    ),
    upstream=SHUTDOWN_RFC,
)
PROTOCOL = Hook(
    target="Config.http_protocol_class",  # uvicorn's
    user="fraqtl_serve.http.upgrades",
    without="the body of a request that offers `Upgrade: h2c`, as Java's client does, is lost",
    until="uvicorn goes on reading a request whose offer it declines",
    symptoms=(
        Symptom(
            "uvicorn.protocols.http.httptools_impl:HttpToolsProtocol.data_received",
            has=("except httptools.HttpParserUpgrade:", "self._unsupported_upgrade_warning()"),
        ),
    ),
)

HOOKS = tuple(value for value in list(globals().values()) if isinstance(value, Hook))
