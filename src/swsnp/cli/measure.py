"""`swsnp measure`: the launch digest of a guest, with sev-snp-measure's options.

Everything here that the plain digest does not need is imported where it is used: Python's start is most of
the command's time.
"""

from __future__ import annotations

import os
import sys

from swsnp.cli import GOOD
from swsnp.cli.arguments import parser
from swsnp.errors import InputError, UsageError
from swsnp.measure.vmsa_pages import CPU_SIGNATURES, Vmm

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from mmap import mmap
    from typing import Final

    from swsnp.measure.firmware_volume import FirmwareVolume
    from swsnp.measure.kernel_hashes import KernelHashes
    from swsnp.measure.launch_plan import LaunchConfig
    from swsnp.measure.svsm import Svsm

__all__ = [
    "add_options",
    "config_of",
    "digest_of",
    "firmware_of",
    "hash_file",
    "ignored",
    "parse",
    "read_image",
    "run",
]

MODES: Final = ("sev", "seves", "snp", "snp:ovmf-hash", "snp:svsm")
_IMAGE_MAX: Final = 256 << 20
_WITH_VCPUS: Final = ("seves", "snp", "snp:svsm")
_KERNEL: Final = ("kernel", "initrd", "append")
_VCPU: Final = ("vcpu_type", "vcpu_sig", "vcpu_family", "vcpu_model", "vcpu_stepping")
_SVSM: Final = ("svsm", "vars_size", "vars_file")
_UNUSED: Final = {
    "sev": ("vcpus", *_VCPU, "guest_features", "snp_ovmf_hash", "vmsa_field", *_SVSM),
    "seves": ("guest_features", "snp_ovmf_hash", *_SVSM),
    "snp": _SVSM,
    "snp:ovmf-hash": ("vcpus", *_VCPU, "guest_features", "snp_ovmf_hash", "vmsa_field", *_KERNEL, *_SVSM),
    "snp:svsm": ("guest_features", *_KERNEL),
}
"""What a mode does not look at; giving it is told, not refused, so that scripts carry over."""
_EPILOG: Final = """swsnp measure diff [options] -- [options]
  names the first page in which two guests differ, and why; the second guest has the options
  of the first except those given again behind the --. Exit code 1 when they differ.

swsnp measure kernel --cbitpos N -kernel K [-initrd I] [-append S] [-m SIZE] [-smp N]
  is the guest that swsnp vm -kernel starts without firmware.

Modes: sev and seves are measured with SHA-256 over everything loaded; snp with the launch digest;
snp:ovmf-hash is the launch digest after the firmware image alone, for --snp-ovmf-hash; snp:svsm is
a guest that starts in Coconut-SVSM, and wants --svsm and one of --vars-size and --vars-file."""


def run(arguments: Sequence[str]) -> int:
    """The verb."""
    if arguments[:1] == ["diff"]:
        from swsnp.cli.measure_explain import run_diff

        return run_diff(arguments[1:])
    if arguments[:1] == ["kernel"]:
        from swsnp.cli.measure_kernel import run_kernel

        return run_kernel(arguments[1:])
    options = parse(arguments)
    if options.explain:
        from swsnp.cli.measure_explain import run_explain

        return run_explain(options)
    digest = digest_of(options)
    if options.dump_vmsa:
        from swsnp.cli.measure_explain import dump_vmsa

        dump_vmsa(config_of(options))
    _show(options, digest)
    return GOOD


def _show(options: argparse.Namespace, digest: bytes) -> None:
    if options.json:
        import json

        shown = {"mode": options.mode, "measurement": digest.hex(), "ignored": ignored(options)}
        print(json.dumps(shown, indent=2))
        return
    text = encode(digest, options.output_format)
    named = options.verbose and options.mode in _MODE_NAMES
    print(f"Calculated {_MODE_NAMES[options.mode]} guest measurement: {text}" if named else text)


_MODE_NAMES: Final = {
    "sev": "SEV",
    "seves": "SEV_ES",
    "snp": "SEV_SNP",
    "snp:svsm": "SEV_SNP_SVSM",
}


def encode(digest: bytes, form: str) -> str:
    """Hex or base64."""
    if form == "hex":
        return digest.hex()
    from base64 import b64encode

    return b64encode(digest).decode()


# --- options ------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse one guest's options and tell what its mode does not look at."""
    command = parser("measure", epilog=_EPILOG)
    add_options(command)
    options = command.parse_args(arguments)
    check(options)
    for name in ignored(options):
        print(f"swsnp measure: {name} is not looked at in mode {options.mode}", file=sys.stderr)
    return options


