"""Every arm by name. The arms of a device are imported when they are asked for: a GPU's host may lack Numba."""

from __future__ import annotations

from fraqtl_bench.kernels.arms import Arm
from fraqtl_kernels.errors import one_of


def arms_for(device: str) -> dict[str, Arm]:
    """Every arm of a device by name, the baselines first."""
    if device == "cpu":
        from fraqtl_bench.kernels.cpu_arms import cpu_arms

        return {arm.name: arm for arm in cpu_arms()}
    from fraqtl_bench.kernels.cuda_arms import cuda_arms
    from fraqtl_bench.kernels.rivals import rivals

    return {arm.name: arm for arm in (*rivals(), *cuda_arms())}


def choose(device: str, names: list[str] | None) -> list[Arm]:
    """The arms with these names, all if none is given. Raises ConfigError, which lists the valid names."""
    known = arms_for(device)
    for name in names or ():
        if name not in known:
            raise one_of(f"arm for --device {device}", name, known)
    return [arm for arm in known.values() if names is None or arm.name in names]
