"""How messages travel between the target's worker and the draft process: frames over a Unix socket.

Messages of one direction arrive in order or not at all: a sender that finds the queue full is told so and
starts its requests anew under fresh epochs.

A plain socket and not ZeroMQ, whose threads need a turn on cores that target and draft keep busy: an outcome
then reaches the draft up to some milliseconds late, and its drafts with it.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from typing import Any

import msgspec

from vllm_ssd.link.messages import ToDraft, ToTarget

MAX_UNSENT_BYTES = 64 << 20  # beside what the system holds; a draft that far behind is as good as gone
_READ_BYTES = 1 << 16
_LENGTH = struct.Struct("<I")  # in bytes, before each message


class Channel:
    """One end of the connection; `ToDraft` flows one way and `ToTarget` the other.

    Args:
        address: path of a Unix socket.
        bind: True at the target's end, which is there first and takes one peer.
        receives: the union of message types that this end accepts.

    Raises:
        OSError: if nobody listens at the address, or (with `bind`) it cannot be had.
    """

    def __init__(self, address: str, *, bind: bool, receives: Any) -> None:
        self._listener: socket.socket | None = None
        self._peer: socket.socket | None = None
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if bind:
            end.bind(address)
            end.listen(1)
            self._listener = end
        else:
            end.connect(address)
            self._peer = end
        end.setblocking(False)
        self._hung_up = False
        self._unsent = bytearray()
        self._unread = bytearray()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(receives)

    @property
    def has_hung_up(self) -> bool:
        """Whether the peer has gone, as far as sending and receiving have shown."""
        return self._hung_up

    def send(self, message: ToDraft | ToTarget) -> bool:
        """Queue a message without waiting. False: nobody will read it, or the peer is too far behind."""
        self.flush()
        if self._connected() is None or self._hung_up or len(self._unsent) > MAX_UNSENT_BYTES:
            return False
        encoded = self._encoder.encode(message)
        self._unsent += _LENGTH.pack(len(encoded)) + encoded
        self.flush()
        return not self._hung_up

    def flush(self) -> bool:
        """Send what there was no room for yet, such as the rest of a long prompt; True if some was taken."""
        peer, has_taken = self._connected(), False
        try:
            while self._unsent and peer is not None:
                del self._unsent[: peer.send(self._unsent)]
                has_taken = True
        except ConnectionError:
            self._hung_up = True
        except OSError:  # no room for more just now
            pass
        return has_taken

    def receive(self, timeout_ms: int = 0) -> Any | None:
        """The next message, or None when none came within `timeout_ms`.

        Raises:
            msgspec.DecodeError: on a message this end does not know.
            EOFError: when the peer has hung up, and all that it sent has been received.
        """
        message = self._read()
        deadline = time.monotonic() + timeout_ms / 1000
        while message is None and (left := deadline - time.monotonic()) > 0:
            end = self._peer or self._listener
            if end is None:  # closed
                break
            news = select.poll()
            news.register(end, select.POLLIN)
            news.poll(1000 * left)
            message = self._read()
        return message

    def close(self) -> None:
        """Hang up. The peer can still receive what it was sent, less what had to wait."""
        for end in (self._listener, self._peer):
            if end is not None:
                end.close()
        self._listener = self._peer = None

    def _connected(self) -> socket.socket | None:
        """The peer, as soon as there is one."""
        if self._peer is None and self._listener is not None:
            try:
                self._peer, _ = self._listener.accept()
            except OSError:  # nobody yet, or no descriptor is free
                return None
            self._peer.setblocking(False)
            self._listener.close()
            self._listener = None
        return self._peer

    def _read(self) -> Any | None:
        peer = self._connected()
        if peer is None:
            return None
        try:
            read = peer.recv(_READ_BYTES)
            while read:
                self._unread += read
                read = peer.recv(_READ_BYTES)
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
