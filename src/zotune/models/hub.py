"""Whether the hub can be reached: found out once, in a moment, where its client would try again for half a minute."""

from __future__ import annotations

import functools
import logging
import os
import socket
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

logger = logging.getLogger(__name__)

SECONDS = 5.0  # for a name server or a host that does not answer at all; one that refuses does so at once


def look_first(name: str) -> None:
    """Before a hub's name is looked up: where the hub cannot be reached its clients look in this machine's cache alone from now on,
    as with HF_HUB_OFFLINE=1, and a line says so. Of a folder that is there nothing is asked.
    """
    from huggingface_hub import constants

    if Path(name).expanduser().exists() or constants.is_offline_mode():
        return
    where = urlsplit(constants.ENDPOINT)
    if where.scheme in getproxies() or (reason := unreached(where.hostname or "", where.port or 443)) is None:
        return
    logger.warning("%s cannot be reached (%s): files are looked for on this machine alone", where.hostname, reason)
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if datasets := sys.modules.get("datasets"):
        datasets.config.HF_HUB_OFFLINE = True


@functools.cache
def unreached(host: str, port: int) -> str | None:
    """Why no connection is had, in a few words; None where there is one. A name server that is silent cannot be interrupted, so
    it is asked by a thread of its own.
    """
    said: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=SECONDS).close()
            said.append(None)
        except OSError as error:
            said.append(error.strerror or str(error))

    asking = threading.Thread(target=connect, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return said[0] if said else f"no answer in {SECONDS:.0f} s"
