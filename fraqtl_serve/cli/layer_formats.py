"""Formats of single layers on the command line: `--kv-layers 0,-1=k8v8` and `--kv-profile FILE`."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from fraqtl_kernels.errors import ConfigError
from fraqtl_kernels.formats import get_format

PROFILE_VERSION = 1


class _Layer(BaseModel):
    layer: int
    kv_format: str


class _Profile(BaseModel):
    """What is read of `fraqtl-profile.json`, see docs/reference/quality-lab.md."""

    schema_version: int
    layers: list[_Layer]


def add_flags(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--kv-layers",
        action="append",
        metavar="LAYERS=FORMAT",
        help="layers with a format of their own, such as 0,-1=k8v8 for the first and the last; may be given repeatedly",
    )
    parser.add_argument(
        "--kv-profile",
        type=Path,
        metavar="FILE",
        help="the format of every layer, from the fraqtl-profile.json that fraqtl-bench quality --budget writes",
    )


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """What the two flags say in our settings; nothing where they are left out. Raises ConfigError."""
    if args.kv_profile is None:
        return exceptions(args.kv_layers) if args.kv_layers else {}
    if args.kv_layers is not None:
        raise contradiction("--kv-layers", "--kv-profile")
    return read_profile(args.kv_profile)


def contradiction(name: str, whole: str) -> ConfigError:
    """Of `name`, which says the format of some layers, and `whole`, which says that of all."""
    return ConfigError(f"{name} contradicts {whole}, which says the format of every layer: give one of them")


def parse_layers(text: str) -> dict[int, str]:
    """`0,-1=k8v8` as formats by layer. Raises ConfigError."""
    found = re.fullmatch(r"(-?\d+(?:,-?\d+)*)=(\S+)", text)
    if found is None:
        raise ConfigError(f"--kv-layers {text!r}: give numbers of layers and a format, such as 0,-1=k8v8")
    numbers, name = map(int, found[1].split(",")), found[2]
    return dict.fromkeys(numbers, get_format(name).name)


def exceptions(given: Iterable[str]) -> dict[str, Any]:
    """What `--kv-layers`, given so many times, says in our settings. Raises ConfigError."""
    found: dict[int, str] = {}
    for text in given:
        for layer, name in parse_layers(text).items():
            if found.get(layer, name) != name:
                raise ConfigError(f"--kv-layers gives layer {layer} two formats, {found[layer]} and {name}: give one")
            found[layer] = name
    return {"kv_layers": found}


def read_profile(path: Path) -> dict[str, Any]:
    """What a profile says in our settings: its most frequent format, and the layers that have others.

    Raises ConfigError if it isn't one.
    """
    try:
        found = _Profile.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError:
        raise ConfigError(f"--kv-profile {path} can't be read: give the fraqtl-profile.json of a quality run") from None
    except (ValueError, ValidationError):
        raise ConfigError(f"--kv-profile {path} is no profile: give the fraqtl-profile.json of a quality run") from None
    if found.schema_version != PROFILE_VERSION:
        raise ConfigError(
            f"--kv-profile {path} has version {found.schema_version}, this server reads {PROFILE_VERSION}: make it anew"
        )
    formats = {each.layer: get_format(each.kv_format).name for each in found.layers}
    if not formats or sorted(formats) != list(range(len(found.layers))):
        raise ConfigError(f"--kv-profile {path} does not name every layer once, from 0 on: make it anew")
    [(main, _)] = Counter(formats.values()).most_common(1)
    others = {layer: name for layer, name in formats.items() if name != main}
    return {"kv_format": main, "kv_layers": others, "kv_layer_count": len(formats)}
