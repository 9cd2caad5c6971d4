"""A configfs-tsm whose reports are made up, for the tests of its nodes and openings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swsnp.guest.tsm import ConfigfsTsm
from swsnp.guest.tsm_report import Blobs
from swsnp.guest.tsm_text import TsmError

if TYPE_CHECKING:
    from swsnp.guest.tsm_report import ReportInput

__all__ = ["INBLOB", "Provider", "made_up"]

INBLOB = bytes(range(64))


class Provider:
    """The report is the inblob and the number of the request."""

    name, privlevel_floor, services = "sev_guest", 0, False

    def __init__(self) -> None:
        self.reports = 0
        self.fail = 0

    def report_new(self, given: ReportInput) -> Blobs:
        self.reports += 1
        if self.fail:
            raise TsmError(self.fail)
        return Blobs(outblob=given.inblob + bytes([self.reports]), auxblob=b"certificates")


def made_up() -> tuple[ConfigfsTsm, Provider]:
    """A tree, and what serves it."""
    tsm, provider = ConfigfsTsm(), Provider()
    tsm.register(provider)
    return tsm, provider
