"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    "fraqtl_kernels": ROOT / "kernels" / "fraqtl_kernels",
    "fraqtl_vllm": ROOT / "patches" / "fraqtl_vllm",
    "fraqtl_serve": ROOT / "fraqtl_serve",
    "fraqtl_bench": ROOT / "bench" / "fraqtl_bench",
}
# What each package may import of ours and of vLLM, itself apart.
BELOW = {
    "fraqtl_kernels": set[str](),
    "fraqtl_vllm": {"fraqtl_kernels", "vllm"},
    "fraqtl_serve": {"fraqtl_kernels", "fraqtl_vllm", "vllm"},
    "fraqtl_bench": {"fraqtl_kernels", "vllm"},
}
# vLLM's documented extension points; whatever else is needed of it stands in a package's _vllm.py.
EXTENSION_POINTS = {
    "fraqtl_vllm/attention/backend.py": {"vllm.v1.attention.backend", "vllm.platforms"},
    "fraqtl_vllm/attention/cpu.py": {"vllm.v1.attention.backend"},
    "fraqtl_vllm/attention/cuda.py": {"vllm.v1.attention.backend", "vllm.platforms"},
    "fraqtl_vllm/platform/cpu_worker.py": {"vllm.platforms"},
    "fraqtl_vllm/attention/layer.py": {"vllm.v1.attention.backend"},
    "fraqtl_vllm/plugin.py": {"vllm.v1.attention.backends.registry", "vllm.platforms"},
    "fraqtl_vllm/platform/cuda.py": {"vllm.platforms"},
    "fraqtl_vllm/platform/stock_cpu.py": {"vllm.platforms"},
    "fraqtl_serve/cli/doctor.py": {"vllm.platforms"},
}
REGISTRIES = (
    ("pypi", "org"),
    ("pythonhosted", "org"),
    ("download.pytorch", "org"),
    ("pypi.nvidia", "com"),
    ("wheels.vllm", "ai"),
    ("anaconda", "org"),
    ("npmjs", "org"),
    ("npmjs", "com"),
    ("crates", "io"),
)


def files(package: str) -> list[Path]:
    return sorted(SOURCES[package].rglob("*.py"))


def imports(source: str) -> Iterator[str]:
    """Every module that is imported, also inside functions, and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def imports_of(package: str) -> Iterator[tuple[str, str]]:
    """(file, module) of a whole package."""
    for file in files(package):
        short = f"{package}/{file.relative_to(SOURCES[package]).as_posix()}"
        yield from ((short, module) for module in imports(file.read_text(encoding="utf-8")))


def test_the_scan_sees_imports_wherever_they_stand() -> None:
    source = "import a.b as c, d\nfrom e.f import g\ndef h():\n    from . import i\n    if True:\n        import j\n"
    assert sorted(imports(source)) == [".", "a.b", "d", "e.f", "j"]
    assert ("fraqtl_vllm/attention/backend.py", "fraqtl_kernels.pages") in imports_of("fraqtl_vllm")
    assert ("fraqtl_serve/cli/doctor.py", "vllm.platforms") in imports_of("fraqtl_serve")


@pytest.mark.parametrize("package", SOURCES)
def test_imports_point_downwards(package: str) -> None:
    watched = {*SOURCES, "vllm"} - BELOW[package] - {package}
    wrong = [f"{file}: {module}" for file, module in imports_of(package) if module.split(".")[0] in watched]
    assert wrong == []


@pytest.mark.parametrize("package", SOURCES)
def test_imports_are_absolute(package: str) -> None:
    assert [f"{file}: {module}" for file, module in imports_of(package) if module.startswith(".")] == []


@pytest.mark.parametrize("package", ["fraqtl_vllm", "fraqtl_serve", "fraqtl_bench"])
def test_vllm_stands_in_one_module_of_a_package(package: str) -> None:
    wrong = [
        f"{file}: {module}"
        for file, module in imports_of(package)
        if module.split(".")[0] == "vllm"
        and not file.endswith("/_vllm.py")
        and module not in EXTENSION_POINTS.get(file, ())
    ]
    assert wrong == []


def imported_modules(package: str, *, lazy: bool) -> dict[str, set[str]]:
    """Of every module of a package those of it that it imports. lazy: also in functions, and for types only."""
    by_name = {}
    for file in files(package):
        parts = (package, *file.relative_to(SOURCES[package]).with_suffix("").parts)
        by_name[".".join(parts).removesuffix(".__init__")] = file
    graph = {}
    for name, file in by_name.items():
        named: set[str] = set()
        for node in _at_import(ast.parse(file.read_text(encoding="utf-8")), lazy=lazy):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # What is imported from a package may be a module of it.
                both = ((f"{node.module}.{alias.name}", f"{node.module}") for alias in node.names)
                named |= {whole if whole in by_name else module for whole, module in both}
        graph[name] = named & by_name.keys() - {name}
    return graph


def _at_import(node: ast.AST, *, lazy: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        waits = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if lazy or not (waits or for_types):
            yield child
            yield from _at_import(child, lazy=lazy)


def in_a_circle(graph: dict[str, set[str]]) -> set[str]:
    """Nodes that lead back to themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            todo += (new := graph.get(todo.pop(), set()) - seen)
            seen |= new
        return seen

    return {node for node in graph if node in reached(node)}


