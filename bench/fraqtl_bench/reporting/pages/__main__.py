"""`python -m fraqtl_bench.reporting.pages`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fraqtl_bench.reporting.files import write_whole
from fraqtl_bench.reporting.pages.fill import fill, pages
from fraqtl_bench.reporting.pages.results import ROOT
from fraqtl_bench.reporting.pages.rivals import draw
from fraqtl_kernels.errors import FraqtlError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fraqtl_bench.reporting.pages",
        description="Fill README.md and docs/ with tables made from bench/results.",
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: the one this file is in)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page would change")
    how.add_argument("--figure", action="store_true", help="also draw docs/images/rivals.png (needs matplotlib)")
    args = parser.parse_args()
    try:
        changed = list(write(args.root, only_check=args.check))
        if args.figure:
            print(draw(args.root / "docs" / "images"))
    except FraqtlError as error:
        print(f"pages: {error}", file=sys.stderr)
        sys.exit(2)
    for path in changed:
        print(path)
    if args.check and changed:
        sys.exit(1)


def write(root: Path, only_check: bool) -> list[str]:
    """The pages that change, by their paths below `root`."""
    changed = []
    for path in pages(root):
        before = path.read_text(encoding="utf-8")
        after = fill(before, path.relative_to(root))
        if after != before:
            changed.append(path.relative_to(root).as_posix())
            if not only_check:
                write_whole(path, after)
    return changed


if __name__ == "__main__":
    main()
