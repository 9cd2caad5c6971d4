"""The catalogue of hostile operators.

Source: the certificate handling that Linux documents for KVM_EXIT_SNP_REQ_CERTS and its OFD lock; the series;
docs/how-to/operator.md.
"""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from swsnp.testing.hostile_operator import arrangements as at
from swsnp.testing.hostile_operator.case import OperatorCase
from swsnp.testing.program_saw import ProgramSaw, served

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

__all__ = ["HOSTILE_OPERATOR"]

_PAGE: Final = 4096
_FITS: Final = 4 * _PAGE


# What the program gets

_NO_EXIT: Final = served(b"")


def _by_profile(v1: ProgramSaw, l72: ProgramSaw) -> Mapping[str, ProgramSaw]:
    return {"coco-v1": v1, "coco-v1-revised": v1, "linux-6.12": _NO_EXIT, "linux-7.2": l72}


def _lost(result: int, exitinfo2: int) -> ProgramSaw:
    return ProgramSaw(result=-result, exitinfo2=exitinfo2, key_kept=False)


_V1_GENERIC: Final = _lost(errno.EIO, 0x8000_0000 << 32)
_FAILED: Final = _by_profile(_V1_GENERIC, _lost(errno.EIO, 0xFFFF_FFFF << 32))
_BUSY: Final = _by_profile(_V1_GENERIC, _lost(errno.ETIMEDOUT, 2 << 32))


def _gets(data: bytes) -> Mapping[str, ProgramSaw]:
    return _by_profile(served(data), served(data))


def _needs(npages: int) -> Mapping[str, ProgramSaw]:
    told = ProgramSaw(result=-errno.EIO, exitinfo2=1 << 32, certs_len=npages << 12 & 0xFFFF_FFFF)
    return _by_profile(told, told)


_MISSING: Final = "cannot be opened: EIO, or the series' generic error"
_KIND: Final = "not a regular file: as if it were missing; opening it must not wait"
_SIZE: Final = "size in pages, rounded up; too many: ENOSPC, or 1 in the series"
_LOCK: Final = "somebody holds the write lock: EAGAIN after the time limit; the series can only say generic"
_SAME: Final = "the path must still name the file that was locked, else from the start"
_OPAQUE: Final = "the blob's bytes are nobody's business"
_CALL: Final = "an exception, or anything but bytes: EIO"

_STANDING: Final[tuple[tuple[str, str, at.Make, Mapping[str, ProgramSaw]], ...]] = (
    ("missing", _MISSING, at.nothing, _FAILED),
    ("dangling-link", _MISSING, partial(at.link, "nowhere"), _FAILED),
    ("symlink-loop", _MISSING, at.loop, _FAILED),
    ("symlink-to-itself", _MISSING, partial(at.link, "certs.blob"), _FAILED),
    ("socket", _MISSING, lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), _FAILED),
    ("directory", _KIND, lambda path: path.mkdir(), _FAILED),
    ("fifo", _KIND, lambda path: os.mkfifo(path), _FAILED),
    ("device-zero", _KIND, partial(at.link, "/dev/zero"), _FAILED),
    ("device-null", _KIND, partial(at.link, "/dev/null"), _FAILED),
    ("symlink", "symbolic links are followed", at.link_to_blob, _gets(at.BLOB)),
    ("empty", "an empty blob fits everywhere, and nothing is written", lambda path: path.touch(), _gets(b"")),
    ("one-byte", _SIZE, lambda path: _rewritten(path, b"c"), _gets(b"c")),
    ("16-kib", _SIZE, lambda path: _rewritten(path, b"c" * _FITS), _gets(b"c" * _FITS)),
    ("16-kib-and-a-byte", _SIZE, lambda path: _rewritten(path, b"c" * (_FITS + 1)), _needs(5)),
    ("20-kib", _SIZE, partial(at.sparse, 5 * _PAGE), _needs(5)),
    ("4-gib-and-a-byte", _SIZE, partial(at.sparse, (1 << 32) + 1), _needs((1 << 20) + 1)),
    ("1-tib", _SIZE, partial(at.sparse, 1 << 40), _needs(1 << 28)),
    ("random", _OPAQUE, lambda path: _rewritten(path, b"\xff" * 24), _gets(b"\xff" * 24)),
)  # fmt: skip


def _rewritten(path: Path, data: bytes) -> None:
    path.write_bytes(data)


