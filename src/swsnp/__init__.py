"""AMD SEV-SNP attestation in software: guest driver, GHCB, KVM, VMM and secure processor.

Importing this package loads nothing else; names are fetched when they are first used.
"""

from __future__ import annotations

from swsnp._version import __version__

TYPE_CHECKING = False  # `typing` itself would be an eighth of a short command's time
if TYPE_CHECKING:
    from swsnp.abi.snp_report import Product
    from swsnp.errors import HostError, InputError, LayoutError, SwsnpError, UsageError, VerificationError
    from swsnp.machine import Machine, VirtualMachine

__all__ = [
    "HostError",
    "InputError",
    "LayoutError",
    "Machine",
    "Product",
    "SwsnpError",
    "UsageError",
    "VerificationError",
    "VirtualMachine",
    "__version__",
]

_HOMES = {
    "Machine": "swsnp.machine",
    "VirtualMachine": "swsnp.machine",
    "Product": "swsnp.abi.snp_report",
    **dict.fromkeys(
        ("HostError", "InputError", "LayoutError", "SwsnpError", "UsageError", "VerificationError"),
        "swsnp.errors",
    ),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'swsnp' has no attribute {name!r}")
    from importlib import import_module  # the import is what is put off

    return getattr(import_module(_HOMES[name]), name)
