"""Where a server listens: found out before a model is loaded, so that a taken port is said at once."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

from athanor.foundation.errors import UserError


@dataclass(frozen=True)
class Address:
    """Where to listen; port 0 takes a free one."""

    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def is_local(self) -> bool:
        return self.host in ("127.0.0.1", "localhost", "::1")


def listen(address: Address) -> socket.socket:
    """A listening socket. Raises UserError that names host and port and how to choose others."""
    where = f"{address.host} port {address.port}"
    try:
        family, kind, protocol, _, bound = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM,
                                                              flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise UserError(f"'{address.host}' is no address ({error.strerror}); choose another with --host or serve.host") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(bound)
        listener.listen(128)
    except OSError as error:
        listener.close()
        reasons = {errno.EADDRINUSE: "is in use by another program", errno.EACCES: "needs privileges (ports below 1024 do)",
                   errno.EADDRNOTAVAIL: "is not on this machine"}
        why = reasons.get(error.errno or 0, f"cannot be used: {error.strerror}")
        raise UserError(f"{where} {why}; choose another with --port or serve.port (0 takes a free one), or --host") from None
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
