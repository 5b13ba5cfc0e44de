"""How a draft process ends: asked, killed, or by itself when its target has died."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from wire import configure

from vllm_ssd.link.counters import DRAFT_FIELDS, Counters
from vllm_ssd.link.memory import SharedMemory
from vllm_ssd.link.messages import Configure, Descriptors, Failed, Ready, ToTarget
from vllm_ssd.link.outcome_cache import OutcomeCache
from vllm_ssd.link.transport import SocketChannel
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


DRAFT = """
import sys, threading
from types import SimpleNamespace
from vllm_ssd.draft import __main__ as draft
from vllm_ssd.link.messages import Ready

def build_server(configure, inherited, channel):
    channel.send(Ready(10, 32, 0.001, 0.0001, 64))
    return SimpleNamespace(run=threading.Event().wait if sys.argv[1] == "deaf" else lambda: listen(channel))

def listen(channel):
    try:
        while True:
            channel.receive(1000)
    except EOFError:
        pass

draft._build_server = build_server
draft.main()
"""


@contextmanager
def linked(
    code: str, *arguments: str, **changes: Any
) -> Iterator[tuple[subprocess.Popen[bytes], SocketChannel]]:
    """A draft process that runs this code, and the target's end."""
    ours, drafts = socket.socketpair()
    cache, counters = OutcomeCache(4, 8, 3, 12), Counters(DRAFT_FIELDS)
    inherited = Descriptors(
        socket=drafts.fileno(),
        counters=counters.descriptor,
        outcome_cache=cache.descriptor,
        draft_probs=None,
    )
    channel = SocketChannel(ours, receives=ToTarget)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        pass_fds=inherited.all(),
    )
    drafts.close()
    assert process.stdin is not None
    try:
        asked = configure(inherited=inherited, cores=[min(os.sched_getaffinity(0))], **changes)
        process.stdin.write(msgspec.json.encode(asked) + b"\n")
        process.stdin.flush()
        yield process, channel
    finally:
        process.kill()
        process.communicate()
        channel.close()


@pytest.mark.parametrize("kind", ["deaf", "listening"])
def test_it_ends_when_its_target_has_died(kind: str) -> None:
    """By its standard input, in whatever it is busy; or by the socket, whoever else holds that input."""
    with linked(DRAFT, kind) as (process, channel):
        assert isinstance(channel.receive(1000 * PATIENCE_S), Ready)
        assert process.poll() is None
        if kind == "deaf":
            assert process.stdin is not None
            process.stdin.close()
        else:
            channel.close()
        assert process.wait(PATIENCE_S) == 0


def test_one_that_cannot_serve_says_why() -> None:
    """And ends, though its standard input is open."""
    code = "from vllm_ssd.draft.__main__ import main; main()"
    with linked(code, protocol=0) as (process, channel):
        message = channel.receive(1000 * PATIENCE_S)
        assert isinstance(message, Failed)
        assert "target speaks protocol 0" in message.reason
        assert process.wait(PATIENCE_S) == 1
        with pytest.raises(EOFError):
            channel.receive(1000 * PATIENCE_S)


def told_by(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, asked: Configure) -> Any:
    """What a draft process makes of `code`, an expression, in a package of our own."""
    package = folder / "only here" / "vllm_ssd" / "draft"
    package.mkdir(parents=True)
    for part in (package, package.parent):
        (part / "__init__.py").touch()
    tell = "import json, os, sys\nfrom pathlib import Path\nPath(__file__).with_name('told.json')"
    (package / "__main__.py").write_text(f"{tell}.write_text(json.dumps({code}))", encoding="utf-8")
    monkeypatch.setattr(sys, "path", ["", str(package.parents[1]), *sys.path, str(folder / "last")])
    process = DraftProcess(asked)
    assert process._process.wait(PATIENCE_S) == 0
    return json.loads((package / "told.json").read_text(encoding="utf-8"))


def test_it_inherits_what_is_named_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, kept = [SharedMemory(8) for _ in range(3)], SharedMemory(8)
    inherited = Descriptors(
        socket=given[0].descriptor,
        counters=given[1].descriptor,
        outcome_cache=given[2].descriptor,
        draft_probs=None,
    )
    files = "[entry.stat().st_ino for entry in os.scandir('/proc/self/fd') if os.path.lexists(entry)]"
    found = told_by(files, tmp_path, monkeypatch, configure(inherited=inherited))
    assert {os.fstat(memory.descriptor).st_ino for memory in given} <= set(found)
    assert os.fstat(kept.descriptor).st_ino not in found


def test_it_finds_modules_where_its_target_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook that has put a folder on sys.path, with `pip --target` and with Bazel."""
    last, working = tmp_path / "last", tmp_path / "working"
    for folder in (last, working):
        folder.mkdir()
    monkeypatch.chdir(working)
    found = told_by("sys.path", tmp_path, monkeypatch, configure())
    given = [entry for entry in dict.fromkeys(sys.path) if os.path.isdir(entry)]
    assert [entry for entry in found if entry in given] == given
    assert str(working) not in found


def test_it_runs_the_code_of_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where that was found in the working directory, which is not searched as such."""
    monkeypatch.setattr(sys, "path", [""])
    assert launch._module_path() == str(Path(launch.__file__).parents[2])
