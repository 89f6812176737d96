"""Attention without a cache, which takes the statistics of its layer on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

from torch import Tensor

from fraqtl_kernels.calibration.importance import Importance, attend
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.constants import LayerConstants
from fraqtl_kernels.formats import KVFormat


class Recorder:
    """One calibration run. `constants` has an entry for every layer that has keys of its own, by name."""

    def __init__(
        self,
        formats: Mapping[str, KVFormat],
        sequences: int,
        projections: Mapping[str, Tensor] = MappingProxyType({}),
        shared: Collection[str | None] = (),
    ) -> None:
        """formats: of the layers, by name. projections: (query heads, D, D) by layer, see `projection.py`; not all need
        be there. shared: layers whose keys others use: only theirs are kept, since the pool has left little memory."""
        self.formats = formats
        self.sequences = sequences
        self.projections = projections
        self.shared = shared
        self.constants: dict[str, LayerConstants] = {}
        self.on_layer: Callable[[int], None] = lambda layers: None  # hears how many layers have been recorded
        self._keys: dict[str, tuple[Tensor, Tensor]] = {}

    def attend(
        self,
        layer: str,
        shared_layer: str | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        soft_cap: float | None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Causal attention within every sequence, and the layer's constants.

        query: (tokens, query heads, D), key, value: (tokens, KV heads, D), sequences of equal length one after
        another. shared_layer: the layer whose keys this one uses, if any. Returns float32 like query.
        """
        if shared_layer is not None:
            key, value = self._keys[shared_layer]
        out, importance = attend(
            query,
            key,
            value,
            sequences=self.sequences,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sink_logits=sink_logits,
            projection=self.projections.get(layer),
        )
        if shared_layer is None:
            self.keep(layer, key, query, value, importance)
            if layer in self.shared:
                self._keys[layer] = key, value
        return out

    def keep(self, layer: str, key: Tensor, query: Tensor, value: Tensor, importance: Importance) -> None:
        """What follows from one layer's tensors. Arguments as of `calibrate`."""
        self.constants[layer] = calibrate(self.formats[layer], key, query, value, importance)
        self.on_layer(len(self.constants))
