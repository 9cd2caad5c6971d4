"""Secrets stay inside: not in logs, trace events, representations or what commands print."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING

from swsnp import Machine
from swsnp.abi.sev_guest import SnpDerivedKeyReq
from swsnp.cli.hops import as_dict, describe
from swsnp.firmware.chip import Chip
from swsnp.firmware.context import GuestContext
from swsnp.firmware.keys import vcek_root, vcek_scalar
from swsnp.guest.channel import Channel

if TYPE_CHECKING:
    import pytest

    from swsnp.trace import TraceEvent

SEED = b"the seed of the secrets test"


class Watched(Chip):
    """Keeps the secret that the machine draws, to look for it."""

    drawn: bytes = b""

    def __init__(self, **options: object) -> None:
        secret = options["secret"]
        assert isinstance(secret, bytes)
        Watched.drawn = secret
        super().__init__(**options)  # type: ignore[arg-type]  # passed on as it came


def _forms(secret: bytes) -> set[str]:
    """How a secret could show: hex, Python's bytes, a number in either order."""
    numbers = {int.from_bytes(secret, order) for order in ("little", "big")}
    return {secret.hex(), repr(secret)[2:-1], *(str(n) for n in numbers), *(f"{n:x}" for n in numbers)}


def test_nothing_shows_a_secret(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole attestation with debug logging and a listener shows neither chip secrets nor keys."""
    import swsnp.machine.machine as module

    monkeypatch.setattr(module, "Chip", Watched)
    caplog.set_level(logging.DEBUG)
    machine = Machine(seed=SEED)
    events: list[TraceEvent] = []
    with machine.trace.listen(events.append), machine.create_vm(certs=b"certificates", vcpus=2) as vm:
        guest = vm.boot()
        vm.extended_report(bytes(64))
        derived = vm.derived_key(SnpDerivedKeyReq()).derived_key
        message_keys = [key for n in range(4) if (key := guest.secrets.slot(n).key())]
        tcb = machine.chip.reported_tcb
        scalar = vcek_scalar(Watched.drawn, machine.product, tcb).to_bytes(48, "big")
        secrets = [
            Watched.drawn,
            derived,
            *message_keys,
            scalar,
            vcek_root(Watched.drawn, machine.product, tcb),
            SEED,
        ]
        kinds = (Chip, GuestContext, Channel)
        alive = [each for each in gc.get_objects() if isinstance(each, kinds)]
        assert {type(each) for each in alive} >= {Watched, GuestContext, Channel}
        shown = [
            caplog.text,
            repr(machine),
            repr(vm),
            repr(guest),
            repr(vm.driver),
            repr(vm.vcpus),
            repr(machine.mailbox),
        ]
        shown += [repr(each) for each in alive]
        shown += [f"{event!r} {describe(event).text} {as_dict(event)}" for event in events]
        text = "\n".join(shown)
    assert len(message_keys) == 4
    assert len(events) > 20
    assert [secret.hex()[:8] for secret in secrets for form in _forms(secret) if form in text] == []


def test_the_search_would_find_one() -> None:
    """The check above can fail: every form of a secret is recognised."""
    secret = bytes(range(200, 232))
    for text in (secret.hex(), f"key={secret!r}", str(int.from_bytes(secret, "little"))):
        assert any(form in text for form in _forms(secret)), text
