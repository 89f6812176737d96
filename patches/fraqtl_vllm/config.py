"""This project's own settings, which travel inside vLLM's configuration.

--additional-config '{"fraqtl": {"kv_format": "k4v4"}}'

A process parses them once: whoever has them hands them on, whoever has only vLLM's configuration calls `settings_of`.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import DEFAULT_FORMAT, KVFormat, get_format
from fraqtl_vllm.names import format_of

KEY = "fraqtl"
OLD_KEYS = {"refinement": "residual"}
"""By old name the new one. Both are read for one more version."""

_said: set[str] = set()  # of the old names, so that each is told of once a process


class FraqtlConfig(BaseModel):
    """What `--additional-config` may say under "fraqtl". Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kv_format: str = DEFAULT_FORMAT
    """The name of a KV-cache format, see `fraqtl_kernels.formats`."""

    kv_layers: dict[int, str] = {}
    """Formats of single layers, where they differ from `kv_format`, by the layer's number; -1 is the last one."""

    kv_layer_count: int | None = None
    """How many layers the model must have for `kv_layers` to be meant for it; None: any number."""

    prefill_keys: Literal["raw", "packed"] | None = None
    """Which keys and values of a running prompt chunk its queries see: the raw ones, through flash attention, or the
    packed ones, so that the text doesn't depend on how a prompt was cut into chunks. A GPU takes raw ones
    unless told otherwise, the CPU knows packed ones only."""

    calibration: bool = True
    """Whether start-up fixes constants of the model (see `fraqtl_vllm.calibration`) for the formats that gain by it."""

    calibration_cache: str | None = None
    """The folder in which they are kept; by default one in the user's cache folder."""

    residual: bool = True
    """Whether the newest tokens are read with their residuals (see `fraqtl_kernels.residual`) where the format has
    them."""

    kv_memory_fits_context: bool = False
    """Whether the pool may grow beyond the size it was given until one sequence of the longest context fits, to half of
    the free memory at most. `fraqtl-serve serve` says so on a CPU where the user gave no size."""

    cpu_weight_copies: bool | None = None
    """Whether linear layers keep their weights a second time in the order that oneDNN multiplies them in, on processors
    with 16-bit matrix units. By default they do where all copies fit into a quarter of the free memory."""

    @field_validator("kv_format")
    @classmethod
    def _known_format(cls, name: str) -> str:
        return get_format(name).name

    @field_validator("kv_layers")
    @classmethod
    def _known_formats(cls, named: dict[int, str]) -> dict[int, str]:
        return {layer: get_format(name).name for layer, name in named.items()}

    @model_validator(mode="after")
    def _calibration_is_possible(self) -> FraqtlConfig:
        for each in self.formats:
            if each.needs_calibration and not self.calibration:
                raise ValueError(f"KV format {each.name} needs calibration: leave --no-kv-calibration out")
        return self

    @property
    def format(self) -> KVFormat:
        """Of the layers that `kv_layers` doesn't name."""
        return self._as_set(self.kv_format)

    @property
    def formats(self) -> tuple[KVFormat, ...]:
        """All that are in use, each once."""
        return tuple(self._as_set(name) for name in dict.fromkeys([self.kv_format, *self.kv_layers.values()]))

    @property
    def format_name(self) -> str:
        """What a log calls it before the model's layers are known: k4v4, or k4v4+k8v8 where they may differ."""
        return "+".join(each.name for each in self.formats)

    def _as_set(self, name: str) -> KVFormat:
        named = get_format(name)
        return named if self.residual else named.without_residual

    def by_layer(self, layers: int) -> list[KVFormat]:
        """The format of each of so many layers. Raises ConfigError if `kv_layers` is for another model."""
        if self.kv_layer_count not in (None, layers):
            raise ConfigError(
                f"the KV profile is for {self.kv_layer_count} layers and the model has {layers}: make a profile of it "
                "with fraqtl-bench quality MODEL --budget BITS"
            )
        named: dict[int, str] = {}
        for layer, name in self.kv_layers.items():
            if not -layers <= layer < layers:
                raise ConfigError(f"kv_layers names layer {layer}: the model has {layers}, give 0 to {layers - 1}")
            if named.setdefault(layer % layers, name) != name:
                raise ConfigError(f"kv_layers gives layer {layer % layers} two formats: leave one of them out")
        return [self._as_set(named.get(layer, self.kv_format)) for layer in range(layers)]


def read_config(additional_config: Any, cache_dtype: str = "auto") -> FraqtlConfig:
    """Our part of vLLM's `additional_config`, with the format that `cache_dtype` may name.

    Raises ConfigError in one sentence.
    """
    section = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
    if not isinstance(section, dict):
        raise ConfigError(f'--additional-config: "{KEY}" must be an object, not {section!r}')
    named = format_of(cache_dtype)
    if named is not None:
        section = {"kv_format": named, **section}
        if section["kv_format"] != named:
            raise ConfigError(
                f"--kv-cache-dtype {cache_dtype} contradicts KV format {section['kv_format']}, which --kv-format or "
                "--additional-config says: give one of them"
            )
    return _parse(json.dumps(section, default=repr))


def settings_of(vllm_config: Any) -> FraqtlConfig:
    """Our part of vLLM's configuration. Raises ConfigError in one sentence."""
    return read_config(vllm_config.additional_config, vllm_config.cache_config.cache_dtype)


@cache
def _parse(section: str) -> FraqtlConfig:
    try:
        return FraqtlConfig(**new_names(json.loads(section)))
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def new_names(section: dict[str, Any]) -> dict[str, Any]:
    """A copy in which every key has its new name. Raises ConfigError if one is given under both."""
    renamed = dict(section)
    for old in OLD_KEYS.keys() & section.keys():
        new = OLD_KEYS[old]
        if new in section:
            raise ConfigError(f'--additional-config: {old!r} is the old name of {new!r} in "{KEY}": give one of them')
        if old not in _said:
            _said.add(old)
            print(f'--additional-config: {old!r} in "{KEY}" is now {new!r}', file=sys.stderr)
        renamed[new] = renamed.pop(old)
    return renamed


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "extra_forbidden":
        valid = ", ".join(FraqtlConfig.model_fields)
        return f'--additional-config: unknown key {first["loc"][0]!r} in "{KEY}": choose one of {valid}'
    if first["type"] != "value_error":
        return f"--additional-config: {'.'.join(map(str, (KEY, *first['loc'])))}: {first['msg']}"
    return str(first["msg"]).removeprefix("Value error, ")
