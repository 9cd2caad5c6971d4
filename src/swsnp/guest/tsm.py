"""configfs-tsm as a tree of directories and attributes, without any door.

Source: Linux, drivers/virt/coco/guest/report.c, fs/configfs/dir.c; fs/namei.c for errno values of path calls.
Permissions beyond a file's own mode are the door's: everything here belongs to root.

    tsm = ConfigfsTsm()
    tsm.register(SevGuestProvider(get_ext_report))
    tsm.report.mkdir("r")
    tsm.report.child("r").open("inblob", os.O_WRONLY)
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, TypeAlias

from swsnp.guest.tsm_entry import AttributeKind, Entry, Registry
from swsnp.guest.tsm_file import BinaryFile, TextFile, TsmFile
from swsnp.guest.tsm_text import TsmError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from swsnp.guest.tsm_report import TsmProvider

__all__ = [
    "Attribute",
    "ConfigfsTsm",
    "Directory",
    "EntryDirectory",
    "ReportDirectory",
    "TsmError",
    "TsmFile",
    "TsmNode",
]

DIRECTORY_MODE: Final = 0o755
_NAME_MAX: Final = 255
_ACCESS_BITS: Final = {os.O_RDONLY: 0o444, os.O_WRONLY: 0o222}


class Attribute:
    """A file in an entry."""

    def __init__(self, entry: Entry, kind: AttributeKind) -> None:
        self._entry, self.kind = entry, kind

    def open(self, flags: int) -> TsmFile:
        """Open; O_CREAT and O_TRUNC mean nothing to a file that exists.

        Raises:
            TsmError: ENOTDIR for O_DIRECTORY; EACCES for a direction that the mode does not have, even for
                root; ENOENT when the entry was removed.
        """
        if flags & os.O_DIRECTORY:
            raise TsmError(errno.ENOTDIR)
        access = flags & os.O_ACCMODE
        if not self.kind.mode & _ACCESS_BITS.get(access, 0):
            raise TsmError(errno.EACCES)
        if self._entry.dead:
            raise TsmError(errno.ENOENT)
        return (BinaryFile if self.kind.binary else TextFile)(self._entry, self.kind, access)


class Directory:
    """A directory, mode 0755, in which nothing can be made or removed."""

    def __init__(self, children: Mapping[str, TsmNode]) -> None:
        self._children = children

    def children(self) -> Mapping[str, TsmNode]:
        """What is in it, by name."""
        return self._children

    def child(self, name: str) -> TsmNode:
        """One of them.

        Raises:
            TsmError: ENAMETOOLONG above 255 bytes; ENOENT.
        """
        if len(name.encode(errors="surrogateescape")) > _NAME_MAX:
            raise TsmError(errno.ENAMETOOLONG)
        try:
            return self.children()[name]
        except KeyError:
            raise TsmError(errno.ENOENT) from None

    def _has(self, name: str) -> bool:
        try:
            self.child(name)
        except TsmError as error:
            if error.errno != errno.ENOENT:
                raise
            return False
        return True

    def open(self, name: str, flags: int) -> TsmFile:
        """Open the attribute `name`; a door opens directories itself, after `check_open`.

        Raises:
            TsmError: ENOENT, or EACCES with O_CREAT: files cannot be made; EEXIST; EISDIR; the attribute's.
        """
        if flags & os.O_CREAT and not self._has(name):
            raise TsmError(errno.EACCES)
        found = self.child(name)
        if flags & os.O_CREAT and flags & os.O_EXCL:
            raise TsmError(errno.EEXIST)
        if isinstance(found, Attribute):
            return found.open(flags)
        raise TsmError(errno.EISDIR)

    @staticmethod
    def check_open(flags: int) -> None:
        """Return when a directory may be opened with these flags; raises TsmError(EISDIR)."""
        if flags & os.O_CREAT or flags & os.O_ACCMODE != os.O_RDONLY:
            raise TsmError(errno.EISDIR)

    def mkdir(self, name: str) -> None:
        """Refused.

        Raises:
            TsmError: EEXIST; EPERM.
        """
        if self._has(name):
            raise TsmError(errno.EEXIST)
        self._make(name)

    def _make(self, name: str) -> None:
        raise TsmError(errno.EPERM)

    def rmdir(self, name: str) -> None:
        """Remove the directory `name`.

        Raises:
            TsmError: ENOENT; ENOTDIR for an attribute; EPERM for what programs did not make.
        """
        if isinstance(self.child(name), Attribute):
            raise TsmError(errno.ENOTDIR)
        self._remove(name)

    def _remove(self, name: str) -> None:
        raise TsmError(errno.EPERM)

    def unlink(self, name: str) -> None:
        """Always refused.

        Raises:
            TsmError: ENOENT; EISDIR for a directory; EPERM for an attribute.
        """
        raise TsmError(errno.EPERM if isinstance(self.child(name), Attribute) else errno.EISDIR)


TsmNode: TypeAlias = Directory | Attribute


class EntryDirectory(Directory):
    """What mkdir makes below `report`, with its attributes."""

    def __init__(self, entry: Entry) -> None:
        super().__init__({name: Attribute(entry, kind) for name, kind in entry.kinds.items()})
        self.entry = entry

    def children(self) -> Mapping[str, TsmNode]:
        """The attributes, as long as the entry exists."""
        return {} if self.entry.dead else super().children()


class ReportDirectory(Directory):
    """`report`: each directory made in it is one report's state. Entries live until they are removed."""

    def __init__(self, registry: Registry) -> None:
        super().__init__({})
        self._registry = registry
        self._entries: dict[str, EntryDirectory] = {}

    def children(self) -> Mapping[str, TsmNode]:
        """The entries."""
        return self._entries

    def _make(self, name: str) -> None:
        """A new entry; ENXIO while there is no provider."""
        entry = Entry(self._registry, services=self._registry.served().services)
        self._entries = {**self._entries, name: EntryDirectory(entry)}

    def _remove(self, name: str) -> None:
        """Whatever is open stays open: a first read then ends with ENOENT, and what was written is lost."""
        removed = self._entries[name]
        self._entries = {key: each for key, each in self._entries.items() if key != name}
        removed.entry.dead = True


class ConfigfsTsm:
    """The tree of one guest.

    Making and removing entries is not locked against itself: a door does it from one thread. Everything else
    may be done from several.

    Attributes:
        root: what is mounted at /sys/kernel/config; has `tsm`.
        report: `tsm/report`.
    """

    def __init__(self) -> None:
        self._registry = Registry()
        self.report = ReportDirectory(self._registry)
        self.root = Directory({"tsm": Directory({"report": self.report})})

    def register(self, provider: TsmProvider) -> None:
        """A driver offers reports: tsm_report_register.

        Raises:
            TsmError: EBUSY when another does, or entries of an earlier one are left.
        """
        with self._registry.lock:
            if self._registry.provider is not None or self.report.children():
                raise TsmError(errno.EBUSY)
            self._registry.provider = provider

    def unregister(self) -> None:
        """The driver goes away: entries stay, and what needs a provider ends with ENXIO."""
        with self._registry.lock:
            self._registry.provider = None
