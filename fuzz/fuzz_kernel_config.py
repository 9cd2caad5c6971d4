"""Kernel configuration: values by option and a verdict, or InputError, nothing else."""

from __future__ import annotations

from fuzz.outcome import attempt
from swsnp.errors import InputError
from swsnp.measure.kernel_config import check_config, parse_config

__all__ = ["one", "seeds"]


def seeds() -> list[bytes]:
    """A good one, one that lacks the driver, no configuration; the release is the first line."""
    return [
        b"6.12.1\nCONFIG_AMD_MEM_ENCRYPT=y\nCONFIG_SEV_GUEST=m\nCONFIG_TSM_REPORTS=y\n",
        b"6.1\nCONFIG_AMD_MEM_ENCRYPT=y\n# CONFIG_SEV_GUEST is not set\n",
        b"\nnothing",
    ]


def one(data: bytes) -> object:
    """Every value is in the file; without AMD_MEM_ENCRYPT=y none passes."""
    release, _, text = data.partition(b"\n")
    config, refusal = attempt(lambda: parse_config(text, "config"), InputError)
    if refusal:
        return refusal
    assert all(
        "�" in each or each.encode() in text
        for each in (*config.values, *config.values.values())
        if each != "n"
    )
    _, refusal = attempt(lambda: check_config(config, release.decode(errors="replace")), InputError)
    good = config.values.get("AMD_MEM_ENCRYPT", "y") == "y"
    assert good or refusal
    return refusal
