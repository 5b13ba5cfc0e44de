"""Messages over a real socket: they arrive as they were sent, and trouble shows as False or None."""

from __future__ import annotations

import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire import configure

from vllm_ssd.link import transport as transport_module
from vllm_ssd.link.messages import (
    Configure,
    Failed,
    Missed,
    MissedRow,
    Outcomes,
    Ready,
    Reset,
    RoundOutcome,
    Start,
    Stop,
    ToDraft,
    ToTarget,
)
from vllm_ssd.link.transport import Channel

TO_DRAFT = [
    Start(3, 7, b"\x01\0\0\0\xff\x7f\0\0"),
    Outcomes([RoundOutcome(0, 1, 2, [5, 6], [7, 8, 9], 3), RoundOutcome(1, 2, 0, [4], [], 0)], 4, 8),
    Missed([MissedRow(0, 1, 2, [5, 6], 3)]),
    Outcomes([], 0, 0),
    Stop(3, 7),
    Reset(),
]
TO_TARGET = [Ready(100, 32, 0.1, 0.01, 64), Failed("no such model: /x")]
WAIT_MS = 20_000


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[Channel, Channel]]:
    """(target's end, draft's end)"""
    address = str(tmp_path / "s")
    target = Channel(address, bind=True, receives=ToTarget)
    draft = Channel(address, bind=False, receives=ToDraft)
    yield target, draft
    draft.close()
    target.close()


@pytest.mark.parametrize("message", TO_DRAFT, ids=lambda m: type(m).__name__)
def test_to_the_draft(ends: tuple[Channel, Channel], message: Any) -> None:
    target, draft = ends
    assert draft.send(Ready(3, 4, 0.1, 0.01, 64))  # a message to the peer means that both are connected
    assert target.receive(WAIT_MS)
    assert target.send(message)
    assert draft.receive(WAIT_MS) == message


@pytest.mark.parametrize("message", TO_TARGET, ids=lambda m: type(m).__name__)
def test_to_the_target(ends: tuple[Channel, Channel], message: Any) -> None:
    target, draft = ends
    assert draft.send(message)
    assert target.receive(WAIT_MS) == message


def test_order_is_kept_and_nothing_more_comes(ends: tuple[Channel, Channel]) -> None:
    target, draft = ends
    draft.send(Ready(3, 4, 0.1, 0.01, 64))
    target.receive(WAIT_MS)
    for epoch in range(200):
        assert target.send(Stop(0, epoch))
    assert [draft.receive(WAIT_MS).epoch for _ in range(200)] == list(range(200))
    assert draft.receive() is None
    assert draft.receive(1) is None


@pytest.mark.parametrize(
    "raw", [msgspec.msgpack.encode(["Surprise", 1]), msgspec.msgpack.encode(["Stop", "x", 1]), b"\xc1", b""]
)
def test_an_unknown_message_is_an_error(tmp_path: Path, raw: bytes) -> None:
    address = str(tmp_path / "s")
    draft = Channel(address, bind=True, receives=ToDraft)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        stranger.connect(address)
        stranger.sendall(struct.pack("<I", len(raw)) + raw)
        with pytest.raises(msgspec.DecodeError):  # ValidationError is one
            draft.receive(WAIT_MS)
    draft.close()


def test_a_message_of_the_other_direction_is_an_error(ends: tuple[Channel, Channel]) -> None:
    target, draft = ends
    draft.send(Stop(0, 1))  # the wrong way round
    with pytest.raises(msgspec.ValidationError):
        target.receive(WAIT_MS)


def test_without_a_peer_sending_fails_at_once(tmp_path: Path) -> None:
    target = Channel(str(tmp_path / "s"), bind=True, receives=ToTarget)
    assert not target.send(Reset())
    assert target.receive() is None
    target.close()


def connected(folder: Path) -> tuple[Channel, Channel]:
    """(target's end, draft's end), which have heard of each other."""
    target = Channel(str(folder / "s"), bind=True, receives=ToTarget)
    draft = Channel(str(folder / "s"), bind=False, receives=ToDraft)
    draft.send(Ready(3, 4, 0.1, 0.01, 64))
    assert target.receive(WAIT_MS)
    return target, draft


