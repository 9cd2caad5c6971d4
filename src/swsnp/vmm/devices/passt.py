"""A network without privileges: the program passt, which turns a guest's frames into this host's connections.

Source: the manual page passt(1); RFC 826 (ARP).

It runs as a child for one guest and ends when its socket does. What guest and host are for each other is as
with QEMU's user network: the guest is 10.0.2.15, the host and its services 10.0.2.2.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from typing import IO, TYPE_CHECKING, Final, Self

from swsnp.errors import HostError
from swsnp.vmm.devices.network import FrameReader, framed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swsnp.vmm.devices.forward import Forward

__all__ = ["Passt", "passt_arguments"]

_PROGRAM: Final = "passt"
_GUEST, _HOST = "10.0.2.15", "10.0.2.2"
_MTU: Final = 1500
_START_S: Final = 10.0
_END_S: Final = 2.0
_OPTIONS: Final = {"tcp": "--tcp-ports", "udp": "--udp-ports"}
_NO_LOGGER: Final = "Failed to send "
"""What it adds to each line where no system logger runs."""
_ARP: Final = bytes.fromhex("0806 0001 0800 06 04 0001")
"""Of Ethernet, a request for an IPv4 address."""


def passt_arguments(fd: int, forwards: Sequence[Forward]) -> list[str]:
    """What the program is told."""
    words = ["--foreground", "--quiet", "--fd", str(fd), "--mtu", str(_MTU)]
    words += ["--address", _GUEST, "--netmask", "24", "--gateway", _HOST]
    for each in forwards:
        address = f"{each.host}/" if each.host else ""
        words += [_OPTIONS[each.protocol], f"{address}{each.host_port}:{each.guest_port}"]
    return words


class Passt:
    """A running passt; a context manager that ends it.

    Args:
        mac: the guest's address.
        forwards: ports that lead to the guest.

    Raises:
        HostError: there is no such program, or it does not answer.

    Attributes:
        socket: where frames go and come from, as `network.framed` has them; the program ends with it.
    """

    def __init__(self, mac: bytes, forwards: Sequence[Forward] = ()) -> None:
        program = shutil.which(_PROGRAM)
        if program is None:
            raise HostError("a user network needs the program passt; remedy: install the package passt")
        self.socket, theirs = socket.socketpair()
        with tempfile.TemporaryFile() as words:
            try:
                with theirs:
                    self._process = subprocess.Popen(  # noqa: S603  # its arguments are made here
                        [program, *passt_arguments(theirs.fileno(), forwards)],
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                        stdout=words,
                        stderr=words,
                        process_group=0,  # the terminal's ^C is for the guest's owner
                    )
            except OSError as error:
                self.socket.close()
                raise HostError(f"{program}: cannot be started: {error.strerror or error}") from None
            try:
                self._wait_for_answer(mac, words)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, and wait until it has ended. Again is allowed."""
        self.socket.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _has_answered(self) -> bool:
        """Read one frame and no more; False when the program has ended."""
        reader = FrameReader()
        while piece := self.socket.recv(1):
            if list(reader.feed(piece)):
                return True
        return False

    def _wait_for_answer(self, mac: bytes, words: IO[bytes]) -> None:
        """It is there when it says what the host's address is."""
        self.socket.settimeout(_START_S)
        try:
            self.socket.sendall(framed(_who_is(_HOST, mac)))
            if self._has_answered():
                return
        except TimeoutError:
            raise HostError(f"passt does not answer within {_START_S:g} s") from None
        except OSError:  # it has gone before it has read
            pass
        self.close()
        words.seek(0)
        lines = words.read().decode(errors="replace").splitlines()
        said = "; ".join(each for each in lines if not each.startswith(_NO_LOGGER))
        raise HostError(f"passt ended with status {self._process.returncode}: {said or 'it said nothing'}")


def _who_is(address: str, mac: bytes) -> bytes:
    sender = mac + socket.inet_aton(_GUEST)
    return bytes([0xFF] * 6) + mac + _ARP + sender + bytes(6) + socket.inet_aton(address)
