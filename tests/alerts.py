"""The alerts of docs/guides/monitoring.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

GUIDE = Path(__file__).parents[1] / "docs/guides/monitoring.md"


def alerts() -> dict[str, str]:
    """Their expressions, by name."""
    text = GUIDE.read_text(encoding="utf-8").split("```yaml\n", 1)[1].split("```", 1)[0]
    rules: Any = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    return {rule["alert"]: rule["expr"] for rule in rules}
