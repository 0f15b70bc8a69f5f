"""Whether the page's port is free, seen before the base is loaded, which takes long."""

from __future__ import annotations

import os
import socket

from app.security import ADDRESS


def check_port(port: int) -> None:
    """Raise ValueError where the page cannot answer on a port."""
    if not 1 <= port <= 65535:
        raise ValueError(f"--port is {port}; it is 1 to 65535")
    with socket.socket() as probe:
        if os.name == "posix":  # a page that just ended leaves its connections behind; elsewhere this would share the port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
            probe.listen(1)
        except OSError as error:
            raise ValueError(taken(port, error.strerror or str(error))) from None


def taken(port: int, why: str) -> str:
    """Return the message about a port that cannot be opened."""
    return f"port {port} cannot be opened ({why}); if a page is running there already, choose another with --port"
