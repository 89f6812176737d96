"""Defaults, the suite file, and the settings that come out of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fraqtl_bench.quality.ruler.names import RULER_TASKS
from fraqtl_kernels.errors import ConfigError, one_of

MEASURES = ("perplexity", "divergence", "last-word", "needle", "routing", "law", "ruler")
DEFAULT_MEASURES = tuple(name for name in MEASURES if name != "ruler")  # which takes as long as all others
DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]
STANDARD: dict[str, Any] = {
    "window": 1024,
    "stride": 512,
    "tokens": 16384,
    "calibration_tokens": 1024,
    "passages": 40,
    "needle_lengths": [256, 1024],
    "needle_depths": DEPTHS,
    "needle_repeats": 5,
    "ruler_tasks": list(RULER_TASKS),
    "ruler_lengths": [1024],
    "ruler_repeats": 10,
    "routing_windows": 2,
    "queries": 128,
}
QUICK: dict[str, Any] = {
    "window": 256,
    "stride": 256,
    "tokens": 1024,
    "calibration_tokens": 512,
    "passages": 6,
    "needle_lengths": [256],
    "needle_depths": [0.0, 0.5, 1.0],
    "needle_repeats": 2,
    "ruler_tasks": ["niah_single_2", "niah_multikey_1", "vt"],
    "ruler_lengths": [512],
    "ruler_repeats": 2,
    "routing_windows": 1,
    "queries": 32,
}
SEARCH_TOKENS = 4096
LEAST_CALIBRATION = 64  # tokens
_OWN = ("text", "calibration", "last_word", "dtype", "device", "seed", "methods", "measures")


def read_suite(path: Path) -> dict[str, Any]:
    """A suite: `models`, a list of {name, published}, and any option by its long name with underscores."""
    import yaml

    if not path.is_file():
        raise ConfigError(f"suite {str(path)!r} was not found: give a YAML file such as bench/paper.yaml")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"suite {str(path)!r} is not YAML: give a file such as bench/paper.yaml") from None
    names_given = isinstance(found, dict) and isinstance(found.get("models"), list)
    if not names_given or not all(isinstance(m, dict) and "name" in m for m in found["models"]):
        raise ConfigError(f"suite {str(path)!r} lists no models: give `models`, each with a `name`")
    valid = {*STANDARD, *_OWN, "models"}
    for name in found:
        if name not in valid:
            raise one_of("suite option", name, sorted(valid))
    return dict(found)


def settings_of(args: argparse.Namespace, device: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What a run depends on (see `schema.Settings`), and published figures by model. Arguments win over the suite."""
    suite = read_suite(args.suite) if args.suite else {}
    given = {k: v for k, v in vars(args).items() if v is not None}
    listed = suite.pop("models", [])
    chosen = {**(QUICK if args.quick else STANDARD), **suite}
    chosen |= {k: v for k, v in given.items() if k in {*STANDARD, *_OWN}}
    text = chosen.get("text", "generated")
    published = {m["name"]: m["published"] for m in listed if m.get("published")}
    settings = {
        **{k: chosen[k] for k in STANDARD},
        "models": args.models or [m["name"] for m in listed] or ["demo"],
        "text": text,
        "calibration": chosen.get("calibration", text),
        "last_word": chosen.get("last_word", "generated"),
        "methods": chosen.get("methods"),
        "measures": list(chosen.get("measures", DEFAULT_MEASURES)),
        "dtype": chosen.get("dtype"),
        "device": chosen.get("device", device),
        "seed": chosen.get("seed", 0),
    }
    _check(settings)
    return settings, published


def _check(settings: dict[str, Any]) -> None:
    least = {"window": 16, "stride": 1, "tokens": 0, "passages": 1, "needle_repeats": 1, "ruler_repeats": 1}
    for name, low in {**least, "calibration_tokens": LEAST_CALIBRATION}.items():
        if settings[name] < low:
            raise ConfigError(f"--{name.replace('_', '-')} {settings[name]} is too small: give {low} or more")
    for measure in settings["measures"]:
        if measure not in MEASURES:
            raise one_of("measure", measure, MEASURES)
    for task in settings["ruler_tasks"]:
        if task not in RULER_TASKS:
            raise one_of("RULER task", task, RULER_TASKS)
