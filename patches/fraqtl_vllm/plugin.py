"""Entry points. vLLM calls them in every process, so nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable

from fraqtl_vllm._vllm import check_version, register_cache_dtypes
from fraqtl_vllm.names import BACKEND_CLASS, BACKEND_NAME, IN_PLACE_OF, WITHOUT_NATIVE_OPS, cache_dtype_of


def register() -> None:
    """`vllm.general_plugins`: `--attention-backend FRAQTL`, workers that calibrate, and tell of their KV pool.

    Raises UnsupportedError for another vLLM.
    """
    check_version()
    _register_backend_name()
    from fraqtl_kernels.formats import FORMATS
    from fraqtl_vllm.accounting.pool import install as install_pool
    from fraqtl_vllm.hybrids import install as install_blocks
    from fraqtl_vllm.platform.cuda import install as install_choice
    from fraqtl_vllm.platform.stock_cpu import install as install_refusal
    from fraqtl_vllm.start.orphans import end_with_parent
    from fraqtl_vllm.start.reasons import install as install_reasons
    from fraqtl_vllm.stores.fingerprint import install as install_fingerprint
    from fraqtl_vllm.workers import install as install_calibration

    register_cache_dtypes(map(cache_dtype_of, FORMATS))
    install_reasons()
    install_calibration()
    install_pool()
    install_fingerprint()
    install_blocks()
    install_refusal()
    install_choice()
    end_with_parent()


def _register_backend_name() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_CLASS)


def platform() -> str | None:
    """`vllm.platform_plugins`: the CPU platform of ours that fits this vLLM, or None where it runs on something else.

    The engine's process unpickles its configuration, which names our backend, before general
    plugins are loaded, but after the platform is looked up: so the name is registered here too. Another vLLM passes
    over what is raised here; there `register` has the word.
    """
    from fraqtl_vllm.platform.distribution import install_name

    check_version()
    install_name()
    _register_backend_name()
    from fraqtl_vllm.start.reasons import install as install_reasons

    install_reasons()
    from vllm.platforms import builtin_platform_plugins

    platforms = [path for path in map(_found, builtin_platform_plugins.values()) if path is not None]
    if not platforms:
        return WITHOUT_NATIVE_OPS
    # Of two vLLM itself can't choose one, and says so.
    return IN_PLACE_OF.get(platforms[0]) if len(platforms) == 1 else None


def _found(find: Callable[[], str | None]) -> str | None:
    """What a finder of vLLM's finds; one that fails finds nothing, as for vLLM itself."""
    try:
        return find()
    except Exception:
        return None
