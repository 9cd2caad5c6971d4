"""A kernel without SNP: QEMU's own way to say it."""

from __future__ import annotations

import pytest

from swsnp.cli.qemu_options import parse_qemu_options
from swsnp.errors import UsageError

KERNEL = ("-kernel", "vmlinuz")
OBJECT = ("-object", "sev-snp-guest,id=sev0")


@pytest.mark.parametrize(
    ("arguments", "ordinary"),
    [
        (KERNEL, False),
        ((*KERNEL, "-machine", "q35"), True),
        ((*KERNEL, "-machine", "q35,confidential-guest-support=sev0", *OBJECT), False),
    ],
)
def test_ordinary(arguments: tuple[str, ...], ordinary: bool) -> None:
    """-machine without confidential-guest-support; -kernel alone stays an SNP guest."""
    assert parse_qemu_options(arguments).ordinary is ordinary


@pytest.mark.parametrize("machine", [(), ("-machine", "q35")])
def test_object_in_vain(machine: tuple[str, ...]) -> None:
    """An SNP guest object, with its certificates, is not ignored in silence."""
    with pytest.raises(
        UsageError, match="sev-snp-guest,id=sev0: nothing refers to it, wanted -machine q35,c"
    ):
        parse_qemu_options((*KERNEL, *machine, *OBJECT))


def test_firmware_wants_snp() -> None:
    """With -bios only SNP guests run."""
    with pytest.raises(UsageError, match="'confidential-guest-support' is missing; only SNP guests run"):
        parse_qemu_options(("-bios", "OVMF.fd", "-cpu", "EPYC-Milan", "-machine", "q35"))
