"""The VMM's end of vhost-user: a device that is another process, asked one thing after the other.

Source: QEMU's documentation, docs/interop/vhost-user.

What the other process says is foreign: an answer that does not come in time, is none, or is not the one to
what was asked ends all speaking to it.
"""

from __future__ import annotations

import logging
import socket
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

from swsnp.abi.vhost_user import (
    F_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    FLAG_VERSION,
    MOST_REGIONS,
    MemoryRegion,
    MemoryTableHead,
    ProtocolFeature,
    Request,
    VhostHeader,
    VringAddress,
    VringState,
)
from swsnp.abi.virtio import VIRTIO_F_VERSION_1
from swsnp.errors import HostError, InputError
from swsnp.vmm.devices.host_peers import connected

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from swsnp.vmm.devices.virtqueue import Virtqueue

__all__ = ["VhostUser", "connect_to_daemon"]

_logger = logging.getLogger(__name__)
_ANSWER_S: Final = 10.0
"""For one request, whose answer is some bytes; what the daemon does for the guest may come before it."""
_U64: Final = struct.Struct("<Q")
_REMEDY: Final = "remedy: see what the daemon says, start it again, and then the guest"


def connect_to_daemon(path: Path, *, answer_s: float = _ANSWER_S) -> VhostUser:
    """Connect to a daemon that listens at a path, and agree with it on the protocol.

    Raises:
        InputError: nobody listens there.
        HostError: as `VhostUser`.
    """
    try:
        peer = connected(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be connected to: {error.strerror or error}; remedy: start the daemon that shall "
            f"listen there, such as virtiofsd --socket-path={path}"
        ) from None
    return VhostUser(peer, str(path), answer_s=answer_s)


