"""Numbers and byte layouts, one module per document; standard library only."""

from swsnp.abi.record import Record, Word
from swsnp.errors import LayoutError

__all__ = ["LayoutError", "Record", "Word"]