def test_circles_are_found() -> None:
    assert in_a_circle({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}) == {"a", "b", "c"}
    assert in_a_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == set()
    source = "import a\nif TYPE_CHECKING:\n    import b\ndef f():\n    import c\n"
    found = {
        lazy: [n for n in _at_import(ast.parse(source), lazy=lazy) if isinstance(n, ast.Import)]
        for lazy in (False, True)
    }
    assert [len(found[False]), len(found[True])] == [1, 3]
    assert "fraqtl_vllm.attention.layer" in imported_modules("fraqtl_vllm", lazy=False)["fraqtl_vllm.attention.cpu"]
    assert "fraqtl_serve.cli.chat" in imported_modules("fraqtl_serve", lazy=True)["fraqtl_serve.cli.main"]


@pytest.mark.parametrize("package", SOURCES)
def test_no_modules_need_each_other(package: str) -> None:
    assert in_a_circle(imported_modules(package, lazy=True)) == set()


@pytest.mark.parametrize("package", ["fraqtl_vllm", "fraqtl_serve"])
def test_no_folders_need_each_other(package: str) -> None:
    """Modules beside the folders are left out: they are below all of them, or above."""
    folders: dict[str, set[str]] = {}
    for module, imported in imported_modules(package, lazy=True).items():
        folder = _folder(package, module)
        folders.setdefault(folder, set()).update({_folder(package, name) for name in imported} - {folder, ""})
    folders.pop("")
    assert len(folders) >= 4
    assert in_a_circle(folders) == set()


def _folder(package: str, module: str) -> str:
    """The folder of a module, "" for one beside the folders."""
    first = module.split(".")[1] if "." in module else ""
    return first if (SOURCES[package] / first).is_dir() else ""


ORACLE = "fraqtl_kernels.reference"


def names(source: str) -> Iterator[str]:
    """Every module or name that is imported, written out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "source",
    [
        "import fraqtl_kernels.reference",
        "from fraqtl_kernels import reference",
        "from fraqtl_kernels.reference import pack",
    ],
)
def test_an_import_of_the_oracle_is_seen(source: str) -> None:
    assert any(name.startswith(ORACLE) for name in names(source))


@pytest.mark.parametrize("package", ["fraqtl_kernels", "fraqtl_vllm", "fraqtl_serve"])
def test_only_tests_and_benchmarks_use_the_oracle(package: str) -> None:
    found = [f for f in files(package) for name in names(f.read_text(encoding="utf-8")) if name.startswith(ORACLE)]
    assert found == []


def test_the_oracle_uses_nothing_that_it_checks() -> None:
    """Of this project it takes what formats, pages and constants mean, and no codec and no kernel."""
    source = (SOURCES["fraqtl_kernels"] / "reference.py").read_text(encoding="utf-8")
    ours = {module.removeprefix("fraqtl_kernels.") for module in imports(source) if module.startswith("fraqtl_kernels")}
    assert ours <= {"constants", "errors", "formats", "pages", "residual", "rotation"}


def test_no_source_names_a_package_registry() -> None:
    """Where packages come from is the machine's own setting."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    tracked = [ROOT / name for name in listed.split("\0") if name and not name.endswith(".md")]
    assert ROOT / "pyproject.toml" in tracked
    hosts = [".".join(parts).encode() for parts in REGISTRIES]
    wrong = []
    for file in filter(Path.is_file, tracked):
        content = file.read_bytes()
        wrong += [f"{file.relative_to(ROOT)}: {host.decode()}" for host in hosts if host in content]
    assert wrong == []


