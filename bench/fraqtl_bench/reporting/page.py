"""Reports as one HTML file without anything from elsewhere: a template with the style and the data in it."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def fill(package: str, data: Any) -> str:
    """`page.html` of `package`, with `style.css` for {{style}} and `data` as JSON for {{data}}."""
    style = files("fraqtl_bench.reporting").joinpath("style.css").read_text(encoding="utf-8")
    page = files(package).joinpath("page.html").read_text(encoding="utf-8")
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")
    return page.replace("{{style}}", style).replace("{{data}}", text)
