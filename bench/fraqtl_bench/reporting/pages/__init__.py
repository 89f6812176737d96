"""The measured parts of the documentation, made from the files in bench/results.

    python -m fraqtl_bench.reporting.pages            write them
    python -m fraqtl_bench.reporting.pages --check    exit 1 if a page is not what would be written

A page marks a place with `<!-- results: NAME -->` and `<!-- end -->`. What stands between the two is made by the block of
that name; everything else on the page is written by hand. Every number that was measured belongs into a block.
"""
