"""The server's formats as codecs: every step is a call of `fraqtl_kernels`, so this measures what it serves.

The constants are made by the server's own calibration, from the lab's calibration text, or read from the file in
which a server keeps those that it made from its built-in prompt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fraqtl_bench.quality.codecs import Codec, LayerSample
from fraqtl_bench.quality.grids import Kept
from fraqtl_kernels import reference
from fraqtl_kernels.calibration.solve import calibrate
from fraqtl_kernels.constants import TENSOR_NAMES, LayerConstants
from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import KVFormat, VectorFormat
from fraqtl_kernels.pages import Planes

_OF_STREAM = {
    "key": ("key_center", "key_basis", "key_inverse", "key_feedback", "outlier_center", "key_scale"),
    "value": ("value_center", "value_basis", "value_inverse", "value_feedback", "value_scale"),
}


@dataclass(frozen=True)
class ServerStream(Codec):
    """Keys or values of a server format. `encode` gives what pages hold, `decode` reads it as the kernels do."""

    format: KVFormat
    name: str  # "key" or "value"

    def fit(self, sample: LayerSample, stream: str) -> Kept:
        key, query, value = (x.transpose(0, 1) for x in (sample.key, sample.query, sample.value))
        constants = calibrate(self.format, key, query, value, sample.importance)
        return {name: tensor for name, tensor in constants.tensors().items() if name in _OF_STREAM[self.name]}

    def encode(self, x: Tensor, constants: Kept) -> Kept:
        if self._vector.is_raw:
            return {"codes": x.to(self._vector.raw_dtype)}
        encode = reference.encode_keys if self.name == "key" else reference.encode_values
        return self._kept(*encode(_by_token(x), self._vector, LayerConstants.from_tensors(constants)))

    def decode(self, kept: Kept, constants: Kept, size: int) -> Tensor:
        codes, scale = kept["codes"], kept.get("scale")
        planes = Planes(k=codes, v=codes, k_scale=scale, v_scale=scale)
        stored = reference.stored_keys if self.name == "key" else reference.stored_values
        return stored(planes, self._vector, LayerConstants.from_tensors(constants)).float()

    def encode_residual(self, x: Tensor, kept: Kept, constants: Kept) -> Kept:
        """What `encode` of x, which gave `kept`, left of it, coded like it."""
        encode = reference.encode_key_residuals if self.name == "key" else reference.encode_value_residuals
        codes, scale = self._codes(kept)
        return self._kept(*encode(_by_token(x), codes, scale, self._vector, LayerConstants.from_tensors(constants)))

    def decode_residual(self, residual: Kept, constants: Kept) -> Tensor:
        """(..., H, T, D) float32, to be added to what `decode` gives."""
        own = LayerConstants.from_tensors(constants)
        transform = (own.key if self.name == "key" else own.value).transform
        z = reference.dequantize(*self._codes(residual), self._vector, torch.float64)
        return reference.restore_residual(z, self._vector, transform).transpose(-2, -3).float()

    def _kept(self, codes: Tensor, scale: Tensor | None) -> Kept:
        kept = {"codes": reference.pack(codes, self._vector).transpose(-2, -3)}
        if scale is not None:
            kept["scale"] = scale.transpose(1, 2)
        return kept

    def _codes(self, kept: Kept) -> tuple[Tensor, Tensor]:
        """The inverse of `_kept`, of formats with scales."""
        return reference.unpack(kept["codes"].transpose(-2, -3), self._vector), kept["scale"].transpose(1, 2)

    @property
    def has_residual(self) -> bool:
        return self._vector.has_residual

    @property
    def _vector(self) -> VectorFormat:
        return self.format.k if self.name == "key" else self.format.v

    def vector_bits(self, size: int) -> int:
        return 8 * self._vector.bytes(size)

    def constant_bits(self, size: int, constants: Kept) -> int:
        return sum(8 * x.element_size() * x[0].numel() for x in constants.values())


def _by_token(x: Tensor) -> Tensor:
    """(..., H, T, D) as the server writes it."""
    return x.transpose(-2, -3).double()


def read_constants(path: Path, layers: int) -> list[dict[str, Kept]]:
    """Per layer and stream ("key", "value") the constants in a server's calibration file.

    Raises ConfigError if the file isn't one, or is for another number of layers.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = json.loads((file.metadata() or {})["layers"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except Exception as error:  # safetensors has errors of its own
        raise ConfigError(
            f"{str(path)!r} is no calibration file: name one that a server's log says it keeps"
        ) from error
    if len(names) != layers:
        raise ConfigError(
            f"{str(path)!r} is for {len(names)} layers, the model has {layers}: name the file of its server"
        )
    if not {name.rpartition("/")[2] for name in tensors} <= set(TENSOR_NAMES):
        raise ConfigError(
            f"{str(path)!r} is a calibration of another version: name one that a server of this version keeps"
        )
    return [
        {
            stream: {field: tensors[f"{name}/{field}"] for field in wanted if f"{name}/{field}" in tensors}
            for stream, wanted in _OF_STREAM.items()
        }
        for name in names
    ]
