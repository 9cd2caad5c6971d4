"""Images on disk, and the peer that measures them too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.measure.firmware_volume import FirmwareVolume

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Skip

DEBIAN = Path("/usr/share/ovmf/OVMF.fd")
DEBIAN_13 = Path(__file__).parents[3] / "build/ovmf/usr/share/ovmf/OVMF.fd"
WITHOUT_METADATA = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")


@pytest.fixture(scope="session")
def debian_image(cannot_run: Skip) -> Path:
    """Debian's firmware image with SEV metadata."""
    if not DEBIAN.is_file():
        cannot_run(f"no {DEBIAN}", "apt-get install ovmf")
    if FirmwareVolume(DEBIAN.read_bytes()).sections is None:
        cannot_run(f"{DEBIAN} has no SEV metadata", "Debian 12's ovmf", avoidable=False)
    return DEBIAN


@pytest.fixture(scope="session")
def debian_13_image(cannot_run: Skip) -> Path:
    """Debian 13's firmware image, 4 MiB with SEV metadata."""
    if not DEBIAN_13.is_file():
        cannot_run("Debian 13's OVMF.fd is not here", "tools/debian-package trixie ovmf build/ovmf")
    return DEBIAN_13


@pytest.fixture(scope="session")
def debian_4m(cannot_run: Skip) -> Path:
    """Debian's firmware code of the 4 MiB layout, which has no SEV metadata."""
    if not WITHOUT_METADATA.is_file():
        cannot_run(f"no {WITHOUT_METADATA}", "apt-get install ovmf")
    return WITHOUT_METADATA


@pytest.fixture(scope="session")
def peer(cannot_run: Skip) -> Callable[..., bytes]:
    """sev-snp-measure: digest of keyword arguments, as `calc_launch_digest` takes them."""
    try:
        from sevsnpmeasure import guest
        from sevsnpmeasure.sev_mode import SevMode
        from sevsnpmeasure.vmm_types import VMMType
    except ImportError:
        cannot_run("sev-snp-measure is not installed", "pip install sev-snp-measure")
    modes = {
        "sev": SevMode.SEV,
        "seves": SevMode.SEV_ES,
        "snp": SevMode.SEV_SNP,
        "snp:svsm": SevMode.SEV_SNP_SVSM,
    }

    def digest(mode: str, ovmf: Path, **given: Any) -> bytes:
        if mode == "snp:ovmf-hash":
            return bytes(guest.calc_snp_ovmf_hash(str(ovmf)))
        vmm = getattr(VMMType, given.pop("vmm", "QEMU"))
        wanted = {
            "vcpus": 1,
            "vcpu_sig": 0,
            **dict.fromkeys(("kernel", "initrd", "append"), ""),
            "guest_features": 1,
            **{key: str(value) if isinstance(value, Path) else value for key, value in given.items()},
        }
        found = guest.calc_launch_digest(modes[mode], ovmf_file=str(ovmf), vmm_type=vmm, **wanted)
        return bytes(found)

    return digest
