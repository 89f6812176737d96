"""What is compiled at installation."""

from __future__ import annotations

import ast
from importlib.util import find_spec

import pytest

from fraqtl_kernels import cpu
from fraqtl_serve.cli import prepare


def test_a_process_for_the_imports_and_one_for_each_kernel() -> None:
    found = prepare.commands("cpu")
    assert len(found) == 1 + len(cpu.WARM_UPS)
    for code in found.values():
        ast.parse(code)
    assert list(prepare.commands("gpu")) == ["modules of the server"]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_modules_exist(device: str) -> None:
    assert [name for name in prepare.IMPORTS if find_spec(name.format(device=device)) is None] == []


def test_what_fails_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(prepare, "commands", lambda device: {"kernels: broken": "raise SystemExit('no compiler')"})
    with pytest.raises(SystemExit) as end:
        prepare.main()
    assert end.value.code == 1
    assert capsys.readouterr().err == "no compiler\n\nkernels: broken can't be compiled\n"
