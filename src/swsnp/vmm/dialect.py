"""How this VMM speaks each generation of KVM's certificate exit.

A dialect is data: where the fields of the exit lie, which result codes exist, and how the exit is enabled.
The June 2024 series and upstream differ in all three; the run loop has one path for both.

Which dialect a kernel speaks
-----------------------------
`probe` asks for device attribute (KVM_X86_GRP_SEV, KVM_X86_SEV_SNP_REQ_CERTS) first: only upstream's
generation has it, and its value says whether SNP is on. Capability 237 comes second and is never decisive. It
is KVM_CAP_EXIT_COCO in the series, but upstream gave the number to KVM_CAP_X86_APIC_BUS_CYCLES_NS, which also
answers 1, and whose KVM_ENABLE_CAP with 1 would change the guest's APIC timer. So 237 is enabled only when
the caller says, by `dialect="coco-v1"`, that the kernel is the series'.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from swsnp.abi.kvm import (
    EXIT_UNION,
    DeviceAttr,
    ExitCoco,
    ExitReason,
    ExitSnpReqCerts,
    ReqCertsV1,
)
from swsnp.errors import UsageError
from swsnp.vmm.host import PAGE, device_attribute

if TYPE_CHECKING:
    from collections.abc import Mapping

    from swsnp.vmm.host import HostKernel

__all__ = ["COCO_V1", "DIALECTS", "Dialect", "EnableBy", "NO_CERT_EXIT", "REQ_CERTS", "named", "probe"]

_V1_LEAST_WAIT_S: Final = 2.0


class EnableBy(Enum):
    """How a VMM switches the certificate exit on for a VM."""

    NOTHING = "the kernel has no certificate exit"
    CAPABILITY = "KVM_ENABLE_CAP of KVM_CAP_EXIT_COCO"
    COMMAND = "KVM_SEV_SNP_ENABLE_REQ_CERTS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One generation of the certificate exit.

    Offsets are those in `struct kvm_run`. `subtype_at` is the byte that must be 0 for a certificate request,
    where the exit has sub-types. `address_shift` is 12 where the exit names a GFN and 0 where it names a GPA.
    `retry` is None where "ask again later" cannot be said; such a dialect waits `least_wait_s` for the blob
    at least, then answers `failure`.
    """

    name: str
    enable_by: EnableBy
    exit_reason: int | None = None
    subtype_at: int | None = None
    address_at: int = 0
    address_shift: int = 0
    npages_at: int = 0
    ret_at: int = 0
    width: str = "<Q"
    too_small: int = 0
    retry: int | None = None
    failure: int = 0
    least_wait_s: float = 0.0
    _number: struct.Struct = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_number", struct.Struct(self.width))

    def is_request(self, run: memoryview) -> bool:
        """Whether an exit with `exit_reason` asks for certificates, rather than being another sub-type."""
        return self.subtype_at is None or run[self.subtype_at] == 0

    def request(self, run: memoryview) -> tuple[int, int]:
        """GPA and number of pages that the guest offers."""
        (address,) = _U64.unpack_from(run, self.address_at)
        (npages,) = self._number.unpack_from(run, self.npages_at)
        return address << self.address_shift, npages

    def put_result(self, run: memoryview, result: int) -> None:
        """Write `ret`."""
        self._number.pack_into(run, self.ret_at, result)

    def put_needed(self, run: memoryview, npages: int) -> bool:
        """Write `npages` and the too-small `ret`; False when the field cannot hold the number."""
        if npages >= 1 << (8 * self._number.size):
            return False
        self._number.pack_into(run, self.npages_at, npages)
        self.put_result(run, self.too_small)
        return True


_U64: Final = struct.Struct("<Q")

COCO_V1: Final = Dialect(
    name="coco-v1",
    enable_by=EnableBy.CAPABILITY,
    exit_reason=ExitReason.COCO,
    subtype_at=EXIT_UNION + ExitCoco.offset_of("nr"),
    address_at=EXIT_UNION + ExitCoco.offset_of("gfn"),
    address_shift=PAGE.bit_length() - 1,
    npages_at=EXIT_UNION + ExitCoco.offset_of("npages"),
    ret_at=EXIT_UNION + ExitCoco.offset_of("ret"),
    width="<I",
    too_small=ReqCertsV1.INVALID_LEN,
    retry=None,
    failure=ReqCertsV1.GENERIC,
    least_wait_s=_V1_LEAST_WAIT_S,
)
"""KVM_EXIT_COCO, sub-type KVM_EXIT_COCO_REQ_CERTS, of the June 2024 series."""

REQ_CERTS: Final = Dialect(
    name="linux-7.2",
    enable_by=EnableBy.COMMAND,
    exit_reason=ExitReason.SNP_REQ_CERTS,
    address_at=EXIT_UNION + ExitSnpReqCerts.offset_of("gpa"),
    npages_at=EXIT_UNION + ExitSnpReqCerts.offset_of("npages"),
    ret_at=EXIT_UNION + ExitSnpReqCerts.offset_of("ret"),
    width="<Q",
    too_small=errno.ENOSPC,
    retry=errno.EAGAIN,
    failure=errno.EIO,
)
"""KVM_EXIT_SNP_REQ_CERTS as in mainline headers."""

NO_CERT_EXIT: Final = Dialect(name="linux-6.12", enable_by=EnableBy.NOTHING)
"""Guest requests without certificates."""

DIALECTS: Final[Mapping[str, Dialect]] = MappingProxyType(
    {
        "coco-v1": COCO_V1,
        "coco-v1-revised": COCO_V1,  # the revision changed what KVM does with firmware errors, not this exit
        "linux-7.2": REQ_CERTS,
        "linux-6.12": NO_CERT_EXIT,
    }
)
"""By the name of the kernel profile."""


def named(name: str) -> Dialect:
    """The dialect of a kernel profile; UsageError for a name that is not in `DIALECTS`."""
    try:
        return DIALECTS[name]
    except KeyError:
        raise UsageError(f"dialect: got {name!r}, wanted one of {', '.join(DIALECTS)}") from None


def probe(host: HostKernel, kvm_fd: int) -> Dialect:
    """Ask the kernel which certificate exit it has; see the module's text.

    Returns:
        `REQ_CERTS` or `NO_CERT_EXIT`; never `COCO_V1`, which a kernel cannot be asked for safely.
    """
    value = device_attribute(host, kvm_fd, DeviceAttr.SEV_SNP_REQ_CERTS)
    return REQ_CERTS if value == 1 else NO_CERT_EXIT
