"""The CUDA half of the backend: refused until its kernels are hooked up."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder

from fraqtl_kernels.errors import UnsupportedError
from fraqtl_vllm.layer import FraqtlImpl

MetadataBuilder = AttentionMetadataBuilder


class Impl(FraqtlImpl[AttentionMetadata]):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError("this version attends packed blocks on the CPU only; its GPU kernels are to come")
