"""What hooks say of vLLM's source, compared with the vLLM that is installed."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path
from types import ModuleType

from fraqtl_vllm.compat import Hook, Symptom


def source(place: str) -> str:
    """The stock source of a module or of what is in it, also where a hook has replaced it in this process."""
    module, _, names = place.partition(":")
    found = import_module(module)
    for name in filter(None, names.split(".")):
        found = getattr(found, name)
    return inspect.getsource(found)


def changed(symptom: Symptom) -> list[str]:
    """What is no longer as the symptom says."""
    text = source(symptom.place)
    gone = [f"{symptom.place}: no longer has {piece!r}" for piece in symptom.has if piece not in text]
    return gone + [f"{symptom.place}: now has {piece!r}" for piece in symptom.lacks if piece in text]


def not_of_vllm(hook: Hook) -> bool:
    return hook.target.partition(".")[2].startswith("fraqtl_")


def replacements(source: str) -> list[str]:
    """Where a function is put on an object that is not the writer's own, or anything by `setattr`."""
    tree = ast.parse(source)
    functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            found.append(ast.unparse(node))
        if not isinstance(node, ast.Assign):
            continue
        targets = [part for t in node.targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])]
        owners = {ast.unparse(t.value) for t in targets if isinstance(t, ast.Attribute)}
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        is_function = any(isinstance(v, ast.Lambda) or (isinstance(v, ast.Name) and v.id in functions) for v in values)
        if is_function and owners - {"self", "cls"}:
            found.append(ast.unparse(node))
    return found


def writers(folder: Path, apart_from: ModuleType) -> dict[str, list[str]]:
    """Modules that replace something, but for the one that may."""
    own = Path(str(apart_from.__file__))
    found = {f.name: replacements(f.read_text(encoding="utf-8")) for f in sorted(folder.rglob("*.py")) if f != own}
    return {name: places for name, places in found.items() if places}
