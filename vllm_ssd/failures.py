"""Exceptions that are contained, so that they cost drafts and nothing else."""

from __future__ import annotations

import logging


class Failures:
    """Logs contained exceptions: the first with its traceback, then one line for each power of ten.

    Args:
        logger: where to.
        consequence: what a failure means, for whoever reads the log.
    """

    def __init__(self, logger: logging.Logger, consequence: str) -> None:
        self._logger = logger
        self._consequence = consequence
        self._count = 0

    def note(self) -> None:
        """Log the exception that is being handled."""
        self._count += 1
        if self._count == 1:
            self._logger.exception("SSD: %s", self._consequence)
        elif self._count == 10 ** (len(str(self._count)) - 1):
            self._logger.error("SSD: %s (%d times so far)", self._consequence, self._count)
