"""`python -m tests.e2e.families`, see the package's docstring."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from fraqtl_bench import results
from fraqtl_kernels.errors import one_of
from tests.e2e.families.models import FAMILIES
from tests.e2e.families.row import Row
from tests.e2e.families.run import line, try_families


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.families", description="Try families of models.")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help=f"some of {', '.join(FAMILIES)}")
    parser.add_argument("--quick", action="store_true", help="k4v4 and bf16 in float32 only, no capacity")
    parser.add_argument("--out", type=Path, help="write the result as JSON; with --only, into the rows that are there")
    args = parser.parse_args()
    names = args.only or list(FAMILIES)
    for name in names:
        if name not in FAMILIES:
            parser.error(str(one_of("family", name, FAMILIES)))
    rows = try_families(names, quick=args.quick)
    for name, row in rows.items():
        print(line(name, row), flush=True)
    if args.out:
        save(args.out, rows, is_part=bool(args.only), quick=args.quick)
    if any(row.problems for row in rows.values()):
        sys.exit(1)


def save(path: Path, rows: dict[str, Row], *, is_part: bool, quick: bool) -> None:
    """is_part: of rows that are in the file already, the others stay; each says when, and with what, it was made."""
    found = json.loads(path.read_text())["families"] if is_part and path.exists() else {}
    found |= {name: asdict(row) for name, row in rows.items()}
    families = {name: found[name] for name in FAMILIES if name in found}
    some = "" if len(families) == len(FAMILIES) else f" --only {' '.join(families)}"
    command = f"python -m tests.e2e.families{' --quick' if quick else ''}{some} --out {path}"
    results.save(path, {"command": command, "families": families})


if __name__ == "__main__":
    main()
