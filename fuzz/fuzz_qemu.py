"""QEMU's option grammar: options that make a VM's configuration, or UsageError, nothing else."""

from __future__ import annotations

from fuzz.outcome import attempt
from swsnp.cli.qemu_options import parse_qemu_options
from swsnp.errors import UsageError

__all__ = ["one", "seeds"]

_FULL = """-enable -smp 4,maxcpus=8 -cpu EPYC-Milan-v2 -name guest=vm1 -m 512M
-machine q35,confidential-guest-support=sev0,memory-backend=ram1
-object memory-backend-memfd,id=ram1,size=512M,share=true,reserve=false
-object sev-snp-guest,id=sev0,cbitpos=51,reduced-phys-bits=1,policy=0x30000,certs-path=a,,b,certs-timeout=5
-bios OVMF.fd -accel builtin"""
_HOST_DATA = "host-data=" + "A" * 43 + "="
_SHORT = f"""-cpu EPYC-Turin -M pc-q35-9.2,confidential-guest-support=s
-object sev-snp-guest,id=s,cbitpos=51,reduced-phys-bits=1,{_HOST_DATA},kernel-hashes=on,certs-filename=/x"""


def seeds() -> list[bytes]:
    """Words end with NUL."""
    lines = (_FULL.replace("-enable ", ""), _FULL, _SHORT, "-m 4G", "-object {}")
    return ["\0".join(line.split()).encode() for line in lines]


def one(data: bytes) -> object:
    """Parse a command line; one that is accepted describes a VM, or says why it cannot."""
    argv = [word.decode("utf-8", "surrogateescape") for word in data.split(b"\0")]
    options, refusal = attempt(lambda: parse_qemu_options(argv), UsageError)
    if refusal:
        return refusal
    config, refusal = attempt(options.vm_config, UsageError)
    if refusal:
        return refusal
    assert config.vcpus <= options.maxcpus
    assert config.memory_size % 4096 == 0
    return "accepted"
