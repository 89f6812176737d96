"""Entry points. vLLM calls them in every process, so nothing heavy is imported here."""

from __future__ import annotations

BACKEND_NAME = "FRAQTL"
BACKEND_CLASS = "fraqtl_vllm.backend.FraqtlBackend"


def register() -> None:
    """`vllm.general_plugins`: `--attention-backend FRAQTL`, workers that calibrate, and tell of their KV pool."""
    _register_backend_name()
    from fraqtl_vllm.calibration.hook import install as install_calibration
    from fraqtl_vllm.pool import install as install_pool
    from fraqtl_vllm.reasons import install as install_reasons

    install_reasons()
    install_calibration()
    install_pool()


def _register_backend_name() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_CLASS)


def platform() -> str | None:
    """`vllm.platform_plugins`: the CPU platform, where vLLM itself finds none; otherwise inert.

    The engine's process unpickles its configuration, which names our backend, before general
    plugins are loaded, but after the platform is looked up: so the name is registered here too.
    """
    _register_backend_name()
    from fraqtl_vllm.reasons import install as install_reasons

    install_reasons()
    from vllm.platforms import builtin_platform_plugins

    if any(find() is not None for find in builtin_platform_plugins.values()):
        return None
    return "fraqtl_vllm.cpu_platform.CpuWithoutNativeOps"
