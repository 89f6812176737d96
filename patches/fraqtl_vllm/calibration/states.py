"""What layers with a state need in a calibration run: attention runs without a cache there, they run with one.

Without it vLLM would skip them, and attention would be calibrated on activations that it never sees. The pool is there
already and holds nothing yet: each of the prompt's sequences gets a block of it for its states.
"""

from __future__ import annotations

from typing import Any

import torch

from fraqtl_vllm import _vllm


def metadata(runner: Any, layers: dict[str, Any], sequences: int, tokens: int) -> dict[str, Any] | None:
    """By layer: that of one step with the whole prompt, None for `layers`, which attend. None in models without states.

    runner: vLLM's model runner. tokens: of all `sequences` together.
    """
    groups = [g for several in runner.attn_groups for g in several if isinstance(g.kv_cache_spec, _vllm.MambaSpec)]
    if not groups:
        return None
    found: dict[str, Any] = dict.fromkeys(layers)
    blocks = runner.kv_cache_config.num_blocks
    for group in groups:
        width = group.kv_cache_spec.max_num_blocks_per_req(runner.vllm_config, runner.max_model_len)
        built = group.get_metadata_builder().build(0, _batch(runner.device, sequences, tokens, blocks, width))
        found.update(dict.fromkeys(group.layer_names, built))
    return found


def _batch(device: torch.device, sequences: int, tokens: int, blocks: int, width: int) -> _vllm.CommonAttentionMetadata:
    length = tokens // sequences
    starts = torch.arange(sequences + 1, dtype=torch.int32) * length
    lengths = torch.full((sequences,), length, dtype=torch.int32)
    rows = torch.arange(sequences, dtype=torch.int32) % (blocks - 1) + 1  # block 0 means none
    return _vllm.CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(device),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=sequences,
        num_actual_tokens=tokens,
        max_query_len=length,
        max_seq_len=length,
        block_table_tensor=rows.to(device)[:, None].repeat(1, width),
        slot_mapping=torch.arange(tokens, device=device),
        is_prefilling=torch.ones(sequences, dtype=torch.bool),
    )
