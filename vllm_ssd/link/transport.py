"""How messages travel between the target's worker and the draft process: frames over a socket.

Messages of one direction arrive in order or not at all: a sender that finds the queue full is told so and
starts its requests anew under fresh epochs. Both halves ask for a `Channel`, whatever is behind it.

A plain socket and not ZeroMQ, whose threads need a turn on cores that target and draft keep busy: an outcome
then reaches the draft up to some milliseconds late, and its drafts with it.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from typing import Any, Protocol

import msgspec

from vllm_ssd.link.messages import ToDraft, ToTarget

MAX_UNSENT_BYTES = 64 << 20  # beside what the system holds; a draft that far behind is as good as gone
_READ_BYTES = 1 << 16
_LENGTH = struct.Struct("<I")  # in bytes, before each message


class Channel(Protocol):
    """One end of the connection; `ToDraft` flows one way and `ToTarget` the other."""

    @property
    def has_hung_up(self) -> bool:
        """Whether the peer has gone, as far as sending and receiving have shown."""
        ...

    def send(self, message: ToDraft | ToTarget) -> bool:
        """Queue a message without waiting. False: nobody will read it, or the peer is too far behind."""
        ...

    def flush(self) -> bool:
        """Send what there was no room for yet, such as the rest of a long prompt; True if some was taken."""
        ...

    def receive(self, timeout_ms: int = 0) -> Any | None:
        """The next message, or None when none came within `timeout_ms`.

        Raises:
            msgspec.DecodeError: on a message this end does not know.
            EOFError: when the peer has hung up, and all that it sent has been received.
        """
        ...

    def close(self) -> None:
        """Hang up. The peer can still receive what it was sent, less what had to wait."""
        ...


class SocketChannel:
    """A `Channel` over a connected stream socket.

    Args:
        end: of the connection; it is closed with this channel.
        receives: the union of message types that this end accepts.
    """

    def __init__(self, end: socket.socket, *, receives: Any) -> None:
        end.setblocking(False)
        self._socket: socket.socket | None = end
        self._hung_up = False
        self._unsent = bytearray()
        self._unread = bytearray()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(receives)

    @property
    def has_hung_up(self) -> bool:
        """See `Channel.has_hung_up`."""
        return self._hung_up

    def send(self, message: ToDraft | ToTarget) -> bool:
        """See `Channel.send`."""
        self.flush()
        if self._socket is None or self._hung_up or len(self._unsent) > MAX_UNSENT_BYTES:
            return False
        encoded = self._encoder.encode(message)
        self._unsent += _LENGTH.pack(len(encoded)) + encoded
        self.flush()
        return not self._hung_up

    def flush(self) -> bool:
        """See `Channel.flush`."""
        has_taken = False
        try:
            while self._unsent and self._socket is not None:
                del self._unsent[: self._socket.send(self._unsent)]
                has_taken = True
        except ConnectionError:
            self._hung_up = True
        except OSError:  # no room for more just now
            pass
        return has_taken

    def receive(self, timeout_ms: int = 0) -> Any | None:
        """See `Channel.receive`."""
        message = self._read()
        deadline = time.monotonic() + timeout_ms / 1000
        while message is None and (left := deadline - time.monotonic()) > 0:
            if self._socket is None:
                break
            news = select.poll()
            news.register(self._socket, select.POLLIN)
            news.poll(1000 * left)
            message = self._read()
        return message

    def close(self) -> None:
        """See `Channel.close`."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def _read(self) -> Any | None:
        if self._socket is None:
            return None
        try:
            read = self._socket.recv(_READ_BYTES)
            while read:
                self._unread += read
                read = self._socket.recv(_READ_BYTES)
            self._hung_up = True
        except ConnectionError:
            self._hung_up = True
        except OSError:  # that was all for now
            pass
        encoded = self._next_frame()
        if encoded is not None:
            return self._decoder.decode(encoded)
        if self._hung_up:
            raise EOFError("the other process has hung up")
        return None

    def _next_frame(self) -> bytearray | None:
        if len(self._unread) < _LENGTH.size:
            return None
        end = _LENGTH.size + _LENGTH.unpack_from(self._unread)[0]
        if len(self._unread) < end:
            return None
        encoded = self._unread[_LENGTH.size : end]
        del self._unread[:end]
        return encoded
