"""What the verbs share: numbers, files that are read with a limit, files that are written whole."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_report import REPORT_SIZE
from swsnp.cli import common, measure
from swsnp.cli.inputs import LARGEST, read, report_in
from swsnp.errors import InputError, UsageError

if TYPE_CHECKING:
    from pathlib import Path


def test_numbers() -> None:
    """Counts begin with 1, durations with 0; a day is no time to wait for a lock."""
    assert common.positive("1") == 1
    assert common.seconds("0") == 0
    assert common.seconds("86399.5") == 86399.5
    for text in ("0", "-1", "x"):
        with pytest.raises(ValueError, match=text):
            common.positive(text)
    for text in ("-0.1", "86400", "inf", "nan", "x"):
        with pytest.raises(ValueError, match=text):
            common.seconds(text)


def test_largest_file(tmp_path: Path) -> None:
    """A file of 1 MiB is read, a byte more is refused with what was wanted."""
    file = tmp_path / "file"
    file.write_bytes(bytes(LARGEST))
    assert len(read(str(file))) == LARGEST
    file.write_bytes(bytes(LARGEST + 1))
    with pytest.raises(InputError, match=f"got more than {LARGEST} bytes, wanted a policy"):
        read(str(file), wanted="a policy")


def test_a_reports_size_is_enough() -> None:
    """1,184 bytes are a report to whoever asks for one: what is wrong with it is the verb's to say."""
    for content in (b"\xff" * REPORT_SIZE, b"-----BEGIN CERTIFICATE-----\n".ljust(REPORT_SIZE)):
        assert report_in(content, "x") == content
    with pytest.raises(InputError, match="^x: "):
        report_in(b"\xff" * (REPORT_SIZE - 1), "x")


def test_largest_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe has no size: it is read up to the limit, and refused beyond."""
    monkeypatch.setattr(measure, "_IMAGE_MAX", 4)
    for size in (4, 5):
        reading, writing = os.pipe()
        os.write(writing, bytes(size))
        os.close(writing)
        path = f"/proc/self/fd/{reading}"
        if size == 4:
            assert measure.read_image(path) == bytes(4)
        else:
            with pytest.raises(InputError, match="got more than 4 bytes, wanted an image"):
                measure.read_image(path)
        os.close(reading)


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays until the new bytes are on the disk; nothing half written is left behind."""
    target = tmp_path / "target"
    common.save(target, b"first")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UsageError, match=f"{target}: cannot be written: No space left on device"):
            common.save(target, b"second")
    assert [each.name for each in tmp_path.iterdir()] == ["target"]
    assert target.read_bytes() == b"first"
    with pytest.raises(UsageError, match="cannot be written: No such file or directory"):
        common.save(tmp_path / "none" / "target", b"")
