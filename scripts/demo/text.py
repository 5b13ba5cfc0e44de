"""Chains of documents: each is about the last person named in the one before, and of the next kind.

The link between documents gives a model something to go by after an end of text, so that greedy decoding
past it does not start the same document again and again.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from . import words
from .kinds import KINDS


def document_chain(seed: int | str) -> Iterator[str]:
    """Yield documents without end; the same seed gives the same chain on every machine."""
    rng = Random(f"chain {seed}")
    kind = rng.randrange(len(KINDS))
    lead = rng.choice(words.NAMES)
    while True:
        text, roster = KINDS[kind](rng, lead)
        yield text
        lead = roster[-1]
        kind = (kind + 1) % len(KINDS)
