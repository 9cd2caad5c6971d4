"""Fuzzing: one harness per reader of bytes that come from somebody else.

A harness is a module `fuzz/fuzz_*.py`. The first line of its text is the invariant. It has two functions:

    seeds() -> list[bytes]        inputs to begin with, made on the spot
    one(data: bytes) -> object    one execution; returns what kind of outcome it was, and raises when the
                                  invariant does not hold

`python -m fuzz` runs them; see docs/how-to/fuzz.md.
"""
