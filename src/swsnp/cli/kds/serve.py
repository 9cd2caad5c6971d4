"""`swsnp kds serve`: the imitated key service, until it is told to stop."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swsnp.cli import GOOD, common
from swsnp.cli.kds import parser
from swsnp.cli.kds_options import PRODUCTS, product_of
from swsnp.errors import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from swsnp.abi.snp_report import Product
    from swsnp.amd_ca.kds_double import Misbehaviour
    from swsnp.machine import Machine

__all__ = ["run"]

_EPILOG = """\
One line on standard output says that it listens, and where: ready http://127.0.0.1:PORT
The chips are those of machines with the same seeds: it certifies `swsnp vm --seed S` when it has --seed S.
With several seeds there are several chips; the first one's root certifies them all.

TROUBLE is throttled, outage, dropped, truncated, slow, dripping, stale-crl, wrong-chip, wrong-tcb or garbage,
with details after a colon: throttled:times=2,retry_after=5   slow:pause_s=3,only=/crl
With --control the same at runtime, as JSON: POST, GET and DELETE of /swsnp/misbehave; GET of /swsnp/asked."""


def run(arguments: Sequence[str]) -> int:
    """The sub-verb."""
    options = _options(arguments)
    from swsnp.amd_ca.kds_double import KdsDouble
    from swsnp.amd_ca.kds_server import KdsServer
    from swsnp.certs.x509_reader import to_pem

    troubles = [_misbehaviour(each) for each in options.misbehave]
    machines = _machines(options)
    double = KdsDouble(machines)
    for each in machines:
        each.hierarchy.chain_pem()  # made before it is ready: keys take longer than clients wait
    roots = b"".join(to_pem(double.root(each)) for each in double.products)
    if options.save_roots is not None:
        common.save(options.save_roots, roots)
    if troubles:
        double.misbehave(*troubles)
    tls = None if options.tls_cert is None else (options.tls_cert, options.tls_key)
    server = KdsServer(double, host=options.host, port=options.port, control=options.control, tls=tls)
    signal.signal(signal.SIGTERM, _stop)
    try:
        with suppress(KeyboardInterrupt):
            print(_ready(server.url, machines, as_json=options.json), flush=True)
            server.serve()
    finally:
        server.close()
    return GOOD


def _ready(url: str, machines: Sequence[Machine], *, as_json: bool) -> str:
    """One line, so that whoever waits for it reads one line."""
    if not as_json:
        return f"ready {url}"
    chips = [{"product": each.product.value, "hwid": each.hwid.hex()} for each in machines]
    return json.dumps({"ready": True, "url": url, "chips": chips})


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    command = parser("serve", epilog=_EPILOG)
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    command.add_argument("--port", type=int, default=0, help="0 takes a free one (default: 0)")
    command.add_argument(
        "--product", choices=PRODUCTS, action="append", help="which chips, repeatable (default: milan)"
    )
    command.add_argument(
        "--seed", action="append", metavar="S", help="of the chips' machines, repeatable; others are random"
    )
    command.add_argument(
        "--amd-names", action="store_true", help="AMD's names in the certificates; the roots stay swsnp's"
    )
    command.add_argument("--save-roots", type=Path, metavar="FILE", help="write the roots, PEM")
    command.add_argument("--misbehave", action="append", default=[], metavar="TROUBLE", help="see below")
    command.add_argument("--control", action="store_true", help="let clients make it misbehave")
    command.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="serve https with this certificate, PEM"
    )
    command.add_argument("--tls-key", type=Path, metavar="FILE", help="and this key, PEM")
    command.add_argument("--json", action="store_true", help="tell address and chips in one line of JSON")
    options = command.parse_args(arguments)
    if (options.tls_cert is None) is not (options.tls_key is None):
        command.error("--tls-cert and --tls-key go together")
    return options


def _machines(options: argparse.Namespace) -> list[Machine]:
    from swsnp.machine import Machine

    made: list[Machine] = []
    for product in _products(options):
        root: Machine | None = None
        for seed in dict.fromkeys(options.seed or [None]):
            machine = Machine(
                product=product,
                seed=None if seed is None else str(seed).encode(),
                amd_names=options.amd_names,
                same_root_as=root,
            )
            root = root or machine
            made.append(machine)
    return made


def _products(options: argparse.Namespace) -> list[Product]:
    names = dict.fromkeys(options.product or [PRODUCTS[0]])
    return [product for name in names if (product := product_of(name)) is not None]


def _misbehaviour(text: str) -> Misbehaviour:
    """TROUBLE[:NAME=VALUE,...]."""
    from swsnp.amd_ca.kds_server import misbehaviour_of

    trouble, _, details = text.partition(":")
    values: dict[str, Any] = {"trouble": trouble}
    for pair in filter(None, details.split(",")):
        name, mark, value = pair.partition("=")
        if not mark:
            raise UsageError(f"--misbehave: got {pair!r}, wanted NAME=VALUE")
        values[name] = _number(name, value)
    return misbehaviour_of(values)


def _number(name: str, value: str) -> object:
    """Numbers where numbers are wanted; what is none is left for the check to refuse."""
    kinds: dict[str, type[int] | type[float]] = {"times": int, "pause_s": float}
    with suppress(ValueError):
        return kinds[name](value) if name in kinds else value
    return value
