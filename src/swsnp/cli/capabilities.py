"""`swsnp capabilities`: what this build and this host can do, for people and for VMMs that probe."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from swsnp._version import __version__
from swsnp.cli import GOOD, common

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """The verb."""
    command = common.parser("capabilities")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    options = command.parse_args(arguments)
    found = capabilities()
    if options.json:
        print(json.dumps(found, indent=2))
        return GOOD
    for name, value in found.items():
        print(f"{name:14} {_text(value)}")
    return GOOD


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_text(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(_text(each) for each in value)
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def capabilities() -> dict[str, Any]:
    """What can be done here; a thing that cannot carries its reason and remedy."""
    from swsnp.abi.snp_report import Product
    from swsnp.cpu.plain_kvm.probe import probe
    from swsnp.front.wrap import doctor
    from swsnp.hypervisor.profiles import DEFAULT, PROFILES

    kvm, seccomp = probe(), doctor.examine()
    return {
        "version": __version__,
        "profiles": {
            name: {"certificate_exit": each.cert_exit.exit_reason if each.cert_exit else None}
            for name, each in PROFILES.items()
        },
        "default_profile": DEFAULT,
        "products": [each.value for each in Product],
        "accelerators": {"builtin": {"usable": True}, "kvm": _verdict(kvm.usable, kvm.reason, kvm.remedy)},
        "run_backends": {"seccomp": _verdict(seccomp.usable, seccomp.reason, seccomp.remedy)},
        "signers": {"cryptography": True, "awscrt": find_spec("awscrt") is not None},
        "key_service": _client(usable=find_spec("urllib3") is not None),
        "doors": ["run", "kds serve"],
    }


def _client(*, usable: bool) -> dict[str, Any]:
    return _verdict(usable, "urllib3 is not installed", "pip install 'swsnp[kds]'")


def _verdict(usable: bool, reason: str, remedy: str) -> dict[str, Any]:
    return {"usable": True} if usable else {"usable": False, "reason": reason, "remedy": remedy}
