"""How a draft process ends: asked, killed, or by itself when its target has died."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from wire import configure

from vllm_ssd.target import launch
from vllm_ssd.target.launch import DraftProcess

PATIENCE_S = 60


class Stubborn(DraftProcess):
    """In place of a draft: reads nothing."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(["sleep", "1000"], stdin=subprocess.PIPE, bufsize=0)


def test_killing_does_not_wait() -> None:
    process = Stubborn()
    process.kill()
    process.kill()  # nothing more to do
    process._process.wait(PATIENCE_S)
    assert process.exit_code() == -9
    process.stop()


def test_one_that_does_not_end_when_asked_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_EXIT_GRACE_S", 0.01)
    process = Stubborn()
    process.stop()
    assert process._process.wait(PATIENCE_S) == -9


def test_one_that_cannot_be_killed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Stubborn()
    waits: list[float | None] = []

    def wait(timeout: float | None = None) -> Any:
        waits.append(timeout)
        raise subprocess.TimeoutExpired("sleep", timeout or 0)

    with monkeypatch.context() as patch:
        patch.setattr(process._process, "wait", wait)
        process.stop()
    assert None not in waits
    process._process.wait(PATIENCE_S)


@pytest.mark.parametrize("is_orderly", [True, False], ids=["farewell", "the target died"])
def test_it_removes_what_was_shared_only_if_its_target_died(tmp_path: Path, is_orderly: bool) -> None:
    """Also where it fails at once, for nobody listens."""
    shared = tmp_path / "shared"
    shared.mkdir()
    asked = configure(shared, address=str(shared / "nobody"))
    process = subprocess.Popen([sys.executable, "-m", "vllm_ssd.draft"], stdin=subprocess.PIPE)
    process.communicate(msgspec.json.encode(asked) + b"\n" + is_orderly * launch._FAREWELL, PATIENCE_S)
    assert process.returncode in (0, 1)  # it may hear of the one or of the other first
    assert shared.exists() == is_orderly


def test_it_finds_modules_where_its_target_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook that has put a folder on sys.path, with `pip --target` and with Bazel."""
    package = tmp_path / "only here" / "vllm_ssd" / "draft"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    tell = "import json, sys\nfrom pathlib import Path\nPath(__file__).with_name('path.json')"
    (package / "__main__.py").write_text(f"{tell}.write_text(json.dumps(sys.path))", encoding="utf-8")
    last, working = tmp_path / "last", tmp_path / "working"
    for folder in (last, working):
        folder.mkdir()
    monkeypatch.chdir(working)
    monkeypatch.setattr(sys, "path", ["", str(package.parents[1]), *sys.path, str(last)])
    process = DraftProcess(configure(tmp_path))
    assert process._process.wait(PATIENCE_S) == 0
    found = json.loads((package / "path.json").read_text(encoding="utf-8"))
    given = [entry for entry in dict.fromkeys(sys.path) if os.path.isdir(entry)]
    assert [entry for entry in found if entry in given] == given
    assert str(working) not in found


def test_it_runs_the_code_of_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that was found in the working directory, which is not searched as such."""
    monkeypatch.setattr(sys, "path", [""])
    assert launch._module_path() == str(Path(launch.__file__).parents[2])
