"""The first register state of a vCPU, as each VMM leaves it."""

from __future__ import annotations

import pytest

from swsnp.abi.vmsa import Segment, SevFeatures, Vmsa
from swsnp.errors import UsageError
from swsnp.measure.vmsa_pages import (
    CPU_SIGNATURES,
    FIELDS,
    RESET_EIP,
    Vmm,
    cpu_signature,
    reset_page,
    signature_of_model,
    svsm_page,
    with_fields,
)


def test_fields_are_those_of_the_record() -> None:
    """AMD 24593, VMSA layout: offsets and sizes are `abi.vmsa.Vmsa`'s."""
    whole = {name: (offset, size) for name, offset, size in Vmsa.layout()}
    for name, (offset, size) in FIELDS.items():
        register, _, part = name.partition(".")
        at, length = whole[register]
        if part:
            inside = {each: (start, width) for each, start, width in Segment.layout()}
            assert (offset, size) == (at + inside[part][0], inside[part][1]), name
        else:
            assert (offset, size) == (at, length), name


@pytest.mark.parametrize(("vmm", "cs", "ss", "tr", "pat", "rdx", "mxcsr", "fcw"), [
    (Vmm.QEMU, 0x9B, 0x93, 0x8B, 0x7040600070406, 0xA00F11, 0x1F80, 0x37F),
    (Vmm.EC2, 0x9A, 0x92, 0x83, 0x7040600070406, 0x600, 0, 0),
    (Vmm.GCE, 0x9B, 0x93, 0x8B, 0x70106, 0x600, 0, 0),
])  # fmt: skip
def test_boot_processor(
    vmm: Vmm, cs: int, ss: int, tr: int, pat: int, rdx: int, mxcsr: int, fcw: int
) -> None:
    """Initial VMSA: the table of values by VMM."""
    page = Vmsa.parse(reset_page(vmm, eip=RESET_EIP, features=0x21, signature=0xA00F11))
    data = Segment(attrib=0x93, limit=0xFFFF)
    assert page == Vmsa(
        es=data,
        cs=Segment(selector=0xF000, attrib=cs, limit=0xFFFF, base=0xFFFF_0000),
        ss=data.but(attrib=ss),
        ds=data,
        fs=data,
        gs=data,
        gdtr=Segment(limit=0xFFFF),
        ldtr=Segment(attrib=0x82, limit=0xFFFF),
        idtr=Segment(limit=0xFFFF),
        tr=Segment(attrib=tr, limit=0xFFFF),
        efer=0x1000,
        cr4=0x40,
        cr0=0x10,
        dr7=0x400,
        dr6=0xFFFF_0FF0,
        rflags=2,
        rip=0xFFF0,
        g_pat=pat,
        rdx=rdx,
        sev_features=SevFeatures(0x21),
        xcr0=1,
        mxcsr=mxcsr,
        x87_fcw=fcw,
    )


@pytest.mark.parametrize("vmm", list(Vmm))
def test_application_processor(vmm: Vmm) -> None:
    """The reset block's address: its upper half in CS.base, its lower half in RIP; EC2's CS is then 9B."""
    page = Vmsa.parse(reset_page(vmm, eip=0x1280_B004, features=1, signature=1))
    assert page.cs == Segment(selector=0xF000, attrib=0x9B, limit=0xFFFF, base=0x1280_0000)
    assert page.rip == 0xB004


def test_svsm_processor() -> None:
    """SVSM mode: flat protected mode at the entry point; X87_FCW stays 0, as in sev-snp-measure."""
    page = Vmsa.parse(svsm_page(rip=0xFFC0_1234, features=1, signature=0xA00F11))
    flat = Segment(selector=0x10, attrib=0xC93, limit=0xFFFF_FFFF)
    assert page == Vmsa(
        es=flat,
        cs=Segment(selector=0x8, attrib=0xC9B, limit=0xFFFF_FFFF),
        ss=flat,
        ds=flat,
        fs=flat,
        gs=Segment(attrib=0x93, limit=0xFFFF),
        gdtr=Segment(limit=0xFFFF),
        ldtr=Segment(attrib=0x82, limit=0xFFFF),
        idtr=Segment(limit=0xFFFF),
        tr=Segment(attrib=0x8B, limit=0xFFFF),
        efer=0x1000,
        cr4=0x40,
        cr0=0x11,
        dr7=0x400,
        dr6=0xFFFF_0FF0,
        rflags=2,
        rip=0xFFC0_1234,
        g_pat=0x7040600070406,
        rdx=0xA00F11,
        sev_features=SevFeatures(1),
        xcr0=1,
        mxcsr=0x1F80,
    )


