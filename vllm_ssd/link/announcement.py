"""How an engine is found by other processes of its user: its frontends, and engines that look for free cores.

The target's worker listens at an abstract Unix socket (Linux: a name in no file system, which vanishes with
the process) and hands whoever asks the descriptors of its counters. Pure.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import threading
import uuid
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "vllm-ssd-"
_SOCKETS = Path("/proc/net/unix")  # all of this network namespace; an abstract name begins with @
_CREDENTIALS = struct.Struct("iII")  # process, user, group
_PATIENCE_S = 1.0  # of one who asks
_PAUSE_S = 1.0  # of the engine, when the system has no descriptors left
_MOST_BYTES = 1 << 16  # names of cores
_MOST_DESCRIPTORS = 8


def new_engine_id() -> str:
    """A name that no engine has yet."""
    return uuid.uuid4().hex[:12]


class Announcement:
    """Answers whoever asks for an engine, on a thread of its own, as long as the process lives.

    Args:
        engine_id: the engine's.
        cores: what the engine is bound to.
        descriptors: what those who ask shall have.

    Raises:
        OSError: if an engine of this name is there already, or the system allows no such socket.
    """

    def __init__(self, engine_id: str, cores: Iterable[int], descriptors: Iterable[int]) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(_address(engine_id))
        self._listener.listen()
        answer = f"cores {','.join(map(str, sorted(cores)))}".encode()
        copies = [os.dup(descriptor) for descriptor in descriptors]
        arguments = (self._listener, answer, copies)
        threading.Thread(target=_answer_all, args=arguments, daemon=True, name="ssd-announcement").start()

    def close(self) -> None:
        """Nobody finds the engine any more."""
        with suppress(OSError):  # it is closed already
            self._listener.shutdown(socket.SHUT_RDWR)  # which ends the thread


@contextmanager
def ask(engine_id: str) -> Iterator[tuple[set[int], list[int]]]:
    """The cores that an engine is bound to, and the descriptors it shows, which are closed in the end.

    Raises:
        OSError: if there is no such engine of this user, or it does not answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.setblocking(False)
        connection.connect(_address(engine_id))  # at once or not at all
        if not _is_ours(connection):
            raise PermissionError(f"engine {engine_id} belongs to another user")
        connection.settimeout(_PATIENCE_S)
        # Not by `socket.recv_fds`, which forgets its flags, and with them to keep children from inheriting.
        room = socket.CMSG_LEN(_MOST_DESCRIPTORS * array("i").itemsize)
        answer, ancillary, _, _ = connection.recvmsg(_MOST_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    if not answer:
        raise ConnectionError(f"engine {engine_id} does not answer")
    descriptors = [descriptor for _, _, raw in ancillary for descriptor in array("i", raw)]
    try:
        yield set(map(int, re.findall(rb"\d+", answer))), descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def cores_of_others(own: str) -> set[int]:
    """The cores that this user's other living engines are bound to.

    Args:
        own: this engine's name.
    """
    cores: set[int] = set()
    for engine_id in _announced() - {own}:
        with suppress(OSError), ask(engine_id) as (found, _):  # or it has gone, or is another user's
            cores |= found
    return cores


def _announced() -> set[str]:
    """The engines that are there, also other users'."""
    try:
        sockets = _SOCKETS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return set(re.findall(rf"@{_PREFIX}(\w+)$", sockets, re.MULTILINE))


def _address(engine_id: str) -> str:
    return f"\0{_PREFIX}{engine_id}"


def _answer_all(listener: socket.socket, answer: bytes, descriptors: list[int]) -> None:
    pause = threading.Event()
    with listener:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if error.errno == errno.EINVAL:  # it was shut down
                    break
                pause.wait(_PAUSE_S)
                continue
            with connection, suppress(OSError):  # who asked may have gone
                if _is_ours(connection):
                    connection.setblocking(False)
                    socket.send_fds(connection, [answer], descriptors)
    for descriptor in descriptors:
        os.close(descriptor)


def _is_ours(connection: socket.socket) -> bool:
    """Whether the peer is this user's."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(raw)[1] == os.geteuid())
