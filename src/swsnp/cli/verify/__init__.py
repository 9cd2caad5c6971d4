"""`swsnp verify REPORT`: is it genuine, and is it the one that is wanted?

Accepted, refused and authentic are told apart: exit code 0 means accepted. Nothing is fetched unless `--kds`
says from where.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from swsnp.cli import BAD_VERDICT, GOOD
from swsnp.cli.common import at_of, utc_now
from swsnp.cli.verify.options import parse

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from datetime import datetime

__all__ = ["run"]


def run(arguments: Sequence[str], *, now: Callable[[], datetime] = utc_now) -> int:
    """The verb."""
    options = parse(arguments)
    if options.batch is not None:
        from swsnp.cli.verify.batch import run_batch

        return run_batch(options, now=now)
    return _run_one(options, at_of(options, now=now))


def _run_one(options: argparse.Namespace, at: datetime) -> int:
    from swsnp.cli.verify.evidence import complete, gather
    from swsnp.verify import Verifier

    evidence = complete(gather(options), options)
    verifier = Verifier(
        roots=evidence.roots,
        policy=evidence.policy,
        engine=options.engine,
        product=options.product,
        like=options.like,
    )
    verification = verifier.verify(
        evidence.report,
        certificates=evidence.certificates,
        table=evidence.table,
        crls=evidence.crls,
        at=at,
        report_data=options.report_data,
        measurement=options.measurement,
    )
    from swsnp.cli.verify import verdict

    if options.json:
        print(json.dumps(verdict.as_dict(verification, evidence, options, at), indent=2))
    else:
        print("\n".join(verdict.as_lines(verification, evidence, options, at)))
    good = verification.passed if options.authentic_only else verification.accepted
    return GOOD if good else BAD_VERDICT
