"""The measured parts of the documentation, made from the files in bench/results.

    python -m fraqtl_bench.reporting.pages            write them
    python -m fraqtl_bench.reporting.pages --check    exit 1 if a page is not what would be written

A page marks a place with `<!-- results: NAME -->` and `<!-- end -->`. The block of that name makes what stands between
the two; everything else on the page is written by hand. Every measured number belongs in a block.
"""
