"""`python -m fraqtl_bench`, where the command `fraqtl-bench` may not be on the path."""

from fraqtl_bench.cli import main

main()