def add_options(command: argparse.ArgumentParser) -> None:
    """The options: sev-snp-measure's, then ours."""
    add = command.add_argument
    add("--mode", choices=MODES, required=True, help="guest mode")
    add("--vcpus", type=int, metavar="N", help="number of guest vCPUs")
    add("--vcpu-type", choices=CPU_SIGNATURES, metavar="CPUTYPE", help=f"one of {', '.join(CPU_SIGNATURES)}")
    add("--vcpu-sig", type=_number, metavar="VALUE", help="vCPU signature, CPUID Fn1 EAX")
    add("--vcpu-family", type=int, metavar="FAMILY", help="vCPU family; with --vcpu-model, --vcpu-stepping")
    add("--vcpu-model", type=int, metavar="MODEL", help="vCPU model")
    add("--vcpu-stepping", type=int, metavar="STEPPING", help="vCPU stepping")
    add("--vmm-type", default=Vmm.QEMU.value, metavar="VMMTYPE", help="QEMU (default), ec2 or gce")
    add("--ovmf", required=True, metavar="PATH", help="firmware image")
    add("--kernel", metavar="PATH", help="kernel, measured by its hash")
    add("--initrd", metavar="PATH", help="initial RAM disk, with --kernel")
    add("--append", metavar="CMDLINE", help="kernel command line, with --kernel")
    add("--guest-features", type=_number, metavar="VALUE", help="SEV_FEATURES (default: 0x1)")
    add("--output-format", choices=("hex", "base64"), default="hex", help="form of the digest")
    add("--snp-ovmf-hash", metavar="HASH", help="what mode snp:ovmf-hash printed, in place of the image")
    add("--dump-vmsa", action="store_true", help="write the measured VMSA pages to vmsa<N>.bin")
    add("--svsm", metavar="PATH", help="SVSM image (snp:svsm)")
    sizes = command.add_mutually_exclusive_group()
    sizes.add_argument("--vars-size", type=int, metavar="SIZE", help="bytes of the variable store (snp:svsm)")
    sizes.add_argument("--vars-file", metavar="PATH", help="the variable store (snp:svsm)")
    add("-v", "--verbose", action="store_true", help="say what the digest is")
    add(
        "--allow-no-metadata",
        action="store_true",
        help="measure an image without SEV metadata, which no SNP guest can attest from",
    )
    add(
        "--vmsa-field",
        action="append",
        metavar="NAME=VALUE",
        help="a register that this VMM sets otherwise, such as x87_fcw=0x37f; may be repeated",
    )
    add(
        "--explain",
        action="store_true",
        help="show every page or run of equal pages, and the digest after it",
    )
    add("--json", action="store_true", help="machine-readable output")


def _number(text: str) -> int:
    return int(text, 0)


