"""What CPUID tells the guest: the host's KVM, with SEV-SNP added.

Source: AMD 24594 (APM volume 3), Fn8000_0008 and Fn8000_001F.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.record import Word, bits
from swsnp.abi.snp_launch import CPUID_COUNT_MAX, CpuidFunction, CpuidPage
from swsnp.cpu.plain_kvm.host import checked_ioctl
from swsnp.cpu.plain_kvm.ioctls import CPUID_ENTRIES, HostIoctl, KvmCpuidEntry
from swsnp.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from swsnp.cpu.plain_kvm.host import HostKvm

__all__ = [
    "c_bit_of",
    "cpuid_page",
    "leaves_of_vcpu",
    "ordinary_leaves",
    "pack_leaves",
    "snp_leaves",
    "supported_leaves",
]

_HEADER: Final = 8
_MAX_EXTENDED: Final = 0x80000000
_ADDRESS_SIZES: Final = 0x80000008
_ENCRYPTION: Final = 0x8000001F
_TOPOLOGY: Final = frozenset({0xB, 0x1F, 0x80000026})
_XSTATE: Final = 0xD
_X87_STATE: Final = 0x240
_INDEXED: Final = 1
"""KVM_CPUID_FLAG_SIGNIFCANT_INDEX."""
_SMT_LEVEL, _CORE_LEVEL = 1 << 8, 2 << 8
_HTT: Final = 1 << 28
_CMP_LEGACY: Final = 1 << 1
_PARAVIRTUAL: Final = range(0x40000000, 0x50000000)
_VENDOR: Final = {"ebx": 0x68747541, "edx": 0x69746E65, "ecx": 0x444D4163}
"""AuthenticAMD; only AMD processors have SEV."""


class EncryptionEax(Word):
    """Fn8000_001F EAX."""

    sev = bits(1, 1)
    sev_es = bits(3, 3)
    sev_snp = bits(4, 4)


class EncryptionEbx(Word):
    """Fn8000_001F EBX."""

    c_bit_position = bits(5, 0)
    phys_addr_reduction = bits(11, 6)


def supported_leaves(host: HostKvm, kvm: int) -> tuple[KvmCpuidEntry, ...]:
    """What the host's KVM can offer (KVM_GET_SUPPORTED_CPUID)."""
    argument = bytearray(_HEADER + CPUID_ENTRIES * KvmCpuidEntry.SIZE)
    argument[:4] = CPUID_ENTRIES.to_bytes(4, "little")
    checked_ioctl(host, kvm, HostIoctl.KVM_GET_SUPPORTED_CPUID, argument)
    count = int.from_bytes(argument[:4], "little")
    return tuple(KvmCpuidEntry.parse_at(argument, _HEADER + i * KvmCpuidEntry.SIZE) for i in range(count))


def c_bit_of(leaves: Iterable[KvmCpuidEntry]) -> int:
    """The C-bit's position: the highest physical address bit that the host's KVM gives a guest.

    Raises:
        HostError: the host does not say how wide guest addresses are.
    """
    for leaf in leaves:
        if leaf.function == _ADDRESS_SIZES and leaf.eax & 0xFF:
            return (leaf.eax & 0xFF) - 1
    raise HostError("/dev/kvm: CPUID Fn8000_0008 names no address width; remedy: a KVM for x86-64 guests")


def snp_leaves(leaves: Iterable[KvmCpuidEntry]) -> tuple[KvmCpuidEntry, ...]:
    """The host's leaves made those of an SNP guest: SEV, SEV-ES and SNP, the C-bit, one address bit less."""
    host_leaves = tuple(leaves)
    encryption = KvmCpuidEntry(
        function=_ENCRYPTION,
        eax=EncryptionEax.of(sev=1, sev_es=1, sev_snp=1),
        ebx=EncryptionEbx.of(c_bit_position=c_bit_of(host_leaves), phys_addr_reduction=1),
        edx=1,
    )
    kept = (_amd(leaf) for leaf in host_leaves if not _left_out(leaf.function))
    return (*kept, encryption)


def ordinary_leaves(leaves: Iterable[KvmCpuidEntry]) -> tuple[KvmCpuidEntry, ...]:
    """The host's leaves for a guest without SEV-SNP; without KVM's own, as SNP guests have them."""
    return tuple(leaf for leaf in leaves if not _left_out(leaf.function))


def _left_out(function: int) -> bool:
    return function == _ENCRYPTION or function in _PARAVIRTUAL


