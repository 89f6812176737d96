"""A compiled function's parts on several threads, without Python between them.

`in_team` hands libgomp's GOMP_parallel a C function in which every thread of the team calls the compiled function for a
part of its own. `share.py` does the same for any Python function, but there each thread first waits for the
interpreter's lock and unpacks the arguments, which can take as long as a layer of a small model attends.

The compiled function comes as an address, so that it isn't compiled a second time into its caller.
"""

from __future__ import annotations

import ctypes
from typing import Any

from llvmlite import binding, ir
from numba import typeof, types
from numba.core import cgutils
from numba.extending import intrinsic

_I32, _I64, _BYTES, _VOID = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer(), ir.VoidType()
_FINE, _FAILING = _I64(0), _I64(1)
_SYMBOLS = {  # of libgomp: name here, name there
    "fraqtl_parallel": "GOMP_parallel",
    "fraqtl_thread": "omp_get_thread_num",
    "fraqtl_threads": "omp_get_num_threads",
}
_Nothing = ctypes.CFUNCTYPE(None)
_nothing = _Nothing(lambda: None)  # kept, because compiled code has its address
_FAILED = "a part of the work failed: memory may have run out"


def register(library: Any) -> bool:
    """Make libgomp's functions known to compiled code, also to that from Numba's cache. Whether it has them all.

    library: of `threads.openmp`, or None. Compiled code can't be loaded without the names, so that they stand for
    something where teams have one thread.
    """
    functions = [getattr(library, symbol, None) for symbol in _SYMBOLS.values()]
    for name, function in zip(_SYMBOLS, functions, strict=True):
        binding.add_symbol(name, ctypes.cast(function or _nothing, ctypes.c_void_p).value or 0)
    return all(functions)


def address_of(function: Any, *given: Any) -> int:
    """Where the machine code of a compiled function of (begin, end, *given) begins."""
    signature = types.intp, types.intp, *(typeof(x) for x in given)
    function.compile(signature)
    compiled = function.overloads[signature]
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))


@intrinsic
def in_team(typingctx: Any, address: Any, threads: Any, parts: Any, given: Any) -> Any:
    """function(begin, end, *given) over parts 0 .. parts - 1 in even pieces, one a thread of a team of `threads`.

    address: of `address_of` the function and what is given. It returns nothing. threads: 1 unless `register` found all.
    Raises RuntimeError if the function raises.
    """
    argument_types = types.intp, types.intp, *given.types

    def call(context: Any, builder: Any, address: Any, begin: Any, end: Any, given: Any) -> Any:
        """Whether it failed, as a bit."""
        kind = context.call_conv.get_function_type(types.none, argument_types)
        arguments = begin, end, *cgutils.unpack_tuple(builder, given)
        function = builder.inttoptr(address, kind.as_pointer())
        status, _ = context.call_conv.call_function(builder, function, types.none, argument_types, arguments)
        return status.is_error

    def body_of(context: Any, module: Any, kind: Any) -> Any:
        """What every thread of a team runs: void(void *) of a `kind`."""
        body = ir.Function(module, ir.FunctionType(_VOID, [_BYTES]), module.get_unique_name("team"))
        body.linkage = "internal"
        builder = ir.IRBuilder(body.append_basic_block("entry"))
        data = builder.bitcast(body.args[0], kind.as_pointer())
        address, parts, _, given = cgutils.unpack_tuple(builder, builder.load(data))
        own, threads = (
            builder.sext(builder.call(_declared(module, name, _I32, []), []), _I64)
            for name in ("fraqtl_thread", "fraqtl_threads")
        )
        begin, end = (builder.sdiv(builder.mul(parts, x), threads) for x in (own, builder.add(own, _I64(1))))
        with builder.if_then(call(context, builder, address, begin, end, given), likely=False):
            builder.store(_FAILING, cgutils.gep_inbounds(builder, data, 0, 2))
        builder.ret_void()
        return body

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address, threads, parts, given = args
        kind = ir.LiteralStructType([_I64, _I64, _I64, given.type])
        data = cgutils.alloca_once(builder, kind)
        builder.store(cgutils.make_anonymous_struct(builder, [address, parts, _FINE, given], kind), data)
        body = body_of(context, builder.module, kind)
        with builder.if_else(builder.icmp_signed(">", threads, _I64(1))) as (several, alone):
            with several:
                parallel = _declared(builder.module, "fraqtl_parallel", _VOID, [body.type, _BYTES, _I32, _I32])
                builder.call(parallel, [body, builder.bitcast(data, _BYTES), builder.trunc(threads, _I32), _I32(0)])
            with alone:
                failed = builder.zext(call(context, builder, address, _I64(0), parts, given), _I64)
                builder.store(failed, cgutils.gep_inbounds(builder, data, 0, 2))
        failed = builder.load(cgutils.gep_inbounds(builder, data, 0, 2))
        with builder.if_then(builder.icmp_signed("!=", failed, _FINE), likely=False):
            context.call_conv.return_user_exc(builder, RuntimeError, (_FAILED,))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, given), build


def _declared(module: Any, name: str, returned: Any, arguments: list[Any]) -> Any:
    return cgutils.get_or_insert_function(module, ir.FunctionType(returned, arguments), name)