_PLACES: Final[tuple[tuple[str, Callable[[Path], Path]], ...]] = (
    ("no-folder", lambda folder: folder / "none" / "certs.blob"),
    ("file-as-folder", at.below_a_file),
    ("name-too-long", lambda folder: folder / ("c" * 300)),
)
_SHRUNK: Final = at.BLOB[:7]
_HAPPENING: Final[tuple[tuple[str, str, dict[str, Any], Mapping[str, ProgramSaw]], ...]] = (
    ("rewritten-while-read", _OPAQUE, {"call": "pread", "act": partial(at.rewrite, b"CERTS")},
     _gets(b"CERTS" + at.BLOB[5:])),
    ("grown-while-read", _OPAQUE, {"call": "pread", "act": partial(at.append, b"more")}, _gets(at.BLOB)),
    ("truncated-while-read", "a blob that shrinks is read from the start",
     {"call": "pread", "act": lambda path: os.truncate(path, 7)}, _gets(_SHRUNK)),
    ("emptied-while-read", "a blob that shrinks is read from the start",
     {"call": "pread", "act": lambda path: os.truncate(path, 0)}, _gets(b"")),
    ("truncated-again-and-again", "from the start, up to the time limit; then EAGAIN",
     {"call": "pread", "act": at.shrink, "once": False, "content": b"c" * _FITS}, _BUSY),
    ("unlinked-while-read", "an open file stays", {"call": "pread", "act": lambda path: path.unlink()},
     _gets(at.BLOB)),
    ("replaced-while-read", "the lock was on the file that is read", {"call": "pread", "act": at.replace},
     _gets(at.BLOB)),
    ("replaced-before-the-lock", _SAME, {"call": "open", "act": at.replace, "after": True}, _gets(at.OTHER)),
    ("unlinked-before-the-lock", _SAME, {"call": "open", "act": lambda path: path.unlink(), "after": True},
     _FAILED),
    ("replaced-again-and-again", "from the start, up to the time limit; then EAGAIN",
     {"call": "open", "act": at.replace, "after": True, "once": False}, _BUSY),
)  # fmt: skip
_RETURNS: Final[tuple[tuple[str, object, Mapping[str, ProgramSaw]], ...]] = (
    ("none", None, _FAILED),
    ("text", "certificates", _FAILED),
    ("a-number", 24, _FAILED),
    ("a-list", [1, 2], _FAILED),
    ("itself", at.raises, _FAILED),
    ("nothing", b"", _gets(b"")),
    ("a-bytearray", bytearray(at.BLOB), _gets(at.BLOB)),
    ("a-memoryview", memoryview(at.BLOB), _gets(at.BLOB)),
    ("too-much", b"c" * (_FITS + 1), _needs(5)),
)


def _cases() -> Iterator[OperatorCase]:
    for name, rule, make, expected in _STANDING:
        yield OperatorCase(name=name, rule=rule, arrange=partial(at.standing, make), expected=expected)
    for name, where in _PLACES:
        yield OperatorCase(name=name, rule=_MISSING, arrange=partial(at.at, where), expected=_FAILED)
    yield OperatorCase(name="unreadable", rule=_MISSING, arrange=at.unreadable, expected=_FAILED)
    for name, rule, what, expected in _HAPPENING:
        yield OperatorCase(name=name, rule=rule, arrange=partial(at.happening, **what), expected=expected)
    yield OperatorCase(
        name="disk-fails",
        rule="cannot be read: EIO",
        arrange=partial(at.happening, call="pread", act=_disk_error),
        expected=_FAILED,
    )
    yield OperatorCase(
        name="no-locks-here", rule="cannot be locked: EIO", arrange=at.without_locks, expected=_FAILED
    )
    yield OperatorCase(name="locked-for-ever", rule=_LOCK, arrange=at.locked, expected=_BUSY)
    yield OperatorCase(
        name="locked-for-a-moment",
        rule=_LOCK,
        arrange=partial(at.locked, release=True),
        expected=_gets(at.BLOB),
    )
    yield OperatorCase(
        name="replaced-during-the-wait",
        rule=_SAME,
        arrange=partial(at.locked, during=at.replace),
        expected=_gets(at.OTHER),
    )
    yield OperatorCase(
        name="removed-during-the-wait",
        rule=_MISSING,
        arrange=partial(at.locked, during=lambda path: path.unlink()),
        expected=_FAILED,
    )
    yield OperatorCase(
        name="read-by-others", rule="read locks share", arrange=at.read_locked, expected=_gets(at.BLOB)
    )
    yield OperatorCase(
        name="callable-raises", rule=_CALL, arrange=partial(at.from_callable, at.raises), expected=_FAILED
    )
    for name, value, expected in _RETURNS:
        yield OperatorCase(
            name=f"callable-returns-{name}",
            rule=_CALL,
            arrange=partial(at.from_callable, at.returns(value)),
            expected=expected,
        )


def _disk_error(path: Path) -> None:
    raise OSError(errno.EIO, f"{path}: {os.strerror(errno.EIO)}")


HOSTILE_OPERATOR: Final[tuple[OperatorCase, ...]] = tuple(_cases())
"""Every thing that operators do to certificates that is known, by name."""