def test_a_peer_that_reads_nothing_fills_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "MAX_UNSENT_BYTES", 1 << 20)
    target, draft = connected(tmp_path)
    messages = [Start(0, epoch, bytes(100_000)) for epoch in range(200)]
    taken = [message for message in messages if target.send(message)]
    assert 0 < len(taken) < len(messages)
    received: list[Any] = []
    for _ in range(10_000):  # what was taken does arrive
        target.flush()
        if (message := draft.receive()) is not None:
            received.append(message)
    assert received == taken
    assert target.send(Reset())
    assert draft.receive() == Reset()
    draft.close()
    target.close()


def test_a_message_that_is_longer_than_the_systems_buffers(tmp_path: Path) -> None:
    target, draft = connected(tmp_path)
    long = Start(0, 1, bytes(range(256)) * 20_000)
    assert target.send(long)
    assert draft.receive() is None
    assert target.flush()
    for _ in range(1_000):
        if (message := draft.receive()) is not None:
            break
        target.flush()
    assert message == long
    assert not target.flush()
    draft.close()
    target.close()


def test_messages_in_pieces_and_several_at_once(tmp_path: Path) -> None:
    draft = Channel(str(tmp_path / "s"), bind=True, receives=ToDraft)
    raw = [msgspec.msgpack.encode(message) for message in TO_DRAFT]
    stream = b"".join(struct.pack("<I", len(message)) + message for message in raw)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.connect(str(tmp_path / "s"))
        received = []
        for byte in stream:
            peer.sendall(bytes([byte]))
            if (message := draft.receive()) is not None:
                received.append(message)
        assert received == TO_DRAFT
        peer.sendall(stream + stream[:3])
        assert [draft.receive() for _ in TO_DRAFT] == TO_DRAFT
        assert draft.receive() is None
    with pytest.raises(EOFError):  # in the middle of a message
        draft.receive(WAIT_MS)
    draft.close()


def test_a_peer_that_went_away(tmp_path: Path) -> None:
    target, draft = connected(tmp_path)
    draft.send(Failed("this was all"))
    draft.close()
    assert target.receive() == Failed("this was all")
    with pytest.raises(EOFError):
        target.receive(WAIT_MS)
    assert not target.send(Reset())
    target.close()
    assert not target.send(Reset())
    assert target.receive(WAIT_MS) is None


def test_a_peer_that_went_away_is_noticed_by_sending(tmp_path: Path) -> None:
    target, draft = connected(tmp_path)
    draft.close()
    assert not target.send(Reset())
    target.close()


def test_the_longest_folder_has_room_for_a_drafts_socket() -> None:
    from vllm_ssd.placement import MAX_FOLDER_BYTES

    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, (MAX_FOLDER_BYTES - len(outer) - 1) * "x")
        (folder / "draft-999").mkdir(parents=True)
        Channel(str(folder / "draft-999" / "socket"), bind=True, receives=ToTarget).close()


@settings(max_examples=200)
@given(
    rows=st.lists(
        st.builds(
            RoundOutcome,
            st.integers(0, 1000),
            st.integers(1, 2**40),
            st.integers(0, 2**31),
            st.lists(st.integers(0, 2**31), min_size=1, max_size=17),
            st.lists(st.integers(0, 2**31), max_size=16),
            st.integers(0, 16),
        ),
        max_size=5,
    )
)
def test_encoding_keeps_every_field(rows: list[RoundOutcome]) -> None:
    message = Outcomes(rows, 4, 8)
    raw = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.Decoder(ToDraft).decode(raw) == message


def test_configure_travels_as_one_json_line() -> None:
    asked = configure(
        "/x", engine_args={"dtype": "float32", "quantization": None}, fanout=[1, 2], cores=[3, 4]
    )
    line = msgspec.json.encode(asked)
    assert b"\n" not in line
    assert msgspec.json.decode(line, type=Configure) == asked
