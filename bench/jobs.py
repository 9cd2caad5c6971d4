"""The jobs: what is timed, and the floor that it is held against."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Literal

from awscrt.crypto import EC
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

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
from swsnp.abi.snp_report import AttestationReport
from swsnp.certs.table import parse
from swsnp.certs.x509_reader import read
from swsnp.crypto.ecdsa import SigningKey
from swsnp.guest.caller import BufferMemory
from swsnp.verify import Roots, Verifier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from swsnp.machine import VirtualMachine
    from swsnp.machine.answers import ExtendedReport

__all__ = ["ENGINES", "Job", "REPORT_BODY", "RESPONSE_SIZE", "jobs", "plain"]

ENGINES: tuple[Literal["cryptography", "awscrt"], ...] = ("cryptography", "awscrt")
REPORT_BODY = bytes(672)
RESPONSE_SIZE = 4000
IV = bytes(12)
AAD = bytes(48)
CHIPS = 8
"""Of one line, for the jobs that see a chip for the first time."""


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
    vm: VirtualMachine, command: int, request: bytes, response: bytearray, caller: BufferMemory
) -> Callable[[], None]:
    """One ioctl of the device by an in-process caller."""
    argument = caller.place(
        bytes(
            SnpGuestRequestIoctl(
                msg_version=1,
                req_data=caller.place(request),
                resp_data=caller.place(response),
            )
        )
    )

    def run() -> None:
        if vm.ioctl(command, argument, caller):
            raise RuntimeError("the request was refused")

    return run


def plain(
    vm: VirtualMachine, response: bytearray | None = None, nonce: bytes = bytes(64)
) -> Callable[[], None]:
    """SNP_GET_REPORT into `response`, by a program of its own."""
    response = bytearray(RESPONSE_SIZE) if response is None else response
    return _call(vm, SNP_GET_REPORT, bytes(SnpReportReq(user_data=nonce)), response, BufferMemory())


def _extended(vm: VirtualMachine) -> Callable[[], None]:
    caller = BufferMemory()
    certs = caller.place(bytearray(0x4000))
    request = bytes(SnpExtReportReq(user_data=bytes(64), certs_address=certs, certs_len=0x4000))
    return _call(vm, SNP_GET_EXT_REPORT, request, bytearray(RESPONSE_SIZE), caller)


def _derived(vm: VirtualMachine) -> Callable[[], None]:
    return _call(vm, SNP_GET_DERIVED_KEY, bytes(SnpDerivedKeyReq()), bytearray(64), BufferMemory())


def _verify_jobs(stack: ExitStack) -> Iterator[Job]:
    """A relying party's, by either engine, with the full verdict.

    Warm: a chip that was seen before; the floor is the library's verification of that signature, its hash
    included. Cold: a new verifier, one chip of several after the other, and the certificates come in the
    table; the floor is a report's signature and three of RSA, by keys that are ready.
    """
    machine = Machine()
    nonce = bytes(64)
    answers = []
    for each in (machine, *(Machine(same_root_as=machine) for _ in range(CHIPS - 1))):
        vm = stack.enter_context(each.create_vm())
        vm.boot()
        answers.append(vm.extended_report(nonce))
    answer, chips = answers[0], cycle(answers)
    measurement = AttestationReport.parse(answer.report).measurement
    roots, at = Roots.of(machine.root_certificate), machine.now()

    def judge(verifier: Verifier, answer: ExtendedReport) -> None:
        result = verifier.verify(
            answer.report, table=answer.certs, at=at, report_data=nonce, measurement=measurement
        )
        if not result.accepted:
            raise RuntimeError("the report was refused")

    rsa = _chain_floor(answer.certs)
    for engine in ENGINES:
        bare = _report_verification(machine, answer.report, engine)

        def signatures(bare: Callable[[], object] = bare) -> None:
            rsa()
            bare()

        def cold(engine: Literal["cryptography", "awscrt"] = engine) -> None:
            judge(Verifier(roots=roots, engine=engine), next(chips))

        warm = partial(judge, Verifier(roots=roots, engine=engine), answer)
        yield Job("verify/warm", engine, warm, bare, "ratio <= 1.15")
        yield Job("verify/cold", engine, cold, signatures, "ratio <= 1.2")


def _report_verification(
    machine: Machine, report: bytes, engine: Literal["cryptography", "awscrt"]
) -> Callable[[], object]:
    """What the library alone does with a report's signature: hash and P-384."""
    body, signature = report[: len(REPORT_BODY)], report[len(REPORT_BODY) :]
    r, s = (int.from_bytes(signature[start : start + 72], "little") for start in (0, 72))
    der = utils.encode_dss_signature(r, s)
    x, y = machine.chip.vcek_public_point(machine.chip.reported_tcb)
    public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), b"\x04" + x + y)
    if engine == "cryptography":
        algorithm = ec.ECDSA(hashes.SHA384())
        return lambda: public.verify(der, body, algorithm)
    spki = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    key = EC.new_key_from_der_data(spki)
    return lambda: key.verify(hashlib.sha384(body).digest(), der)


def _chain_floor(table: bytes) -> Callable[[], None]:
    """The three RSA signatures of a chain, by keys that are ready."""
    leaf, ask, ark = (read(each.data) for each in parse(table))
    keys = [load_der_public_key(each.spki) for each in (ask, ark, ark)]
    padding = PSS(MGF1(hashes.SHA384()), 48)
    algorithm = hashes.SHA384()
    links = [
        (key, signed)
        for key, signed in zip(keys, (leaf, ask, ark), strict=True)
        if isinstance(key, RSAPublicKey)
    ]

    def run() -> None:
        for key, signed in links:
            key.verify(signed.signature, signed.tbs, padding, algorithm)

    return run


@contextmanager
def jobs() -> Iterator[list[Job]]:
    """Every job, ready to be called; VMs live as long as the block."""
    with ExitStack() as stack:
        found = []
        for engine in ENGINES:
            machine = Machine(engine=engine)
            vm = stack.enter_context(machine.create_vm(certs=bytes(5000)))
            vm.boot()
            request = plain(vm)
            goal = "ratio <= 1.3" if engine == "cryptography" else "own <= 60 us"
            found.append(Job("request/in-process", engine, request, _report_floor(engine), goal))
            found.append(Job("request/extended", engine, _extended(vm), request, "own <= 25 us over plain"))
        found.append(Job("request/derived-key", "cryptography", _derived(vm), _envelopes(32, 64), ""))
        found += _verify_jobs(stack)
        yield found
