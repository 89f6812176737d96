"""What vLLM's OffloadingConnector offloads to: memory, and folders of files behind it, kept by vLLM.

Ours are the copies (`memory`), and that everything is kept under the fingerprint of the pages. It stands where
vLLM names the dtype of a cache, from which it makes the folder's name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fraqtl_kernels.errors import ConfigError
from fraqtl_vllm import _vllm
from fraqtl_vllm._vllm import FileMapper, SharedOffloadRegion, TieringOffloadingSpec
from fraqtl_vllm.stores.fingerprint import KEY
from fraqtl_vllm.stores.memory import MemoryWorker

logger = _vllm.init_logger("vllm.fraqtl.stores")


class PackedOffloadingSpec(TieringOffloadingSpec):
    """vLLM's own spec for memory and tiers behind it, for packed blocks on a CPU."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.config: Any = config
        self._worker: MemoryWorker | None = None
        if self.num_chunks < 1:
            raise ConfigError(
                f"the memory beside the pool holds no block: give at least {self.kv_bytes_per_chunk} bytes as "
                '"cpu_bytes_to_use", or more GiB as --kv-offloading-size'
            )

    def get_manager(self) -> Any:
        """The scheduler's side, which is made when all workers are calibrated."""
        if not self._manager:
            self.config = replace(
                self.config, model=replace(self.config.model, dtype=f"fraqtl {self.extra_config[KEY]}")
            )
            for folder in self._folders():
                self._check(folder)
        return super().get_manager()

    def get_worker(self, kv_caches: Any) -> MemoryWorker:
        """The side of one rank."""
        if not self._worker:
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = MemoryWorker(kv_caches, self.blocks_per_chunk, region)
        return self._worker

    def _folders(self) -> Iterator[str]:
        for tier in self.secondary_tier_configs:
            if not tier.get("root_dir"):
                raise ConfigError('a secondary tier of type "fs" needs a folder: give it as "root_dir"')
            yield tier["root_dir"]

    def _check(self, folder: str) -> None:
        """Say what is in a folder and won't be read. Raises ConfigError where a store says it is not what it should."""
        mapper = FileMapper.from_offloading_spec(
            folder, self, blocks_per_file=self.blocks_per_chunk, parallel_agnostic=True
        )
        ours, others = Path(mapper.get_config_file_path()), []
        for path in sorted(Path(folder).glob("*/config.json")):
            fields = _read(path)
            if path == ours and fields != mapper.get_run_config():
                raise ConfigError(
                    f"the store in {path.parent} was written for something else than its name says: delete this "
                    'folder, or choose another "root_dir"'
                )
            if path != ours and fields.get("model_name") == self.config.model.name:
                others.append(path.parent.name)
        if others:
            logger.warning(
                "%s has blocks of this model in another format, with other constants or from other weights (%s): they "
                "are not read, and prompts are computed anew",
                folder,
                ", ".join(others),
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
