"""The driver's ioctl: a number of its contract for any structures and commands; a failure writes nothing."""

from __future__ import annotations

import errno
import struct

from fuzz.guest import FuzzedVm
from swsnp.abi.sev_guest import SNP_GET_DERIVED_KEY, SNP_GET_EXT_REPORT, SNP_GET_REPORT
from swsnp.guest.caller import BufferMemory
from swsnp.machine.answers import GuestStopped

__all__ = ["one", "seeds"]

_VM = FuzzedVm("linux-7.2")
_COMMANDS = (SNP_GET_REPORT, SNP_GET_DERIVED_KEY, SNP_GET_EXT_REPORT, 0xC0205303, 0)
_RESULTS = {0, *(-each for each in (errno.EINVAL, errno.EFAULT, errno.ENOTTY, errno.EIO, errno.EBADMSG))}
_REQUEST, _RESPONSE, _CERTS = 0x1000000, 0x2000000, 0x3000000
_ARGUMENT = struct.Struct("<BB7sQQQ")


def seeds() -> list[bytes]:
    """First byte: the command. Then the argument, then the request."""
    ext = bytes(96) + struct.pack("<QII", _CERTS, 0x4000, 0)
    requests = {0: bytes(96), 1: bytes(32), 2: ext, 3: b"", 4: b""}
    made = [_ARGUMENT.pack(n, 1, bytes(7), _REQUEST, _RESPONSE, 0) + body for n, body in requests.items()]
    return [*made, _ARGUMENT.pack(2, 1, bytes(7), _REQUEST, _RESPONSE, 0) + bytes(112), b""]


def one(data: bytes) -> object:
    """One call by a program with three buffers."""
    head, request = data[: _ARGUMENT.size].ljust(_ARGUMENT.size, b"\0"), data[_ARGUMENT.size :]
    caller, argument = BufferMemory(), bytearray(head[1:])
    response, certs = bytearray(b"\xee" * 4000), bytearray(b"\xee" * 0x4000)
    where = caller.place(argument)
    if request:
        caller.map(_REQUEST, bytearray(request))
    caller.map(_RESPONSE, response)
    caller.map(_CERTS, certs)
    command = _COMMANDS[head[0] % len(_COMMANDS)]
    try:
        result = _VM.vm.ioctl(command, where, caller)
    except GuestStopped as stopped:
        _VM.discard()
        return type(stopped.reason).__name__
    assert result in _RESULTS, result
    if result and result != -errno.EFAULT:
        assert response == b"\xee" * 4000
        assert certs == b"\xee" * 0x4000
    if _VM.vm.driver is None or not _VM.vm.driver.usable:
        _VM.discard()
        return command, result, "wiped"
    return command, result, bytes(response[:4]) if result == 0 and command != SNP_GET_DERIVED_KEY else b""
