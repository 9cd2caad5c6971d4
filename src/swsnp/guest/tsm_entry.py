"""One entry of configfs-tsm: what was written, the generations, the blobs.

Source: Linux, drivers/virt/coco/guest/report.c; Documentation/ABI/testing/configfs-tsm-report.

Two counters tell whether the blobs belong to what was written: every accepted write adds one to the write
generation, and a successful report sets the read generation to it.
"""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from swsnp.guest.tsm_report import INBLOB_SIZE, Blobs, ReportInput
from swsnp.guest.tsm_text import NULL_GUID, TsmError, parse_guid, parse_u32

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.guest.tsm_report import TsmProvider

__all__ = ["ATTRIBUTES", "AttributeKind", "Entry", "Registry"]

PRIVLEVEL_MAX: Final = 3
OUTBLOB_MAX: Final = 32 << 10
TEXT_SIZE: Final = 4096
_GENERATION_MASK: Final = (1 << 64) - 1
_READ_ONLY: Final = 0o444
_WRITE_ONLY: Final = 0o200


class Registry:
    """Who serves the entries, and the lock that the kernel holds over every operation on one of them.

    Attributes:
        lock: held while a report is made, so that operations on other entries wait.
        provider: None while no driver is bound.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.provider: TsmProvider | None = None

    def served(self) -> TsmProvider:
        """The provider; raises TsmError(ENXIO) when there is none."""
        if self.provider is None:
            raise TsmError(errno.ENXIO)
        return self.provider


class Entry:
    """The state behind one directory below `report`."""

    def __init__(self, registry: Registry, *, services: bool) -> None:
        """A new entry: nothing written, generation 0.

        Args:
            registry: where the provider is looked up at each use.
            services: whether the attributes about services exist in it.
        """
        self._registry = registry
        self._given = ReportInput()
        self._written = self._read = 0
        self._blobs = Blobs()
        self.dead = False
        self.kinds: Final = {each.name: each for each in ATTRIBUTES if services or not each.services}

    def show(self, kind: AttributeKind) -> bytes:
        """The value of an attribute; for a blob this may ask the firmware.

        Raises:
            TsmError: ENOENT when the entry was removed, else the attribute's own.
        """
        if kind.show is None:
            raise TsmError(errno.EACCES)
        with self._registry.lock:
            self._require_alive()
            return kind.show(self)

    def store(self, kind: AttributeKind, data: bytes) -> None:
        """Set an attribute.

        Raises:
            TsmError: ENOENT when the entry was removed, else the attribute's own; then nothing is changed,
                but see `store_service_guid`.
        """
        if kind.store is None:
            raise TsmError(errno.EACCES)
        with self._registry.lock:
            self._require_alive()
            kind.store(self, data)

    def _require_alive(self) -> None:
        if self.dead:
            raise TsmError(errno.ENOENT)

    # text that is read

    def show_generation(self) -> bytes:
        """The write generation."""
        return b"%d\n" % self._written

    def show_provider(self) -> bytes:
        """The provider's name; ENXIO."""
        return b"%s\n" % self._registry.served().name.encode()

    def show_privlevel_floor(self) -> bytes:
        """The lowest level that may be written; ENXIO."""
        return b"%d\n" % self._registry.served().privlevel_floor

    # what is written

    def _advance(self) -> None:
        """Count a write; EBUSY when 2^64 writes without a read would make old blobs look fresh."""
        advanced = self._written + 1 & _GENERATION_MASK
        if advanced == self._read:
            raise TsmError(errno.EBUSY)
        self._written = advanced

    def store_inblob(self, data: bytes) -> None:
        """Up to 64 bytes; the provider judges the length when a report is made."""
        self._advance()
        self._given = replace(self._given, inblob=data)

    def store_privlevel(self, text: bytes) -> None:
        """0 to 3 and not below the floor: EINVAL. ENXIO without provider."""
        level = parse_u32(text)
        if not self._registry.served().privlevel_floor <= level <= PRIVLEVEL_MAX:
            raise TsmError(errno.EINVAL)
        self._advance()
        self._given = replace(self._given, privlevel=level)

    def store_service_provider(self, text: bytes) -> None:
        """Any text up to a NUL, less one newline at its end; judged when a report is made."""
        self._advance()
        name = text.removesuffix(b"\n").partition(b"\0")[0]
        self._given = replace(self._given, service_provider=name)

    def store_service_guid(self, text: bytes) -> None:
        """A GUID as text. A bad one (EINVAL) counts as a write too and leaves the null GUID."""
        self._given = replace(self._given, service_guid=NULL_GUID)
        self._advance()
        self._given = replace(self._given, service_guid=parse_guid(text))

    def store_service_manifest_version(self, text: bytes) -> None:
        """Any 32-bit number."""
        version = parse_u32(text)
        self._advance()
        self._given = replace(self._given, service_manifest_version=version)

    # blobs

    def show_outblob(self) -> bytes:
        """The report."""
        return self._report().outblob or b""

    def show_auxblob(self) -> bytes:
        """The certificate table; empty when the host had none."""
        return self._report().auxblob

    def show_manifestblob(self) -> bytes:
        """A service's manifest."""
        return self._report().manifestblob

    def _report(self) -> Blobs:
        """The blobs of what is written now, from the last report or from a new one.

        A failure leaves no blobs, so the next read asks again. An auxblob of an earlier report is never left
        beside a later one without certificates (Linux keeps its length).

        Raises:
            TsmError: EINVAL without inblob, ENXIO without provider, else the provider's.
        """
        if not self._given.inblob:
            raise TsmError(errno.EINVAL)
        if self._blobs.outblob is None or self._read != self._written:
            provider = self._registry.served()
            self._blobs = Blobs()
            self._blobs = provider.report_new(self._given)
            self._read = self._written
        return self._blobs


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributeKind:
    """One attribute file.

    Attributes:
        name: of the file.
        show: makes its value; None when it cannot be read.
        store: takes a value; None when it cannot be written.
        max_size: of a binary value, in bytes; None for text.
        services: exists only where services do.
    """

    name: str
    show: Callable[[Entry], bytes] | None = None
    store: Callable[[Entry, bytes], None] | None = None
    max_size: int | None = None
    services: bool = False

    @property
    def binary(self) -> bool:
        """Whether it is a binary attribute."""
        return self.max_size is not None

    @property
    def mode(self) -> int:
        """Permission bits."""
        return _READ_ONLY if self.store is None else _WRITE_ONLY

    @property
    def st_size(self) -> int:
        """What stat shows: a page for text, nothing for binary."""
        return 0 if self.binary else TEXT_SIZE


ATTRIBUTES: Final = (
    AttributeKind(name="generation", show=Entry.show_generation),
    AttributeKind(name="provider", show=Entry.show_provider),
    AttributeKind(name="privlevel", store=Entry.store_privlevel),
    AttributeKind(name="privlevel_floor", show=Entry.show_privlevel_floor),
    AttributeKind(name="service_provider", store=Entry.store_service_provider, services=True),
    AttributeKind(name="service_guid", store=Entry.store_service_guid, services=True),
    AttributeKind(name="service_manifest_version", store=Entry.store_service_manifest_version, services=True),
    AttributeKind(name="inblob", store=Entry.store_inblob, max_size=INBLOB_SIZE),
    AttributeKind(name="outblob", show=Entry.show_outblob, max_size=OUTBLOB_MAX),
    AttributeKind(name="auxblob", show=Entry.show_auxblob, max_size=OUTBLOB_MAX),
    AttributeKind(name="manifestblob", show=Entry.show_manifestblob, max_size=OUTBLOB_MAX, services=True),
)
