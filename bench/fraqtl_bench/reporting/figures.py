"""matplotlib without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fraqtl_kernels.errors import ConfigError


def pyplot() -> Any:
    """matplotlib.pyplot. Raises ConfigError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("figures need matplotlib: install it, or leave them out with --no-figures") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(plt: Any, figure: Any, path: Path) -> Path:
    """Write the figure as PNG and forget it."""
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
