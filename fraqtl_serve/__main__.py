"""`python -m fraqtl_serve` is `fraqtl-serve`."""

from fraqtl_serve.cli.main import main

if __name__ == "__main__":
    main()