def ignored(options: argparse.Namespace) -> list[str]:
    """Options that were given and that the mode does not look at."""
    given = (name for name in _UNUSED[options.mode] if getattr(options, name) is not None)
    return [f"--{name.replace('_', '-')}" for name in given]


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be meant; UsageError."""
    mode = options.mode
    if options.vmm_type not in {each.value for each in Vmm}:
        known = ", ".join(each.value for each in Vmm)
        raise UsageError(f"--vmm-type: got {options.vmm_type!r}, wanted one of {known}")
    if mode in _WITH_VCPUS:
        _check_vcpus(options)
    if not options.kernel and (options.initrd or options.append):
        which = "--initrd" if options.initrd else "--append"
        raise UsageError(f"--kernel is missing: it is required with {which}")
    if mode == "snp:svsm":
        _check_svsm(options)
    if options.dump_vmsa and mode not in _WITH_VCPUS:
        raise UsageError(f"--dump-vmsa: got mode {mode}, wanted one of {', '.join(_WITH_VCPUS)}")
    if options.explain and mode not in ("snp", "snp:svsm"):
        raise UsageError(f"--explain: got mode {mode}, wanted snp or snp:svsm: the others are one hash")
    if options.explain and options.snp_ovmf_hash:
        raise UsageError("--explain: got --snp-ovmf-hash, wanted the image: its pages are part of the story")


def _check_vcpus(options: argparse.Namespace) -> None:
    if options.vcpus is None:
        raise UsageError(f"--vcpus is missing in mode {options.mode}")
    kinds = (options.vcpu_type, options.vcpu_sig, options.vcpu_family)
    if options.vmm_type == Vmm.QEMU.value and all(each is None for each in kinds):
        raise UsageError(f"one of --vcpu-type, --vcpu-sig, --vcpu-family is missing in mode {options.mode}")
    if options.vcpu_family is not None and None in (options.vcpu_model, options.vcpu_stepping):
        raise UsageError("--vcpu-family: wanted --vcpu-model and --vcpu-stepping with it")
    if options.vcpu_family is None and (options.vcpu_model, options.vcpu_stepping) != (None, None):
        raise UsageError("--vcpu-family is missing: --vcpu-model and --vcpu-stepping mean nothing without it")


def _check_svsm(options: argparse.Namespace) -> None:
    if not options.svsm:
        raise UsageError("--svsm is missing in mode snp:svsm")
    if options.vars_size is None and options.vars_file is None:
        raise UsageError("one of --vars-size, --vars-file is missing in mode snp:svsm")
    if options.snp_ovmf_hash:
        raise UsageError("--snp-ovmf-hash: got mode snp:svsm, wanted snp")


# --- from options to a guest --------------------------------------------------------------------------------


def digest_of(options: argparse.Namespace) -> bytes:
    """What the plain command prints."""
    firmware = firmware_of(options)
    if options.mode == "snp:ovmf-hash":
        from swsnp.measure.launch_plan import image_digest

        return image_digest(firmware)
    if options.mode in ("sev", "seves"):
        from swsnp.measure.legacy import sev_digest, sev_es_digest

        if options.mode == "sev":
            return sev_digest(firmware, _hashes(options))
        return sev_es_digest(config_of(options, firmware))
    from swsnp.measure.launch_plan import launch_digest

    return launch_digest(config_of(options, firmware), after_image=_after_image(options))


def _after_image(options: argparse.Namespace) -> bytes | None:
    if not options.snp_ovmf_hash:
        return None
    try:
        digest = bytes.fromhex(options.snp_ovmf_hash)
    except ValueError:
        digest = b""
    if len(digest) != 48:
        raise UsageError(f"--snp-ovmf-hash: got {options.snp_ovmf_hash!r}, wanted 96 hex digits")
    return digest


def firmware_of(options: argparse.Namespace) -> FirmwareVolume:
    """The image of --ovmf."""
    from swsnp.measure.firmware_volume import FirmwareVolume

    return FirmwareVolume(read_image(options.ovmf))


def config_of(options: argparse.Namespace, firmware: FirmwareVolume | None = None) -> LaunchConfig:
    """The guest that the options describe."""
    from swsnp.measure.launch_plan import LaunchConfig

    firmware = firmware or firmware_of(options)
    svsm = _svsm(options, firmware) if options.mode == "snp:svsm" else None
    return LaunchConfig(
        firmware,
        vcpus=options.vcpus,
        signature=_signature(options),
        vmm=Vmm(options.vmm_type),
        features=_features(options),
        hashes=None if svsm is not None else _hashes(options),
        svsm=svsm,
        vmsa_fields=_vmsa_fields(options.vmsa_field or ()),
        allow_no_metadata=options.allow_no_metadata,
    )


def _features(options: argparse.Namespace) -> int:
    from swsnp.measure.vmsa_pages import SNP_ACTIVE

    if options.mode == "seves":
        return 0
    if options.mode == "snp:svsm" or options.guest_features is None:
        return SNP_ACTIVE
    return int(options.guest_features)


def _signature(options: argparse.Namespace) -> int:
    """The peer's precedence: family, then signature, then type."""
    from swsnp.measure.vmsa_pages import cpu_signature

    if options.vcpu_family is not None:
        return cpu_signature(options.vcpu_family, options.vcpu_model, options.vcpu_stepping)
    if options.vcpu_sig is not None:
        if not 0 <= options.vcpu_sig < 1 << 32:
            raise UsageError(
                f"--vcpu-sig: got {options.vcpu_sig:#x}, wanted 4 bytes unsigned (CPUID Fn1 EAX)"
            )
        return int(options.vcpu_sig)
    return CPU_SIGNATURES[options.vcpu_type] if options.vcpu_type is not None else 0


def _vmsa_fields(texts: Sequence[str]) -> dict[str, int]:
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = int(value, 0)
        except ValueError:
            raise UsageError(f"--vmsa-field: got {text!r}, wanted NAME=VALUE") from None
    return found


def _svsm(options: argparse.Namespace, firmware: FirmwareVolume) -> Svsm:
    from swsnp.measure.svsm import Svsm

    vars_size = options.vars_size
    if vars_size is None:
        vars_size = len(read_image(options.vars_file))
    return Svsm(read_image(options.svsm), firmware=firmware, vars_size=vars_size)


def _hashes(options: argparse.Namespace) -> KernelHashes | None:
    if not options.kernel:
        return None
    from swsnp.measure.kernel_hashes import NO_INITRD, KernelHashes

    initrd = hash_file(options.initrd) if options.initrd else NO_INITRD
    return KernelHashes(hash_file(options.kernel), initrd, os.fsencode(options.append or ""))


def read_image(path: str) -> bytes | mmap:
    """A whole file of at most 256 MiB; a regular one is mapped, which costs half of what reading it does.

    Raises:
        InputError: it cannot be read, or is larger.
    """
    try:
        with open(path, "rb") as file:  # noqa: PTH123  # pathlib is slow to load
            size = os.fstat(file.fileno()).st_size
            if not 0 < size <= _IMAGE_MAX:  # a pipe has no size
                data = file.read(_IMAGE_MAX + 1)
            else:
                from mmap import ACCESS_READ, mmap

                return mmap(file.fileno(), size, access=ACCESS_READ)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _IMAGE_MAX:
        raise InputError(f"{path}: got more than {_IMAGE_MAX} bytes, wanted an image")
    return data


def hash_file(path: str) -> bytes:
    """SHA-256 of a file of any size; InputError when it cannot be read."""
    from hashlib import file_digest

    try:
        with open(path, "rb") as file:  # noqa: PTH123  # as read_image
            return file_digest(file, "sha256").digest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
