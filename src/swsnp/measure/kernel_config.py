"""A kernel's configuration, as far as an SNP guest depends on it, judged before anything is started.

Source: Linux, Documentation/kbuild/kconfig-language.rst; kernel/configs.c for one inside the image.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from swsnp.errors import InputError
from swsnp.measure.compression import expand_gzip

if TYPE_CHECKING:
    from pathlib import Path

    from swsnp.measure.kernel_image import KernelImage

__all__ = ["KernelConfig", "check_config", "find_config", "parse_config"]

_START, _END = b"IKCFG_ST", b"IKCFG_ED"
_LARGEST: Final = 8 << 20
"""Real ones have 300 KiB."""
_LINE: Final = re.compile(r"^(?:CONFIG_(\w+)=(.*)|# CONFIG_(\w+) is not set)$", re.MULTILINE)
_VERSION: Final = re.compile(r"(\d+)\.(\d+)")
_BUILT_IN: Final = ("y",)
_BUILT: Final = ("y", "m")
_WANTED: Final = (
    ("AMD_MEM_ENCRYPT", _BUILT_IN, (0, 0), "SEV-SNP in the kernel itself"),
    ("SEV_GUEST", _BUILT, (5, 19), "/dev/sev-guest"),
    ("TSM_REPORTS", _BUILT, (6, 7), "configfs-tsm"),
)
"""Option, values that will do, the first version that has it, what it is for."""


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Values by option without CONFIG_, "n" for those that are not set; `origin` names the file."""

    values: dict[str, str]
    origin: str


def find_config(kernel: KernelImage, image: Path, named: Path | None = None) -> KernelConfig | None:
    """The configuration: the file that is named, else inside the image, else `config-RELEASE` beside it.

    Args:
        kernel: what was read from `image`.
        image: the kernel file.
        named: what the user says is its configuration.

    Returns:
        None when there is none of them.

    Raises:
        InputError: it is there and cannot be read, or is no configuration.
    """
    if named is not None:
        return _read(named)
    if (inside := _inside(kernel, str(image))) is not None:
        return inside
    # the name behind the first dash is the release for distributions' files; others have it in the header
    releases = dict.fromkeys((image.name.partition("-")[2], kernel.release))
    for release in filter(None, releases):
        beside = image.with_name(f"config-{release}")
        if beside.is_file():
            return _read(beside)
    return None


def check_config(config: KernelConfig, release: str) -> None:
    """See that the kernel has what an SNP guest needs, as far as its version knows the option.

    Raises:
        InputError: it has not: the option, got and wanted.
    """
    version = _VERSION.match(release)
    known = (int(version[1]), int(version[2])) if version is not None else None
    for option, wanted, since, purpose in _WANTED:
        if option not in config.values if known is None else known < since:
            continue
        got = config.values.get(option, "n")
        if got not in wanted:
            raise InputError(
                f"{config.origin}: CONFIG_{option}: got {got}, wanted {' or '.join(wanted)}; "
                f"{purpose} needs it"
            )


def parse_config(text: bytes, origin: str) -> KernelConfig:
    """Take a configuration's text apart.

    Raises:
        InputError: no line of it is an option.
    """
    lines = _LINE.finditer(text.decode(errors="replace"))
    values = {each[1] or each[3]: "n" if each[1] is None else each[2].strip() for each in lines}
    if not values:
        raise InputError(f"{origin}: wanted a kernel's configuration (lines like CONFIG_SMP=y), has none")
    return KernelConfig(values, origin)


def _read(path: Path) -> KernelConfig:
    try:
        return parse_config(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _inside(kernel: KernelImage, name: str) -> KernelConfig | None:
    """What CONFIG_IKCONFIG puts into the image: gzip data between two marks."""
    for segment in kernel.segments:
        start = segment.data.find(_START + b"\x1f\x8b")
        end = segment.data.find(_END, start)
        if -1 not in (start, end):
            try:
                text = expand_gzip(segment.data[start + len(_START) : end], _LARGEST)
            except (ValueError, zlib.error) as error:
                raise InputError(f"{name}: damaged: its own configuration: {error}") from None
            return parse_config(text, f"{name} (its own configuration)")
    return None
