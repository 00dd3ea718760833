"""Ways between nodes: this node's address toward another one, ports that are free, hosts that answer."""

from __future__ import annotations

import socket
import time

from ftune.errors import MachineError, Problem
from ftune.launch.plan import Interface

_TRY_SECONDS = 2.0


def split(rendezvous: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT; raises ValueError where it is not of that form."""
    name, colon, port = rendezvous.rpartition(":")
    if not colon or not name or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(rendezvous)
    return name.strip("[]"), int(port)


def loopback() -> Interface:
    """Return the interface on which processes of one node meet."""
    return Interface("127.0.0.1", _name_of("127.0.0.1") or "lo")


def toward(rendezvous: str) -> Interface:
    """Return the interface over which the first node is reached; raises MachineError where there is none.

    Nothing is sent: the kernel is asked which way it would take.
    """
    name, port = split(rendezvous)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as way:
            way.connect(place)
            address = str(way.getsockname()[0])
    except OSError as error:
        fix = "give the address by which the nodes reach the first one: --rendezvous ADDRESS:PORT"
        what = f"{socket.gethostname()} has no way to {name}"
        raise MachineError(Problem("node-unreachable", what, why=str(error), fix=fix)) from None
    return Interface(address, _name_of(address) or "")


def _name_of(address: str) -> str | None:
    import psutil

    for name, found in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in found):
            return str(name)
    return None


def check_port(rendezvous: str) -> None:
    """Raise MachineError where the first node cannot listen at its own rendezvous."""
    name, port = split(rendezvous)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(place)
    except OSError as error:
        what = f"{socket.gethostname()} cannot listen at {rendezvous}"
        fix = "take a free port, and an address of this node (node rank 0)"
        raise MachineError(Problem("port-taken", what, why=str(error), fix=fix)) from None


def wait_for(rendezvous: str, seconds: float) -> None:
    """Wait until the first node listens; raises MachineError where it does not within so many seconds."""
    name, port = split(rendezvous)
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((name, port), timeout=_TRY_SECONDS):
                return
        except OSError as error:
            if time.monotonic() > end:
                what = f"{socket.gethostname()} reached nobody at {rendezvous} within {seconds:.0f} s"
                fix = "start node rank 0 first, and let its port through the firewall; or wait longer: --join-timeout"
                raise MachineError(Problem("node-unreachable", what, why=str(error), fix=fix)) from None
        time.sleep(0.5)
