"""What verbs that ask a key service share: whom to ask, how patiently, and where answers are kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from swsnp.errors import InputError

if TYPE_CHECKING:
    import argparse

    from swsnp.abi.snp_report import Product
    from swsnp.certs.kds_client import KdsClient

__all__ = ["PRODUCTS", "add_client", "client_of", "product_of"]

PRODUCTS: Final = ("milan", "genoa", "turin")
_AMD: Final = "https://kdsintf.amd.com"
_BUDGET_S: Final = 120.0


def add_client(command: argparse.ArgumentParser, *, cache: bool = True) -> None:
    """--kds, --budget, --tls-ca; with `cache` also --cache and --offline."""
    command.add_argument(
        "--kds", metavar="URL", default=_AMD, help=f"key service to ask (default: AMD's, {_AMD})"
    )
    command.add_argument(
        "--budget",
        metavar="SECONDS",
        type=float,
        default=_BUDGET_S,
        help="time for one certificate with all pauses and repeats; 0 tries once (default: 120)",
    )
    command.add_argument(
        "--tls-ca", metavar="FILE", type=Path, help="certificates (PEM) that the service's TLS may come from"
    )
    if not cache:
        return
    command.add_argument(
        "--cache",
        metavar="DIR",
        type=Path,
        help="where answers are kept, and looked for first (default: swsnp/kds in the user's cache folder)",
    )
    command.add_argument("--offline", action="store_true", help="use what is kept, ask nobody")


def client_of(
    options: argparse.Namespace, *, folder: Path | None = None, offline: bool | None = None
) -> KdsClient:
    """The client that `add_client`'s options describe.

    Args:
        options: parsed.
        folder: where answers are kept, in place of --cache.
        offline: in place of --offline.

    Raises:
        UsageError: no service's address, or a time that cannot be.
        InputError: --tls-ca cannot be read.
    """
    from swsnp.certs.kds_cache import DiskCache, default_folder
    from swsnp.certs.kds_client import KdsClient
    from swsnp.certs.kds_transport import HttpTransport

    if options.tls_ca is not None and not options.tls_ca.is_file():
        raise InputError(f"{options.tls_ca}: cannot be read: no such file")
    cache = DiskCache(folder or options.cache or default_folder())
    return KdsClient(
        cache,
        base=options.kds,
        offline=options.offline if offline is None else offline,
        budget_s=options.budget,
        transport=HttpTransport(ca_file=options.tls_ca),
    )


def product_of(name: str | None) -> Product | None:
    """The product line of an option's value, which argparse has checked."""
    from swsnp.abi.snp_report import Product

    return None if name is None else Product(name.capitalize())