def changed_classes(source: str) -> list[str]:
    """Assignments to attributes of a class, as far as a name tells: `cls.x = ...`, `Name.x = ...`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else targets
        for target in (part for t in targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])):
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                name = target.value.id
                if name == "cls" or (name[0].isupper() and not name.isupper()):
                    found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("line", ["cls.x = 3", "self.y = Thing.x = 3", "Thing.x += 1", "Thing.x, y = 1, 2"])
def test_a_changed_class_is_seen(line: str) -> None:
    assert len(changed_classes(line)) == 1
    assert changed_classes("self.x = 3\nthing.x = 3\nclass A:\n    x = 3") == []


@pytest.mark.parametrize("package", ["fraqtl_vllm", "fraqtl_serve"])
def test_no_class_is_changed_at_run_time(package: str) -> None:
    """Two engines of a process would share what one of them was told."""
    found = {f.name: changed_classes(f.read_text(encoding="utf-8")) for f in files(package)}
    assert {name: lines for name, lines in found.items() if lines} == {}


COMPILED = ("triton.jit", "njit", "intrinsic", "cfunc")
"""How decorators begin that Triton's and Numba's compilers take over. mypy is told to let such modules be."""


def untyped(source: str) -> list[str]:
    """Functions without the type of an argument or of what they return, but for compiled ones."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any(ast.unparse(decorator).startswith(COMPILED) for decorator in node.decorator_list):
            continue
        rest = [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, *rest]
        missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if missing or node.returns is None:
            found.append(node.name)
    return found


def test_a_function_without_types_is_seen() -> None:
    assert untyped("def f(x): ...\ndef g() -> int: ...\ndef h(*a) -> int: ...\n@njit\ndef k(x): ...") == ["f", "h"]


def test_launchers_have_types() -> None:
    found = {f.name: untyped(f.read_text(encoding="utf-8")) for f in files("fraqtl_kernels")}
    assert {name: functions for name, functions in found.items() if functions} == {}


APART = ("cpu/kernels", "cpu/layers", "gpu/kernels")
"""Folders of `fraqtl_kernels` for what compilers take, with which mypy and ruff are less strict."""


def folder_of(file: Path) -> str:
    return file.parent.relative_to(SOURCES["fraqtl_kernels"]).as_posix()


def has_compiled(source: str) -> bool:
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return any(ast.unparse(d).startswith(COMPILED) for function in functions for d in function.decorator_list)


def test_what_compilers_take_stands_apart() -> None:
    found = {folder_of(f) for f in files("fraqtl_kernels") if has_compiled(f.read_text(encoding="utf-8"))}
    assert found == set(APART)


@pytest.mark.parametrize("folder", APART)
def test_kernels_know_nothing_of_launchers(folder: str) -> None:
    device = folder.split("/")[0]
    apart = tuple(f"fraqtl_kernels.{name.replace('/', '.')}." for name in APART if name.startswith(device))
    modules = {m for f in files("fraqtl_kernels") if folder_of(f) == folder for m in imports(f.read_text("utf-8"))}
    ours = {module for module in modules if module.startswith("fraqtl_kernels")}
    others = {module for module in ours if not module.startswith(apart)}
    assert others < ours and others <= {"fraqtl_kernels.formats", "fraqtl_kernels.residual"}


def test_cpu_and_gpu_have_the_same_rooms() -> None:
    for rooms in ("plan", "operands", "write", "decode", "prefill", "kernels/decode"):
        for device in ("cpu", "gpu"):
            assert (SOURCES["fraqtl_kernels"] / device / f"{rooms}.py").is_file()


MOST_ARGUMENTS = 12


def long_calls(source: str) -> list[str]:
    """Calls with so many arguments without names that two of them could be swapped unseen."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [ast.unparse(call.func) for call in calls if len(call.args) > MOST_ARGUMENTS]


def test_a_long_call_is_seen() -> None:
    thirteen = ", ".join("abcdefghijklm")
    assert long_calls(f"f({thirteen})\nkernel[grid]({thirteen})\ng({thirteen[3:]}, n=1)") == ["f", "kernel[grid]"]


@pytest.mark.parametrize("package", SOURCES)
def test_launches_name_their_arguments(package: str) -> None:
    launchers = [f for f in files(package) if package != "fraqtl_kernels" or folder_of(f) not in APART]
    found = {f.name: long_calls(f.read_text(encoding="utf-8")) for f in launchers}
    assert {name: calls for name, calls in found.items() if calls} == {}
