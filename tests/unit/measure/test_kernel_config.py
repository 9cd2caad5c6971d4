"""A kernel's configuration: where it is found, and what an SNP guest wants of it."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import pytest

from swsnp.errors import InputError
from swsnp.measure.kernel_config import KernelConfig, check_config, find_config, parse_config
from swsnp.measure.kernel_image import KernelImage, parse_kernel
from swsnp.testing.tiny_kernel import bz_image, elf_image

if TYPE_CHECKING:
    from pathlib import Path

GOOD = b"# Linux/x86 6.12.1\nCONFIG_AMD_MEM_ENCRYPT=y\nCONFIG_SEV_GUEST=m\nCONFIG_TSM_REPORTS=m\n"
VMGEXIT = b"\xf3\x0f\x01\xd9"


def kernel(inside: bytes = b"") -> KernelImage:
    return parse_kernel(bz_image(elf_image(VMGEXIT + inside)), "tiny")


def embedded(text: bytes) -> bytes:
    return b"before" + b"IKCFG_ST" + gzip.compress(text) + b"IKCFG_ED" + b"behind"


def test_values() -> None:
    """Linux, kconfig: NAME=value, or a comment for what is not set; other lines say nothing."""
    text = b'CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C="a b"\nCONFIG_D=0x10\n# CONFIG_E was\n  CONFIG_F=y\n'
    assert parse_config(text, "x").values == {"A": "y", "B": "n", "C": '"a b"', "D": "0x10"}


@pytest.mark.parametrize("text", [b"", bytes(64), b"\xff\xfe", b"CONFIG-A=y\n"])
def test_no_configuration(text: bytes) -> None:
    """What has no option at all is some other file."""
    with pytest.raises(InputError, match="c: wanted a kernel's configuration"):
        parse_config(text, "c")


@pytest.mark.parametrize("release", ["6.12.1", "6.7.0-rc1", "", "strange"])
def test_good(release: str) -> None:
    """All three options; without a version those that the file names are looked at."""
    check_config(parse_config(GOOD, "c"), release)


@pytest.mark.parametrize(
    ("option", "got", "wanted"),
    [
        ("AMD_MEM_ENCRYPT", "n", "y"),
        ("AMD_MEM_ENCRYPT", "m", "y"),
        ("SEV_GUEST", "n", "y or m"),
        ("TSM_REPORTS", "n", "y or m"),
    ],
)
def test_lacks(option: str, got: str, wanted: str) -> None:
    """The text names file, option, got and wanted; an option that is not named at all is not set."""
    values = parse_config(GOOD, "c").values
    rule = f"^c: CONFIG_{option}: got {got}, wanted {wanted}; "
    with pytest.raises(InputError, match=rule):
        check_config(KernelConfig({**values, option: got}, "c"), "6.12.1")
    if got == "n":
        del values[option]
        with pytest.raises(InputError, match=rule):
            check_config(KernelConfig(values, "c"), "6.12.1")


def test_versions() -> None:
    """Linux has the driver since 5.19, configfs-tsm since 6.7: before there is nothing to want."""
    both = KernelConfig({"AMD_MEM_ENCRYPT": "y", "SEV_GUEST": "m"}, "c")
    check_config(both, "6.6.99")
    with pytest.raises(InputError, match="CONFIG_TSM_REPORTS"):
        check_config(both, "6.7.0")
    check_config(KernelConfig({"AMD_MEM_ENCRYPT": "y"}, "c"), "5.18.0")
    with pytest.raises(InputError, match="CONFIG_SEV_GUEST"):
        check_config(KernelConfig({"AMD_MEM_ENCRYPT": "y"}, "c"), "5.19.0")


def test_where_it_is_found(tmp_path: Path) -> None:
    """The named file first, then the image's own, then the one beside it, by the file's name or release."""
    image = tmp_path / "vmlinuz-6.12.1"
    assert find_config(kernel(), image) is None
    beside, named = tmp_path / "config-6.12.1", tmp_path / "other"
    beside.write_bytes(b"CONFIG_BESIDE=y\n")
    named.write_bytes(b"CONFIG_NAMED=y\n")
    own = kernel(embedded(b"CONFIG_OWN=y\n"))
    for found, key in (
        (find_config(kernel(), image), "BESIDE"),
        (find_config(own, image), "OWN"),
        (find_config(own, image, named), "NAMED"),
    ):
        assert found is not None
        assert found.values == {key: "y"}


def test_cannot_be_read(tmp_path: Path) -> None:
    """A file that is named has to be there; a damaged one inside the image is no reason to go on."""
    with pytest.raises(InputError, match="nowhere: cannot be read"):
        find_config(kernel(), tmp_path / "k", tmp_path / "nowhere")
    with pytest.raises(InputError, match="damaged: its own configuration: it ends early"):
        find_config(kernel(b"IKCFG_ST" + gzip.compress(b"CONFIG_OWN=y\n")[:-9] + b"IKCFG_ED"), tmp_path / "k")
    with pytest.raises(InputError, match="damaged: its own configuration"):
        find_config(kernel(b"IKCFG_ST\x1f\x8b\x08" + bytes(40) + b"\xff" * 9 + b"IKCFG_ED"), tmp_path / "k")
