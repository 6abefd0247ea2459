"""How penstock's processes log: one line an event on standard error, with time and whose it is. Knows no process."""

from __future__ import annotations

import logging


def set_up_logging(level: str, name: str = "") -> None:
    """Ours from `level` on and other packages' from warnings on. `name`: of this process, where one log has several."""
    whose = f"{name}: ".replace("%", "%%") if name else ""
    line = f"%(asctime)s %(levelname)-7s {whose}%(message)s"
    logging.basicConfig(format=line, datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("penstock").setLevel(level.upper())
