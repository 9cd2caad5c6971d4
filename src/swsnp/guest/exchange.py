"""One guest request from the sealed page to the opened response. Source: Linux, snp_send_guest_request."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, TypeAlias

from swsnp.abi.ghcb import ErrorWord, ExitCode, VmmError
from swsnp.abi.sev_guest import NO_FW_CALL
from swsnp.abi.snp_message import MESSAGE_PAGE
from swsnp.guest.channel import ChannelState, CounterExhausted, KeyWiped, ResponseRefused
from swsnp.guest.ghcb_page import es_result

if TYPE_CHECKING:
    from collections.abc import Generator

    from swsnp.guest.boot import GuestLayout
    from swsnp.guest.channel import Channel
    from swsnp.guest.cpu import GuestCpu
    from swsnp.guest.generation import DriverGeneration
    from swsnp.guest.ghcb_page import GhcbPage

__all__ = [
    "BUSY",
    "INVALID_LEN",
    "MAX_RETRY_S",
    "RETRY_DELAY_S",
    "Answered",
    "Clock",
    "Exchange",
    "Failed",
    "Message",
    "Outcome",
]

RETRY_DELAY_S: Final = 2
"""SNP_REQ_RETRY_DELAY."""
MAX_RETRY_S: Final = 60
"""SNP_REQ_MAX_RETRY_DURATION."""
BUSY: Final = int(ErrorWord.of(vmm_error=VmmError.BUSY))
INVALID_LEN: Final = int(ErrorWord.of(vmm_error=VmmError.INVALID_LEN))
_PLAIN: Final = int(ExitCode.GUEST_REQUEST)
_EXTENDED: Final = int(ExitCode.EXT_GUEST_REQUEST)
_ZERO_PAGE: Final = bytes(MESSAGE_PAGE)


class Clock(Protocol):
    """Time as the guest sees it; the module `time` is one."""

    def monotonic(self) -> float:
        """Seconds since some start."""

    def sleep(self, seconds: float, /) -> None:
        """Let time pass; may return early, as after a fatal signal."""


class Message(NamedTuple):
    """What the driver wants sent.

    Attributes:
        msg_type: an odd message type.
        msg_version: the caller's byte.
        payload: plaintext.
        limit: room for the response's payload and tag, in bytes.
        npages: certificate pages offered; None for a plain request.
    """

    msg_type: int
    msg_version: int
    payload: bytes
    limit: int
    npages: int | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """The response was opened; `exitinfo2` is 0."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """No response.

    Attributes:
        result: -errno, or a positive `EsResult` that the ioctl returns as it is.
        exitinfo2: what the caller shall see; 0 is not written back.
        npages: certificate pages that the host wants, or those offered.
    """

    result: int
    exitinfo2: int
    npages: int


Outcome: TypeAlias = Answered | Failed


class Exchange:
    """Sends messages one at a time; the driver's mutex sees to that.

    Args:
        channel: the VMPCK's.
        layout: the shared pages.
        clock: for the pauses after BUSY.
        generation: of the driver.
    """

    def __init__(
        self, channel: Channel, layout: GuestLayout, *, clock: Clock, generation: DriverGeneration
    ) -> None:
        self._channel = channel
        self._layout = layout
        self._clock = clock
        self._generation = generation

    def run(self, cpu: GuestCpu, ghcb: GhcbPage | None, message: Message) -> Generator[None, None, Outcome]:
        """Send one message and open its response.

        The key is wiped after every failure but one: EIO with exitinfo2 INVALID_LEN. A message whose
        certificate buffer was too small is repeated without certificates and exitinfo2 stays INVALID_LEN, so
        a firmware error of that repetition goes unseen and the key is kept, as in Linux.

        Args:
            cpu: the vCPU that runs this.
            ghcb: its GHCB; None when it has none, which counts as a failed exchange (EIO).
            message: what to send.
        """
        channel, layout = self._channel, self._layout
        npages = message.npages or 0
        if channel.state is ChannelState.IN_FLIGHT:  # an earlier exchange was cut off: as good as failed
            channel.wipe()
        try:
            page = channel.seal(message.msg_type, message.msg_version, message.payload)
        except KeyWiped:
            return Failed(-errno.ENOTTY, self._generation.refused_exitinfo2, npages)
        except CounterExhausted:
            return Failed(-errno.EIO, self._generation.refused_exitinfo2, npages)
        cpu.memory.write(layout.response_page, _ZERO_PAGE, private=False)
        cpu.memory.write(layout.request_page, page, private=False)
        failed = yield from self._send(cpu, ghcb, message.npages)
        if failed is not None:
            if failed.result == -errno.EIO and failed.exitinfo2 == INVALID_LEN:
                channel.advance()
            else:
                channel.wipe()
            return failed
        try:
            # copied out of shared memory once, then judged
            response = cpu.memory.read(layout.response_page, MESSAGE_PAGE, private=False)
            return Answered(channel.open(response, message.limit))
        except ResponseRefused:
            return Failed(-errno.EBADMSG, 0, npages)

    def _send(
        self, cpu: GuestCpu, ghcb: GhcbPage | None, npages: int | None
    ) -> Generator[None, None, Failed | None]:
        """VMGEXIT until there is an answer; None when the firmware has answered."""
        too_small, wanted = False, npages or 0
        first_sent = self._clock.monotonic()
        while True:
            if ghcb is None:
                result, info2 = -errno.EIO, NO_FW_CALL
                break
            self._ask(ghcb, npages)
            yield
            info1, info2 = ghcb.reply()
            if info1 & 0xFFFF_FFFF:
                result, info2 = int(es_result(info1, info2)), NO_FW_CALL
                break
            if info2 == 0:
                result = 0
                break
            if info2 == BUSY:
                if self._clock.monotonic() - first_sent > MAX_RETRY_S:
                    result = -errno.ETIMEDOUT
                    break
                self._clock.sleep(RETRY_DELAY_S)
            elif info2 == INVALID_LEN and npages is not None:
                # the number must not cover another message: send the same one without certificates
                too_small, wanted, npages = True, ghcb.rbx(), None
            else:
                result = -errno.EIO
                break
            cpu.memory.write(self._layout.request_page, self._channel.retry(), private=False)
        if too_small:
            return Failed(result or -errno.EIO, INVALID_LEN, wanted)
        return Failed(result, info2, wanted) if result else None

    def _ask(self, ghcb: GhcbPage, npages: int | None) -> None:
        layout = self._layout
        if npages is None:
            ghcb.ask(_PLAIN, layout.request_page, layout.response_page)
        else:
            rax = layout.certs_buffer if npages or self._generation.rax_always else 0
            ghcb.ask(_EXTENDED, layout.request_page, layout.response_page, rax=rax, rbx=npages)
