"""Ports: refuse a taken one in words, before a model is loaded for nothing."""

from __future__ import annotations

import socket

from mmlm.errors import UsageError


def check_port(host: str, port: int, what: str) -> None:
    """Refuse a port that is taken, or that is none.

    Raises:
        UsageError: naming the address and the mend.
    """
    if not 0 < port < 65536:
        raise UsageError(f"A port is a number from 1 to 65535 (got {port}).")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as fault:
        told = fault.strerror or str(fault)
        raise UsageError(
            f"The {what} cannot listen on {host}:{port}: {told}. Choose another --port."
        ) from None


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
