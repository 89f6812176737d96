"""vLLM's CPU worker, with layers of `cpu_layers.py` and experts of `experts.py`, and which survives a seed.

A request with a `seed` has a generator of its own. Where a step ends before its prompt does, vLLM draws a
token for it all the same, throws it away and turns the generator back, which the CPU's generators can't:
the exception ends the engine. Here they are put aside for such a step, so nothing needs turning back.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform

from fraqtl_vllm import _vllm, hooks
from fraqtl_vllm._vllm import CPUWorker
from fraqtl_vllm.calibration.forward import target_layers
from fraqtl_vllm.config import settings_of
from fraqtl_vllm.names import GPT_OSS_WEIGHTS
from fraqtl_vllm.platform import gated_delta
from fraqtl_vllm.platform.cpu_layers import replace_layers
from fraqtl_vllm.platform.cpu_platform import CpuWithoutNativeOps


@contextmanager
def generators_put_aside(runner: Any) -> Iterator[None]:
    """Without the generators of the requests in a runner's batch whose prompts go on after this step."""
    generators = runner.input_batch.generators  # the sampler reads this very dictionary, by row of the batch
    unfinished = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0]
    aside = {row: generators.pop(row) for row in unfinished.tolist() if row in generators}
    try:
        yield
    finally:
        generators.update(aside)


def kept_tokens(drafts: list[int], sampled: Tensor) -> Tensor:
    """(requests,) how many new tokens of each stay: the first, and the drafts that were accepted.

    drafts: of each request; one without keeps all it has, which may be a chunk of its prompt. sampled: (requests,
    longest draft + 1) token ids, negative where there is none.
    """
    counts = (sampled >= 0).sum(1)
    return counts.where(torch.tensor(drafts) > 0, torch.iinfo(counts.dtype).max)


def _has_no_native_ops() -> bool:
    return issubclass(type(current_platform), CpuWithoutNativeOps)


def _on_every_processor() -> bool:
    return True


class FraqtlCpuWorker(CPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        gc.freeze()  # what is imported stays, and vLLM goes through all of it several times from here on
        if _has_no_native_ops() and self.vllm_config.model_config.quantization == GPT_OSS_WEIGHTS:
            hooks.MXFP4_EXPERTS.put(_vllm.CPUExpertsMxfp4, staticmethod(_on_every_processor))
        if _has_no_native_ops() and self.vllm_config.model_config.is_hybrid:
            gated_delta.install()
        loaded = super().load_model(*args, **kwargs)
        self._replace_layers()
        return loaded

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        super().reload_weights(*args, **kwargs)
        self._replace_layers()

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._replace_layers()

    def _replace_layers(self) -> None:
        """After every change of weights, of which layers of ours may have copies."""
        if not _has_no_native_ops():  # a CPU build has fast layers of its own
            return
        runner: Any = self.model_runner
        drafting = getattr(getattr(runner, "drafter", None), "model", None)
        for model in (runner.get_model(), drafting):
            if isinstance(model, torch.nn.Module):  # n-grams have none
                replace_layers(model, copies=settings_of(self.vllm_config).cpu_weight_copies)

    def determine_available_memory(self) -> int:
        self._make_room_for_other_stages()
        return super().determine_available_memory()

    def _make_room_for_other_stages(self) -> None:
        """For what earlier pipeline stages send. vLLM makes it when it profiles, which it leaves out here."""
        runner: Any = self.model_runner
        if not _vllm.get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            room = runner.get_model().make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=self.model_config.dtype, device=runner.device
            )
            hooks.STAGES.put(runner, room)

    def init_device(self) -> None:
        super().init_device()
        runner: Any = self.model_runner

        def careful(sample_tokens: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def careful_sample_tokens(grammar_output: Any) -> Any:
                with generators_put_aside(runner):
                    return sample_tokens(grammar_output)

            return careful_sample_tokens

        hooks.SAMPLING.wrap(runner, careful)
        if self.vllm_config.speculative_config is not None:
            runner.rejection_sampler.register_forward_hook(self._take_back)

    def _take_back(self, sampler: Any, given: tuple[Any, ...], sampled: Any) -> None:
        """Called when the sampler has said which drafts are rejected: see `attention/turns.py`."""
        kept = kept_tokens(given[0].num_draft_tokens, sampled.sampled_token_ids)
        for layer in target_layers(self.vllm_config).values():
            layer.impl.take_back(kept)
