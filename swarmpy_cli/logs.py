"""Log lines on standard error: an event's name, then its fields as name=value."""

from __future__ import annotations

import logging

_STANDARD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


class FieldFormatter(logging.Formatter):
    """Appends the fields given as `extra` to the line: "… stage.lost peer=12D3 position=40"."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        fields = [
            f"{name}={value}"
            for name, value in record.__dict__.items()
            if name not in _STANDARD_FIELDS
        ]
        return " ".join([line, *fields])


def set_up_logging(level: str) -> None:
    """Write log records of `level` ("debug" … "error") and above to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(FieldFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
