"""The secrets page as the guest keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swsnp.errors import LayoutError, UsageError
from swsnp.guest.secrets import Secrets

if TYPE_CHECKING:
    from tests.unit.guest.conftest import ScriptedHost

SECRETS = 0x1000


@pytest.fixture
def secrets(host: ScriptedHost) -> Secrets:
    return Secrets(host.memory, SECRETS)


@pytest.mark.parametrize("n", range(4))
def test_each_key_has_its_place(host: ScriptedHost, secrets: Secrets, n: int) -> None:
    """AMD 56860, secrets page: VMPCKn at 20h + 20h n; GHCB 2.0: its counter at A0h + 4n, 32 bits."""
    slot = secrets.slot(n)
    assert slot.vmpck_id == n
    assert slot.key() == host.keys[n]
    assert slot.stored() == 0
    slot.store(0xFFFFFFFE)
    assert slot.stored() == 0xFFFFFFFE
    assert host.memory.private[SECRETS + 0xA0 : SECRETS + 0xB0] == bytes(4 * n) + b"\xfe\xff\xff\xff" + bytes(
        12 - 4 * n
    )


@pytest.mark.parametrize("n", range(4))
def test_wipe_zeroes_one_key_and_nothing_else(host: ScriptedHost, secrets: Secrets, n: int) -> None:
    """Linux, snp_disable_vmpck: the 32 key bytes become zero; other keys and all counters stay."""
    for each in range(4):
        secrets.slot(each).store(10 + each)
    before = bytes(host.memory.private)
    secrets.slot(n).wipe()
    expected = bytearray(before)
    expected[SECRETS + 0x20 + 32 * n : SECRETS + 0x40 + 32 * n] = bytes(32)
    assert host.memory.private == expected
    assert secrets.slot(n).key() is None
    assert secrets.slot(n).stored() is None
    assert secrets.slot((n + 1) % 4).stored() == 10 + (n + 1) % 4


def test_a_key_with_one_bit_is_a_key(host: ScriptedHost, secrets: Secrets) -> None:
    """Linux, is_vmpck_empty: only 32 zero bytes are no key."""
    secrets.slot(1).wipe()
    host.memory.private[SECRETS + 0x5F] = 1
    assert secrets.slot(1).key() == bytes(31) + b"\x01"
    assert secrets.slot(1).stored() == 0


@pytest.mark.parametrize("n", [-1, 4, 255])
def test_there_are_four_keys(secrets: Secrets, n: int) -> None:
    """AMD 56860, secrets page: VMPCK0..3."""
    with pytest.raises(UsageError, match=r"wanted 0\.\.3"):
        secrets.slot(n)


def test_version_below_two_is_refused(host: ScriptedHost, secrets: Secrets) -> None:
    """AMD 56860, secrets page: the layout is known from version 2 on."""
    secrets.check_version()
    host.memory.private[SECRETS] = 1
    with pytest.raises(LayoutError, match="version 1, wanted 2 or more"):
        secrets.check_version()


def test_no_key_in_any_text(secrets: Secrets) -> None:
    """Keys never show: neither as hex nor as a list of numbers."""
    text = repr(secrets) + repr(secrets.slot(1)) + str(secrets.slot(1))
    assert "01010101" not in text
    assert "\\x01" not in text
    assert "withheld" in text