@pytest.mark.parametrize(("family", "model", "stepping", "name"), [
    (23, 1, 2, "EPYC-v4"),
    (23, 49, 0, "EPYC-Rome"),
    (25, 1, 1, "EPYC-Milan-v2"),
    (25, 17, 0, "EPYC-Genoa"),
    (26, 0, 0, "EPYC-Turin"),
])  # fmt: skip
def test_signatures(family: int, model: int, stepping: int, name: str) -> None:
    """AMD 24594, CPUID Fn0000_0001_EAX; QEMU's CPU models."""
    assert cpu_signature(family, model, stepping) == CPU_SIGNATURES[name]


def test_signature_of_an_old_family() -> None:
    """Families up to 15 have no extended family; the largest numbers fill their fields."""
    assert cpu_signature(6, 0x2A, 7) == 0x0002_06A7
    assert cpu_signature(15, 0, 0) == 0xF00
    assert cpu_signature(0, 0, 0) == 0
    assert cpu_signature(270, 255, 15) == 0x0FFF_0FFF


@pytest.mark.parametrize(("family", "model", "stepping", "text"), [
    (271, 0, 0, "family: got 271, wanted 0..270"),
    (-1, 0, 0, "family: got -1"),
    (23, 256, 0, "model: got 256, wanted 0..255"),
    (23, -1, 0, "model: got -1"),
    (23, 1, 16, "stepping: got 16, wanted 0..15"),
    (23, 1, -1, "stepping: got -1"),
])  # fmt: skip
def test_signature_out_of_range(family: int, model: int, stepping: int, text: str) -> None:
    """A number that would be cut is refused; sev-snp-measure cuts it."""
    with pytest.raises(UsageError, match=f"vCPU {text}"):
        cpu_signature(family, model, stepping)


@pytest.mark.parametrize(("name", "signature"), [
    ("EPYC-Milan", 0xA00F11),
    ("EPYC-Milan-v3", 0xA00F11),
    ("EPYC-Genoa-v2", 0xA10F10),
    ("EPYC-Turin-v1", 0xB00F00),
    ("EPYC-IBPB", 0x800F12),
    ("EPYC-v5", 0x800F12),
    ("EPYC-Milan-vx", None),
    ("EPYC-Milan-v", None),
    ("-v2", None),
    ("Opteron_G5-v1", None),
    ("", None),
])  # fmt: skip
def test_signature_of_a_model(name: str, signature: int | None) -> None:
    """QEMU: versions of a CPU model keep family, model and stepping."""
    assert signature_of_model(name) == signature


def test_other_fields() -> None:
    """A VMM that sets registers otherwise: any field by its name, in its place, within its size."""
    page = with_fields(bytes(4096), {"x87_fcw": 0x37F, "cs.base": 1 << 63, "mxcsr": 0xFFFF_FFFF})
    assert Vmsa.parse(page) == Vmsa(x87_fcw=0x37F, cs=Segment(base=1 << 63), mxcsr=0xFFFF_FFFF)
    with pytest.raises(UsageError, match="VMSA field: got 'rsp', wanted one of es.selector, es.attrib"):
        with_fields(bytes(4096), {"rsp": 1})
    for value in (0x1_0000, -1):
        with pytest.raises(UsageError, match="VMSA field x87_fcw: got .*, wanted 2 bytes unsigned"):
            with_fields(bytes(4096), {"x87_fcw": value})


def test_features_that_do_not_fit() -> None:
    """SEV_FEATURES has 64 bits; sev-snp-measure cuts what is above."""
    with pytest.raises(UsageError, match="VMSA field sev_features: got 0x10000000000000000"):
        reset_page(Vmm.QEMU, eip=RESET_EIP, features=1 << 64)
