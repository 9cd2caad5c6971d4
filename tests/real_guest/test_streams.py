"""Debian's kernel as an SNP guest with ports, a network and a folder: bytes come through as they are."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.real_guest.streams import STREAMS
from tests.real_guest.streams_host import INPUT, LINE, PAGE, TEXT

if TYPE_CHECKING:
    from tests.real_guest.conftest import Answers


def test_guest_comes_to_its_end(answers: Answers) -> None:
    """Nothing failed in the guest, and its program's output took the port that was given."""
    ended = answers.of(STREAMS)
    assert ended.status == 0, ended
    assert json.loads((answers.folder / "streams.json").read_text())["output_by"] == "virtio port"


def test_output_of_a_port(answers: Answers) -> None:
    """VIRTIO 1.2, 5.3: 300,000 bytes, in order."""
    wanted = bytes(number % 251 for number in range(300_000))
    assert (answers.folder / "many").read_bytes() == wanted


def test_port_both_ways(answers: Answers) -> None:
    """A line to the guest, and the guest's answer."""
    assert (answers.folder / "capitals").read_bytes() == LINE.upper()


def test_network(answers: Answers) -> None:
    """VIRTIO 1.2, 5.1, and passt(1): a page of this host's, by HTTP over 10.0.2.2."""
    head, _, body = answers.of(STREAMS).out.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200")
    assert body[: len(PAGE)] == PAGE


def test_input_of_a_program(answers: Answers) -> None:
    """The standard input is the program's: bytes of any value, in order, and then its end."""
    assert answers.of(STREAMS).out[-len(INPUT) :] == INPUT


def test_shared_folder(answers: Answers) -> None:
    """VIRTIO 1.2, 5.11, and virtiofsd(1): a file of this host's, and one that the guest made of it."""
    shared = answers.folder / "shared"
    assert (shared / "there").read_bytes() == TEXT
    assert (shared / "back").read_bytes() == TEXT.upper()
