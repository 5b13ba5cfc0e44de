"""How an engine is found: by this user's processes alone, as long as it lives, and without a file."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_ssd.link import announcement as module
from vllm_ssd.link.announcement import Announcement, ask, cores_of_others, new_engine_id
from vllm_ssd.link.counters import Counters

FIELDS = ("a", "b")
ANNOUNCE_AND_WAIT = """
import sys
from vllm_ssd.link.announcement import Announcement
announcement = Announcement(sys.argv[1], [int(core) for core in sys.argv[2:]], [])
print("made", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_engine(*cores: int) -> Iterator[str]:
    """The name of an engine in a process of its own, which is killed at the end."""
    name = new_engine_id()
    process = subprocess.Popen(
        [sys.executable, "-c", ANNOUNCE_AND_WAIT, name, *map(str, cores)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"made\n"
        yield name
    finally:
        process.kill()
        process.communicate()


@contextmanager
def announced(cores: list[int], descriptors: list[int]) -> Iterator[str]:
    name = new_engine_id()
    announcement = Announcement(name, cores, descriptors)
    try:
        yield name
    finally:
        announcement.close()
        announcement.close()  # nothing more to do


@pytest.fixture(autouse=True)
def no_other_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this machine that were there before."""
    before = module._announced()
    stock = module._announced
    monkeypatch.setattr(module, "_announced", lambda: stock() - before)


def cores_of(name: str) -> set[int]:
    with ask(name) as (cores, _):
        return cores


def test_names_differ() -> None:
    assert new_engine_id() != new_engine_id()


def test_what_is_asked_for_is_the_engines_own_memory() -> None:
    counters = Counters(FIELDS)
    with announced([2, 0], [counters.descriptor]) as name:
        for _ in range(3):  # any number of frontends
            with ask(name) as (cores, (descriptor,)):
                assert cores == {0, 2}
                assert not os.get_inheritable(descriptor)
                counters.add("a")
                assert Counters(FIELDS, os.dup(descriptor)).as_dict() == counters.as_dict()


def test_an_engine_that_is_not_there() -> None:
    with pytest.raises(OSError, match="refused"):
        cores_of(new_engine_id())
    with announced([], []) as name, ask(name) as answer:
        assert answer == (set(), [])
    with pytest.raises(OSError, match="refused"):
        cores_of(name)


def test_a_killed_engine_leaves_no_name() -> None:
    with another_engine(3) as name:
        assert module._announced() == {name}
    assert module._announced() == set()


def test_nobody_takes_the_name_of_an_engine_that_lives() -> None:
    with announced([], []) as name, pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        Announcement(name, [], [])


def test_only_its_user_finds_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does it answer others, nor does anybody believe what another user's process says."""
    with announced([1], [1]) as name:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(PermissionError, match="another user"):
            cores_of(name)
        assert cores_of_others("mine") == set()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(module._address(name))
            assert socket.recv_fds(stranger, 100, 10)[:2] == (b"", [])
        monkeypatch.undo()
        assert cores_of(name) == {1}


def test_one_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a stopped one."""
    monkeypatch.setattr(module, "_PATIENCE_S", 0.01)
    name = new_engine_id()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(module._address(name))
        silent.listen(0)
        with pytest.raises(TimeoutError):
            cores_of(name)
        assert cores_of_others("mine") == set()
        with pytest.raises(BlockingIOError):  # nor one whom too many ask: its queue is full now
            cores_of(name)


def test_one_who_asks_and_goes_harms_nobody() -> None:
    with announced([5], []) as name:
        for _ in range(3):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as hasty:
                hasty.connect(module._address(name))
        assert cores_of(name) == {5}


def test_the_system_has_no_descriptors_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked then is answered later."""
    failures = iter([OSError(errno.EMFILE, "too many open files")] * 3)
    stock = socket.socket.accept

    def accept(listener: socket.socket) -> object:
        if error := next(failures, None):
            raise error
        return stock(listener)

    monkeypatch.setattr(module, "_PAUSE_S", 0.0)
    monkeypatch.setattr(socket.socket, "accept", accept)
    with announced([5], []) as name:
        assert cores_of(name) == {5}
        assert next(failures, None) is None


def test_the_cores_of_other_engines() -> None:
    """Of those that live, in this process or another."""
    own = new_engine_id()
    assert cores_of_others(own) == set()
    with another_engine(3, 12), another_engine(), announced([1], [0, 1]) as first:
        mine = Announcement(own, [7], [])
        assert cores_of_others(own) == {1, 3, 12}
        assert cores_of_others(first) == {3, 7, 12}
        mine.close()
    assert cores_of_others(own) == set()


def test_asking_for_cores_leaves_no_descriptors() -> None:
    with announced([1], [0, 1]):
        count = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            assert cores_of_others("mine") == {1}
        assert len(os.listdir("/proc/self/fd")) <= count + 1  # one that is just being answered


def test_a_system_that_does_not_list_its_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SOCKETS", tmp_path / "none")
    with announced([1], []):
        assert cores_of_others("mine") == set()
