"""The jobs: what is timed, and the floor that it is held against."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from swsnp import Machine
from swsnp.abi.sev_guest import (
    SNP_GET_DERIVED_KEY,
    SNP_GET_EXT_REPORT,
    SNP_GET_REPORT,
    SnpDerivedKeyReq,
    SnpExtReportReq,
    SnpGuestRequestIoctl,
    SnpReportReq,
)
from swsnp.crypto.ecdsa import SigningKey
from swsnp.guest.caller import BufferMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from swsnp.machine import VirtualMachine

ENGINES: tuple[Literal["cryptography", "awscrt"], ...] = ("cryptography", "awscrt")
REPORT_BODY = bytes(672)
IV = bytes(12)
AAD = bytes(48)


@dataclass(frozen=True, slots=True)
class Job:
    """A call, its floor, and the goal that docs and budgets name."""

    name: str
    library: str
    call: Callable[[], object]
    floor: Callable[[], object]
    goal: str


def _envelopes(request_size: int, response_size: int) -> Callable[[], None]:
    """Seal and open of both sides, and the copies of request and response page."""
    aead = AESGCM(bytes(32))
    request, response = bytes(request_size), bytes(response_size)
    sealed_request = aead.encrypt(IV, request, AAD)
    sealed_response = aead.encrypt(IV, response, AAD)
    source, target = memoryview(bytearray(4096)), memoryview(bytearray(4096))

    def run() -> None:
        aead.encrypt(IV, request, AAD)
        target[:] = bytes(source)
        aead.decrypt(IV, sealed_request, AAD)
        aead.encrypt(IV, response, AAD)
        source[:] = bytes(target)
        aead.decrypt(IV, sealed_response, AAD)

    return run


def _report_floor(engine: Literal["cryptography", "awscrt"]) -> Callable[[], None]:
    key = SigningKey.from_scalar(0x1234567, engine=engine)
    envelopes = _envelopes(96, 1216)

    def run() -> None:
        envelopes()
        key.sign(REPORT_BODY)

    return run


def _call(
    vm: VirtualMachine, command: int, request: bytes, response_size: int, caller: BufferMemory
) -> Callable[[], None]:
    """One ioctl of the device by an in-process caller."""
    argument = caller.place(
        bytes(
            SnpGuestRequestIoctl(
                msg_version=1,
                req_data=caller.place(request),
                resp_data=caller.place(bytearray(response_size)),
            )
        )
    )

    def run() -> None:
        if vm.ioctl(command, argument, caller):
            raise RuntimeError("the request was refused")

    return run


def _plain(vm: VirtualMachine) -> Callable[[], None]:
    return _call(vm, SNP_GET_REPORT, bytes(SnpReportReq(user_data=bytes(64))), 4000, BufferMemory())


def _extended(vm: VirtualMachine) -> Callable[[], None]:
    caller = BufferMemory()
    certs = caller.place(bytearray(0x4000))
    request = bytes(SnpExtReportReq(user_data=bytes(64), certs_address=certs, certs_len=0x4000))
    return _call(vm, SNP_GET_EXT_REPORT, request, 4000, caller)


def _derived(vm: VirtualMachine) -> Callable[[], None]:
    return _call(vm, SNP_GET_DERIVED_KEY, bytes(SnpDerivedKeyReq()), 64, BufferMemory())


@contextmanager
def jobs() -> Iterator[list[Job]]:
    """Every job, ready to be called; VMs live as long as the block."""
    with ExitStack() as stack:
        found = []
        for engine in ENGINES:
            machine = Machine(engine=engine)
            vm = stack.enter_context(machine.create_vm(certs=bytes(5000)))
            vm.boot()
            plain = _plain(vm)
            goal = "ratio <= 1.3" if engine == "cryptography" else "own <= 60 us"
            found.append(Job("request/in-process", engine, plain, _report_floor(engine), goal))
            found.append(Job("request/extended", engine, _extended(vm), plain, "own <= 25 us over plain"))
        found.append(Job("request/derived-key", "cryptography", _derived(vm), _envelopes(32, 64), ""))
        yield found
