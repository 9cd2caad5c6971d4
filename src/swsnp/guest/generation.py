"""Generations of the sev-guest driver, as data. Source: Linux, drivers/virt/coco/sev-guest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from swsnp.abi.sev_guest import EXITINFO2_UNSET

__all__ = ["K_A", "K_B", "K_C", "DriverGeneration"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverGeneration:
    """How a range of kernels differs from the others.

    Attributes:
        name: for people.
        key_before_command: an empty VMPCK is noticed before the command number, and nothing is written back.
        refused_exitinfo2: exitinfo2 of a request that never reached VMGEXIT (no key, counter exhausted).
        rax_always: RAX of an extended request names the certificate buffer even when no page is offered.
    """

    name: str
    key_before_command: bool
    refused_exitinfo2: int
    rax_always: bool


K_A: Final = DriverGeneration(
    name="Linux 6.3 to 6.12", key_before_command=True, refused_exitinfo2=EXITINFO2_UNSET, rax_always=True
)
K_B: Final = DriverGeneration(
    name="Linux 6.13 to 6.16", key_before_command=False, refused_exitinfo2=EXITINFO2_UNSET, rax_always=False
)
K_C: Final = DriverGeneration(
    name="Linux 6.17 to 7.0", key_before_command=False, refused_exitinfo2=0, rax_always=False
)