class VhostUser:
    """A connection to such a process; a context manager that ends it.

    Not for several threads at once. After an error every further request raises the same one.

    Args:
        peer: connected; it becomes this object's.
        name: how the daemon is called in errors.
        answer_s: how long an answer may take.
        clock: what that is measured with.

    Raises:
        HostError: it does not answer, answers wrongly, or lacks a feature. The connection is closed then.

    Attributes:
        features: those of the device that the daemon offers, of its kind and of its queues.
    """

    def __init__(
        self,
        peer: socket.socket,
        name: str,
        *,
        answer_s: float = _ANSWER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peer, self._name, self._answer_s, self._clock = peer, name, answer_s, clock
        self._fault: str | None = None
        try:
            self.features: Final = self._agree()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The daemon is told nothing more. Again is allowed."""
        self._peer.close()
        self._fault = self._fault or f"{self._name}: the connection was closed"

    def fileno(self) -> int:
        """For who waits until the daemon is gone; -1 when it is closed."""
        return self._peer.fileno()

    def gone(self) -> HostError:
        """The error of a daemon that has closed the connection, unless there was one before."""
        self._fault = self._fault or f"{self._name}: the daemon closed the connection; {_REMEDY}"
        return HostError(self._fault)

    # What the device needs

    def begin(self, features: int, memory: Sequence[tuple[int, int, int]]) -> None:
        """Before the queues.

        Args:
            features: what the driver has accepted.
            memory: what the daemon may use: GPA and bytes of each range, and the descriptor of a file that
                holds it and nothing else.

        Raises:
            HostError: as the class; or there is more memory than fits into a table.
        """
        if len(memory) > MOST_REGIONS:
            raise HostError(
                f"{self._name}: got {len(memory)} ranges of memory, wanted at most {MOST_REGIONS}"
            )
        self._tell(Request.SET_FEATURES, _U64.pack(features | F_PROTOCOL_FEATURES))
        regions = (
            MemoryRegion(guest_phys_addr=gpa, memory_size=size, userspace_addr=gpa) for gpa, size, _ in memory
        )
        table = bytes(MemoryTableHead(num_regions=len(memory))) + b"".join(map(bytes, regions))
        self._tell(Request.SET_MEM_TABLE, table, [fd for *_, fd in memory])

    def start_queue(self, number: int, queue: Virtqueue, *, kick: int, call: int) -> None:
        """Let the daemon serve a queue, from its beginning.

        Args:
            number: which one.
            queue: where it lies.
            kick: eventfd that tells the daemon of requests.
            call: eventfd by which the daemon tells of answers.

        Raises:
            HostError: as the class.
        """
        addresses = VringAddress(
            index=number, descriptor=queue.descriptors, used=queue.used, available=queue.available
        )
        self._tell(Request.SET_VRING_NUM, bytes(VringState(index=number, num=queue.size)))
        self._tell(Request.SET_VRING_BASE, bytes(VringState(index=number)))
        self._tell(Request.SET_VRING_ADDR, bytes(addresses))
        # a daemon may begin with the kick's descriptor, and has to know then whom to call
        self._tell(Request.SET_VRING_CALL, _U64.pack(number), [call])
        self._tell(Request.SET_VRING_KICK, _U64.pack(number), [kick])
        self._tell(Request.SET_VRING_ENABLE, bytes(VringState(index=number, num=1)))

    def stop_queue(self, number: int) -> None:
        """The daemon comes to an end with a queue: it touches its memory no more.

        Raises:
            HostError: as the class.
        """
        state = VringState(index=number)
        found = VringState.parse(self._ask(Request.GET_VRING_BASE, VringState.SIZE, bytes(state)))
        if found.index != number:
            raise self._failed(Request.GET_VRING_BASE, f"got queue {found.index}, wanted {number}")

    # The protocol

    def _agree(self) -> int:
        (features,) = _U64.unpack(self._ask(Request.GET_FEATURES, _U64.size))
        for name, bit in (
            ("VIRTIO_F_VERSION_1", VIRTIO_F_VERSION_1),
            ("VHOST_USER_F_PROTOCOL_FEATURES", F_PROTOCOL_FEATURES),
        ):
            if not features & bit:
                raise self._failed(Request.GET_FEATURES, f"got {features:#x}, wanted {name}, {bit:#x}")
        (protocol,) = _U64.unpack(self._ask(Request.GET_PROTOCOL_FEATURES, _U64.size))
        wanted = ProtocolFeature.REPLY_ACK
        if not protocol & wanted:
            raise self._failed(
                Request.GET_PROTOCOL_FEATURES,
                f"got {protocol:#x}, wanted VHOST_USER_PROTOCOL_F_REPLY_ACK, {wanted:#x}",
            )
        self._send(Request.SET_PROTOCOL_FEATURES, FLAG_VERSION, _U64.pack(wanted))
        # some daemons acknowledge from SET_FEATURES on only, which has the bit of protocol features in it
        self._send(Request.SET_OWNER, FLAG_VERSION)
        return int(features & ~F_PROTOCOL_FEATURES)

    def _tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request whose acknowledgement says whether it could be done."""
        self._send(request, FLAG_VERSION | FLAG_NEED_REPLY, payload, fds)
        (status,) = _U64.unpack(self._answer(request, _U64.size))
        if status:
            raise self._failed(request, f"the daemon could not do it: got status {status:#x}, wanted 0")

    def _ask(self, request: Request, size: int, payload: bytes = b"") -> bytes:
        """A request with an answer of its own, of `size` bytes."""
        self._send(request, FLAG_VERSION, payload)
        return self._answer(request, size)

    def _send(self, request: Request, flags: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        if self._fault is not None:
            raise HostError(self._fault)
        message = bytes(VhostHeader(request=request, flags=flags, size=len(payload))) + payload
        self._peer.settimeout(self._answer_s)
        try:
            sent = socket.send_fds(self._peer, [message], list(fds))
        except TimeoutError:
            raise self._failed(request, f"not taken within {self._answer_s:g} s") from None
        except OSError as error:
            raise self._failed(request, f"not taken: {error.strerror or error}") from None
        if sent != len(message):
            raise self._failed(request, f"the daemon took {sent} bytes, wanted {len(message)}")
        _logger.debug("%s: %s, %d bytes, %d descriptors", self._name, request.name, len(payload), len(fds))

    def _answer(self, request: Request, size: int) -> bytes:
        """The payload of an answer, of exactly `size` bytes."""
        until = self._clock() + self._answer_s
        head = VhostHeader.parse(self._receive(request, VhostHeader.SIZE, until))
        for field, got, wanted in (
            ("request", head.request, int(request)),
            ("flags", head.flags, FLAG_VERSION | FLAG_REPLY),
            ("size", head.size, size),
        ):
            if got != wanted:
                raise self._failed(request, f"answer's {field}: got {got:#x}, wanted {wanted:#x}")
        return self._receive(request, size, until)

    def _receive(self, request: Request, size: int, until: float) -> bytes:
        """So many bytes; descriptors that a daemon adds to them are not taken."""
        found = b""
        while len(found) < size:
            if (left := until - self._clock()) <= 0:
                raise self._failed(request, f"no answer within {self._answer_s:g} s")
            self._peer.settimeout(left)
            try:
                piece = self._peer.recv(size - len(found))
            except TimeoutError:
                continue
            except OSError as error:
                raise self._failed(request, f"no answer: {error.strerror or error}") from None
            if not piece:
                raise self._failed(request, "the daemon closed the connection")
            found += piece
        return found

    def _failed(self, request: Request, what: str) -> HostError:
        """The error of this request, and of all that might follow; the daemon is hung up on."""
        self._fault = f"{self._name}: {request.name}: {what}; {_REMEDY}"
        with suppress(OSError):  # it has gone itself
            self._peer.shutdown(socket.SHUT_RDWR)
        return HostError(self._fault)
