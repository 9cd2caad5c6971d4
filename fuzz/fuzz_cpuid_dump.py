"""CPUID dump: parses into functions of 32-bit numbers that make rules, or LayoutError, nothing else."""

from __future__ import annotations

from fuzz.outcome import attempt
from swsnp.errors import LayoutError
from swsnp.firmware.cpuid import corrected
from swsnp.firmware.cpuid_host import host_rules, parse_dump
from swsnp.firmware.cpuid_rules import Limits

__all__ = ["one", "seeds"]

_ALL = (1 << 64) - 1
_LINE = b"   0x%08x 0x%02x: eax=0x%08x ebx=0x%08x ecx=0x%08x edx=0x%08x\n"


def seeds() -> list[bytes]:
    """One line, a CPU with extended state, two CPUs, no line at all."""
    vendor, state = (0, 0, 16, 1, 2, 3), [(13, 0, 7, 0x340, 0x988, 0), (13, 2, 256, 576, 0, 0)]
    lines = b"".join(_LINE % each for each in (vendor, *state))
    return [_LINE % vendor, b"CPU 0:\n" + lines, b"CPU 0:\n" + lines + b"CPU 1:\n" + lines, b"CPU:\n"]


def one(data: bytes) -> object:
    """Parse; what the rules correct is in order after that, whatever state is enabled."""
    found, refusal = attempt(lambda: parse_dump(data.decode("latin-1")), LayoutError)
    if refusal:
        return refusal
    rules, limits = host_rules(found), Limits(fms=0xA00F11)
    for each in found:
        for enabled in (0, _ALL):
            fixed = corrected(each.but(xcr0_in=enabled, xss_in=enabled), rules, limits)
            assert corrected(fixed, rules, limits) == fixed
    return len(found)
