"""Reports as one HTML file without anything from elsewhere: a template with the style and the data in it."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def fill(package: str, data: Any) -> str:
    """`page.html` of `package`; {{style}} is `style.css`, {{script}} is `page.js` and {{data}} is `data` as JSON."""

    def read(folder: str, name: str) -> str:
        return files(folder).joinpath(name).read_text(encoding="utf-8")

    page, here = read(package, "page.html"), "fraqtl_bench.reporting"
    page = page.replace("{{style}}", read(here, "style.css")).replace("{{script}}", read(here, "page.js"))
    return page.replace("{{data}}", json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/"))