def _amd(leaf: KvmCpuidEntry) -> KvmCpuidEntry:
    if leaf.function == 0:
        return leaf.but(**_VENDOR)
    if leaf.function == _MAX_EXTENDED:
        return leaf.but(eax=max(leaf.eax, _ENCRYPTION), **_VENDOR)
    return leaf


def leaves_of_vcpu(leaves: Iterable[KvmCpuidEntry], vcpu: int, vcpus: int) -> tuple[KvmCpuidEntry, ...]:
    """What CPUID tells one of several vCPUs: its APIC id, and one socket of single-threaded cores.

    Source: AMD 24594, Fn0000_0001 EBX, Fn0000_000B, Fn8000_0008 ECX, Fn8000_001E.
    """
    width = (vcpus - 1).bit_length()
    changed = [_numbered(leaf, vcpu, vcpus, width) for leaf in leaves if leaf.function not in _TOPOLOGY]
    return (
        *changed,
        KvmCpuidEntry(function=0xB, index=0, flags=_INDEXED, ebx=1, ecx=_SMT_LEVEL, edx=vcpu),
        KvmCpuidEntry(
            function=0xB, index=1, flags=_INDEXED, eax=width, ebx=vcpus, ecx=_CORE_LEVEL | 1, edx=vcpu
        ),
        KvmCpuidEntry(function=0xB, index=2, flags=_INDEXED, ecx=2, edx=vcpu),
    )


def _numbered(leaf: KvmCpuidEntry, vcpu: int, vcpus: int, width: int) -> KvmCpuidEntry:
    if leaf.function == 1:
        htt = _HTT if vcpus > 1 else 0
        ebx = leaf.ebx & 0xFFFF | (vcpus & 0xFF) << 16 | (vcpu & 0xFF) << 24
        return leaf.but(ebx=ebx, edx=leaf.edx & ~_HTT | htt)
    if leaf.function == _ADDRESS_SIZES:
        return leaf.but(ecx=leaf.ecx & ~0xF0FF | (vcpus - 1) & 0xFF | width << 12)
    if leaf.function == 0x80000001:
        return leaf.but(ecx=leaf.ecx & ~_CMP_LEGACY | (_CMP_LEGACY if vcpus > 1 else 0))
    if leaf.function == 0x8000001E:
        return leaf.but(eax=vcpu, ebx=vcpu & 0xFF, ecx=0)
    return leaf


def cpuid_page(leaves: Iterable[KvmCpuidEntry]) -> CpuidPage:
    """The CPUID page of a launch, from what the boot processor's CPUID tells.

    The page has room for 64 functions: leaves of zeros are left out, since a guest takes what is not there
    for zeros. Sub-leaves 0 and 1 of Fn0000_000D are those for XCR0 1, with the size of the state that it
    enables: x87 with the XSAVE header, as guests and firmware want it (AMD 56860, CPUID page).

    Raises:
        HostError: the host's KVM tells of more.
    """
    functions = [
        CpuidFunction(
            eax_in=leaf.function,
            ecx_in=leaf.index if leaf.flags & _INDEXED else 0,
            xcr0_in=1 if leaf.function == _XSTATE and leaf.index < 2 else 0,
            eax=leaf.eax,
            ebx=_X87_STATE if _is_sized(leaf) else leaf.ebx,
            ecx=leaf.ecx,
            edx=leaf.edx,
        )
        for leaf in leaves
        if leaf.eax | leaf.ebx | leaf.ecx | leaf.edx
    ]
    if len(functions) > CPUID_COUNT_MAX:
        raise HostError(
            f"/dev/kvm: {len(functions)} CPUID functions, wanted at most {CPUID_COUNT_MAX} (AMD 56860, CPUID "
            "page); remedy: a host CPU model with fewer leaves"
        )
    packed = b"".join(map(bytes, functions))
    return CpuidPage(
        count=len(functions), functions=packed.ljust(CPUID_COUNT_MAX * CpuidFunction.SIZE, b"\0")
    )


def _is_sized(leaf: KvmCpuidEntry) -> bool:
    return leaf.function == _XSTATE and leaf.index < 2 and bool(leaf.ebx)


def pack_leaves(leaves: tuple[KvmCpuidEntry, ...]) -> bytearray:
    """The argument of KVM_SET_CPUID2."""
    return bytearray(len(leaves).to_bytes(_HEADER, "little") + b"".join(map(bytes, leaves)))
