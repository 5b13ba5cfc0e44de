"""The tokens of the requests that vLLM's V2 runner is working on, which it keeps on the device alone."""

from __future__ import annotations

from collections.abc import Sequence


class Histories:
    """Prompt and output of each request."""

    def __init__(self) -> None:
        self._tokens: dict[str, list[int]] = {}

    def begin(self, request_id: str, tokens: list[int]) -> None:
        """A request enters the batch with these tokens."""
        self._tokens[request_id] = tokens

    def end(self, request_id: str) -> None:
        """It leaves. Unknown ids are ignored."""
        self._tokens.pop(request_id, None)

    def __getitem__(self, request_id: str) -> list[int]:
        return self._tokens[request_id]

    def add_outcomes(
        self,
        request_ids: Sequence[str],
        verified: Sequence[list[int]],
        counts: Sequence[int],
        last: Sequence[int],
    ) -> list[list[int]]:
        """Each row's new tokens: the accepted ones of the drafts that were verified, and the one after them.

        Args:
            request_ids, verified: [B].
            counts: [B], new tokens in all; 0 for a row without an outcome.
            last: [B], the last of them.
        """
        sampled = [
            [*drafts[: count - 1], token] if count and request_id in self._tokens else []
            for request_id, drafts, count, token in zip(request_ids, verified, counts, last, strict=True)
        ]
        for request_id, tokens in zip(request_ids, sampled, strict=True):
            if tokens:
                self._tokens[request_id].extend(tokens)
        return sampled
