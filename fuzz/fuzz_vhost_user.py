"""vhost-user daemons: whatever one answers, the VMM goes on or says what was wrong, and waits no longer."""

from __future__ import annotations

import os
import socket
import struct

from swsnp.abi.vhost_user import FLAG_REPLY, FLAG_VERSION, Request, VhostHeader, VringState
from swsnp.errors import HostError
from swsnp.hardware.memory import BusError
from swsnp.vmm.devices.vhost_user import VhostUser
from swsnp.vmm.devices.virtqueue import Virtqueue

__all__ = ["one", "seeds"]

_STEPS = (
    Request.SET_FEATURES,
    Request.SET_MEM_TABLE,
    Request.SET_VRING_NUM,
    Request.SET_VRING_BASE,
    Request.SET_VRING_ADDR,
    Request.SET_VRING_CALL,
    Request.SET_VRING_KICK,
    Request.SET_VRING_ENABLE,
)


class _NoMemory:
    """Nobody looks at the queues here."""

    def read_shared(self, gpa: int, size: int) -> bytes:
        raise BusError(f"{gpa:#x}")

    def write_shared(self, gpa: int, data: bytes) -> None:
        raise BusError(f"{gpa:#x}")


def _answer(request: Request, payload: bytes) -> bytes:
    header = VhostHeader(request=request, flags=FLAG_VERSION | FLAG_REPLY, size=len(payload))
    return bytes(header) + payload


def seeds() -> list[bytes]:
    """A good daemon; one that lacks a feature, that cannot, that means another queue, that is cut short."""
    features, protocol = (
        _answer(Request.GET_FEATURES, struct.pack("<Q", 1 << 32 | 1 << 30)),
        _answer(Request.GET_PROTOCOL_FEATURES, struct.pack("<Q", 8)),
    )
    done = {each: _answer(each, bytes(8)) for each in _STEPS}
    good = features + protocol + b"".join(done.values())
    return [
        good + _answer(Request.GET_VRING_BASE, bytes(VringState(num=7))),
        good + _answer(Request.GET_VRING_BASE, bytes(VringState(index=1))),
        good[:-8] + b"\1" + bytes(7),
        features + _answer(Request.GET_PROTOCOL_FEATURES, bytes(8)),
        _answer(Request.GET_FEATURES, bytes(8)),
        features[:11],
        features + protocol + _answer(Request.SET_FEATURES, bytes(4)),
    ]


def one(data: bytes) -> object:
    """The bytes are all that the daemon ever says; then it says no more."""
    ours, theirs = socket.socketpair()
    event = os.eventfd(0)
    reached = 0
    with theirs:
        theirs.setblocking(False)
        theirs.send(data[:4096])
        theirs.shutdown(socket.SHUT_WR)
        try:
            with VhostUser(ours, "daemon") as daemon:
                reached = 1
                daemon.begin(1 << 32, [(0, 4096, event)])
                reached = 2
                daemon.start_queue(0, Virtqueue(_NoMemory()), kick=event, call=event)
                reached = 3
                daemon.stop_queue(0)
                reached = 4
        except HostError as error:
            return reached, str(error).split(":")[1], "status" in str(error), "closed" in str(error)
        finally:
            os.close(event)
            assert ours.fileno() == -1
    return reached
