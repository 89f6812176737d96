"""Pages with marked places, and what belongs there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fraqtl_bench.reporting.pages import (  # noqa: F401  (they register their blocks)
    families,
    latent,
    precision_or_deletion,
    quality,
    quantizer,
    rivals,
    service,
    speed,
)
from fraqtl_bench.reporting.pages.results import BLOCKS, ROOT_MARK
from fraqtl_kernels.errors import ConfigError

MARK = re.compile(r"<!-- results: (?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- end -->", re.DOTALL)


def pages(root: Path) -> Iterator[Path]:
    """README.md and everything below docs. Raises ConfigError where there is no checkout."""
    if not (root / "docs").is_dir():
        raise ConfigError(f"{root} has no folder docs: run this in a checkout")
    yield root / "README.md"
    yield from sorted((root / "docs").rglob("*.md"))


def names(text: str) -> list[str]:
    """The blocks that a page asks for."""
    return [found["name"] for found in MARK.finditer(text)]


def by_hand(text: str) -> str:
    """What stands outside of blocks."""
    return MARK.sub("", text)


def fill(text: str, page: Path) -> str:
    """`text` with every block made anew. page: its path below the repository. Raises ConfigError for unknown blocks."""
    up = "../" * (len(page.parts) - 1)

    def make(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in BLOCKS:
            raise ConfigError(f"{page}: unknown block {name}: choose one of {', '.join(sorted(BLOCKS))}")
        body = re.sub(r"\n{3,}", "\n\n", "\n".join(BLOCKS[name]())).strip("\n").replace(ROOT_MARK, up)
        return f"<!-- results: {name} -->\n\n{body}\n\n<!-- end -->"

    return MARK.sub(make, text)
