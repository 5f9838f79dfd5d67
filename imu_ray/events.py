"""The log of a run: one line per event, as text or JSON, with names and numbers only, never a sample or its id."""

import json
import logging
import sys
import time
from typing import Any

logger = logging.getLogger("imu_ray")


def event(name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log one event with its figures: ``features made: set=forget rows=5000``."""
    if logger.isEnabledFor(level):
        figures = " ".join(f"{key}={_short(value)}" for key, value in fields.items())
        logger.log(level, "%s", " ".join(f"{name}: {figures}".splitlines()), extra={"event": name, "fields": fields})


class JsonFormatter(logging.Formatter):
    """``{"time": "2026-01-31T08:15:30Z", "level": "info", "event": "features made", "set": "forget"}``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        told = getattr(record, "fields", None) or {"message": record.getMessage()}
        said = {"event": getattr(record, "event", "message"), **told}
        return json.dumps({"time": stamp, "level": record.levelname.lower(), **said}, default=str)


def log_events(style: str) -> None:
    """Send the log of this process to standard error, as ``text`` or ``json``; replaces what was set up before."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if style == "json" else plain)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logger.setLevel(logging.INFO)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
