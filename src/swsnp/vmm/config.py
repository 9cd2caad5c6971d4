"""What a VM is started with, and what is measured into it before it runs.

The rules are those of QEMU's `sev-snp-guest` object; a value that QEMU refuses is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_command import PageType
from swsnp.abi.snp_launch import IdAuth, IdBlock
from swsnp.errors import UsageError
from swsnp.vmm.host import PAGE

if TYPE_CHECKING:
    from swsnp.abi.kvm_registers import KvmRegs, KvmSregs
    from swsnp.vmm.certs import CertificateSource

__all__ = ["DEFAULT_POLICY", "LaunchImage", "LaunchPage", "MODEL_CBITPOS", "VmConfig", "memory_map"]

DEFAULT_POLICY: Final = 0x30000
"""SMT allowed, and the reserved bit that must be one."""
MODEL_CBITPOS: Final = 51
"""CPUID 0x8000001F EBX[5:0] of the modelled processors."""
_FOUR_GIB: Final = 1 << 32
_Q35_LOW_MAX: Final = 0xB000_0000
_Q35_LOW_SPLIT: Final = 0x8000_0000
_LAUNCH_TYPES: Final = (
    PageType.NORMAL,
    PageType.ZERO,
    PageType.UNMEASURED,
    PageType.SECRETS,
    PageType.CPUID,
)


@dataclass(frozen=True, slots=True)
class LaunchPage:
    """One LAUNCH_UPDATE: `data`, whole pages, at `gpa`. VMSA pages are KVM's own and cannot be given."""

    type: PageType
    gpa: int
    data: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if self.type not in _LAUNCH_TYPES:
            names = ", ".join(each.name for each in _LAUNCH_TYPES)
            raise UsageError(f"launch page at {self.gpa:#x}: type {self.type!r}, wanted one of {names}")
        if self.gpa % PAGE or self.gpa < 0:
            raise UsageError(f"launch page: gpa {self.gpa:#x}, wanted a multiple of {PAGE:#x}")
        if not self.data or len(self.data) % PAGE:
            raise UsageError(f"launch page at {self.gpa:#x}: {len(self.data)} bytes, wanted whole pages")

    @property
    def end(self) -> int:
        """First GPA after the data."""
        return self.gpa + len(self.data)


LaunchImage = tuple[LaunchPage, ...]
"""What is launched, in this order; the order is part of the measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmConfig:
    """One VM. Sizes in bytes; byte strings as the firmware takes them.

    `id_auth` without `id_block` has no effect, as in QEMU. `certs` None means that the certificate exit is
    not enabled, and the guest gets an empty table. `host_cbitpos` is the C-bit position of the host's
    processors. `cpu_signature` is CPUID Fn1 EAX of the CPU model, in RDX of every vCPU at reset; None leaves
    the host's. `ap_reset_eip` is where all vCPUs but the first start, linear, as the firmware's SEV-ES reset
    block says; None leaves them at the reset vector.
    `passable_memory`: devices that are processes of their own get the shared memory, never the private.
    `start` are registers that the boot processor has at its first instruction, and is measured with; None:
    those after reset.

    Raises:
        UsageError: a value that QEMU would refuse to start with.
    """

    name: str = "vm0"
    memory_size: int = 256 << 20
    vcpus: int = 1
    policy: int = DEFAULT_POLICY
    vmsa_features: int = 0
    id_block: bytes | None = None
    id_auth: bytes | None = None
    author_key_enabled: bool = False
    vcek_disabled: bool = False
    host_data: bytes = bytes(32)
    gosvw: bytes = bytes(16)
    certs: CertificateSource | None = None
    sev_device: str = "/dev/sev"
    cbitpos: int = MODEL_CBITPOS
    reduced_phys_bits: int = 1
    host_cbitpos: int = MODEL_CBITPOS
    cpu_signature: int | None = None
    ap_reset_eip: int | None = None
    start: tuple[KvmRegs, KvmSregs] | None = None
    passable_memory: bool = False

    def __post_init__(self) -> None:
        if self.cbitpos != self.host_cbitpos:
            raise UsageError(
                f"cbitpos: got {self.cbitpos}, wanted the host's {self.host_cbitpos} (CPUID 8000001Fh, EBX)"
            )
        if not 1 <= self.reduced_phys_bits <= 63:
            raise UsageError(f"reduced-phys-bits: got {self.reduced_phys_bits}, wanted 1..63")
        if self.vcpus < 1:
            raise UsageError(f"vcpus: got {self.vcpus}, wanted at least 1")
        if self.memory_size < PAGE or self.memory_size % PAGE:
            raise UsageError(f"memory size: got {self.memory_size:#x}, wanted whole pages, at least one")
        for name, value in (("cpu signature", self.cpu_signature), ("reset EIP", self.ap_reset_eip)):
            if value is not None and not 0 <= value < 1 << 32:
                raise UsageError(f"{name}: got {value:#x}, wanted 32 bits")
        if not 0 <= self.policy < 1 << 64:
            raise UsageError(f"policy: got {self.policy:#x}, wanted 64 bits")
        _wanted_size("guest-visible-workarounds", self.gosvw, 16)
        _wanted_size("host-data", self.host_data, 32)
        if self.id_block is not None:
            _wanted_size("id-block", self.id_block, IdBlock.SIZE)
        if self.id_auth is not None and len(self.id_auth) > IdAuth.SIZE:
            raise UsageError(f"id-auth: got {len(self.id_auth)} bytes, wanted at most {IdAuth.SIZE}")


def _wanted_size(what: str, value: bytes, size: int) -> None:
    if len(value) != size:
        raise UsageError(f"{what}: got {len(value)} bytes, wanted exactly {size}")


def memory_map(memory_size: int, image: LaunchImage) -> tuple[tuple[int, int], ...]:
    """GPA and size of every slot: RAM as q35 lays it out, and the firmware flash below 4 GiB.

    Memory of 0xB0000000 bytes and more is cut at 2 GiB, and the rest begins at 4 GiB. Pages of the image that
    lie outside RAM make one slot from the lowest of them to 4 GiB.

    Raises:
        UsageError: a page of the image that fits neither, or lies half in RAM.
    """
    low = memory_size if memory_size < _Q35_LOW_MAX else _Q35_LOW_SPLIT
    slots = [(0, low)]
    if memory_size > low:
        slots.append((_FOUR_GIB, memory_size - low))
    outside = [
        page for page in image if not any(gpa <= page.gpa and page.end <= gpa + size for gpa, size in slots)
    ]
    for page in outside:
        if page.gpa < low or page.end > _FOUR_GIB:
            raise UsageError(
                f"launch page at {page.gpa:#x}: {len(page.data):#x} bytes fit neither "
                f"RAM of {memory_size:#x} bytes nor the firmware flash below 4 GiB"
            )
    if outside:
        flash = min(page.gpa for page in outside)
        slots.append((flash, _FOUR_GIB - flash))
    return tuple(slots)
