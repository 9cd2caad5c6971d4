"""Firmware image: a launch whose digest is that of its pages, or LayoutError or UsageError, nothing else."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Final

from fuzz.outcome import attempt
from swsnp.abi.snp_page import PAGE
from swsnp.errors import LayoutError, UsageError
from swsnp.measure.explain import explain
from swsnp.measure.firmware_volume import FirmwareVolume
from swsnp.measure.kernel_hashes import KernelHashes
from swsnp.measure.launch_plan import LaunchConfig, Region, launch_digest, launch_plan
from swsnp.measure.svsm import Svsm
from swsnp.measure.vmsa_pages import Vmm
from swsnp.testing.firmware_image import firmware_image

__all__ = ["one", "seeds"]

_HASHES: Final = KernelHashes(hashlib.sha256(b"kernel").digest())
_PAGES_MAX: Final = 2048
"""Of what is hashed here: a section may be as large as the space below 4 GiB."""


def seeds() -> list[bytes]:
    """An image of each kind, one page long, and its table alone."""
    images = [
        firmware_image(size=PAGE),
        firmware_image(size=PAGE, sections=None),
        firmware_image(size=PAGE, sections=[(0x80_0000, PAGE, 2)], svsm_entry=16, reset_eip=None),
    ]
    return [*images, *(each[-600:] for each in images), b""]


def _configs(data: bytes) -> list[LaunchConfig]:
    firmware = FirmwareVolume(data)
    sound = FirmwareVolume(firmware_image(size=PAGE))
    return [
        LaunchConfig(firmware, vcpus=2),
        LaunchConfig(firmware, vcpus=1, vmm=Vmm.EC2, allow_no_metadata=True),
        LaunchConfig(firmware, vcpus=1, hashes=_HASHES),
        LaunchConfig(sound, vcpus=1, svsm=Svsm(data, firmware=sound, vars_size=PAGE)),
    ]


def _regions(config: LaunchConfig) -> list[Region]:
    return list(launch_plan(config))


def one(data: bytes) -> object:
    """Measure it as a firmware, with and without a kernel, and as an SVSM; explaining comes to the same."""
    whole = data.rjust(-(-len(data) // PAGE) * PAGE, b"\xff")
    configs, refusal = attempt(lambda: _configs(whole), LayoutError)
    if refusal:
        return refusal
    outcomes: list[object] = []
    for config in configs:
        regions, refusal = attempt(partial(_regions, config), LayoutError, UsageError)
        if refusal:
            outcomes.append(refusal)
            continue
        npages = sum(region.npages for region in regions)
        assert npages <= 1 << 20 | 2
        if npages <= _PAGES_MAX:
            assert list(explain(config))[-1].digest == launch_digest(config)
        outcomes.append(len(regions))
    return tuple(outcomes)
