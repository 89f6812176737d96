"""Triton's interpreter, without what it does again and again. What kernels compute is the same.

- It swaps the operations of `triton.language` for its own when a kernel is launched, and looks all of them up once
  more for every device function that the kernel calls. Here once a launch.
- For every array it makes a table of dtypes, a type and a shape anew. Here once for all arrays of a dtype and shape.

That is three fifths of the time of our kernels there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


@cache
def speed_up() -> None:
    """For the rest of this process."""
    _swap_once_a_launch()
    interpreter._get_np_dtype = _dtypes(interpreter._get_np_dtype)
    core.block_type.__init__ = _block_types(core.block_type.__init__)
    core.tensor.__init__ = _tensors(core.tensor.__init__)


def _swap_once_a_launch() -> None:
    swap, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    swapped: set[int] = set()  # modules of operations, in the launch that runs

    def swap_once(function: Any) -> Any:
        modules = {id(value) for value in function.__globals__.values() if value is tl or value is core}
        if modules and modules <= swapped:
            return interpreter._LangPatchScope()
        swapped.update(modules)
        return swap(function)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        swapped.clear()  # the launch before has put back what it swapped
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = swap_once
    interpreter.GridExecutor.__call__ = launched


def _dtypes(numpy_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    found: dict[str, Any] = {}

    def get(dtype: Any) -> Any:
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return numpy_dtype(scalar)
        if scalar.name not in found:
            found[scalar.name] = numpy_dtype(scalar)
        return found[scalar.name]

    return get


def _block_types(original: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [size.value if isinstance(size, core.constexpr) else size for size in shape]
        key = (type(element_ty), element_ty.name, *sizes)
        if key not in found:
            original(self, element_ty, shape)
            found[key] = dict(vars(self))
        vars(self).update(found[key])

    return init


def _tensors(original: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    """Of blocks; their type says the shape."""
    shapes: dict[str, tuple[Any, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        if not type.is_block() or type.name not in shapes:
            original(self, handle, type)
            if type.is_block():
                shapes[type.name] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[type.name]

    return init
