# SPDX-License-Identifier: Apache-2.0
"""What the offline node says in its log: its own lines and those of the job, around a bar where there is a terminal."""

from __future__ import annotations

import logging
import sys
from typing import Any

LEVELS = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning"}


class NodeLog(logging.Handler):
    """Writes to a node's logger, and so to the console, the log file and /rosout; also what the job logs in Python."""

    def __init__(self, logger: Any, bar: bool) -> None:
        """``logger`` is rclpy's; ``bar``: the job draws one on this terminal."""
        super().__init__(logging.INFO)
        self._logger, self._bar = logger, bar

    def say(self, level: str, text: str) -> None:
        """Log ``text`` as debug, info, warning or error."""
        if self._bar:
            # The bar leaves the cursor behind itself: take its line away, it is drawn anew at the next step.
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        # One call each: rclpy remembers the level of a line of code and refuses another.
        if level == "debug":
            self._logger.debug(text)
        elif level == "info":
            self._logger.info(text)
        elif level == "warning":
            self._logger.warning(text)
        else:
            self._logger.error(text)

    def emit(self, record: logging.LogRecord) -> None:
        """Log what Python's logging brings."""
        self.say(LEVELS.get(record.levelno, "error"), record.getMessage())
