"""The processes of a server on this machine, and the memory that they use."""

import ipaddress
import shutil
import socket
import subprocess
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import psutil

from pokegemma.errors import PokegemmaError
from pokegemma.serving.client import split_url

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Usage:
    """Memory and process of a server; None: unknown, as for a server on another machine.

    `memory_bytes`: resident, of its process and those that it started. `gpu_memory_bytes`: used on all GPUs of this
    machine by all processes (in a container the driver does not report them by process). `listener`: the listening
    process; after a restart of the server it is another one.
    """

    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    listener: psutil.Process | None = None


def find_addresses(host: str) -> frozenset[str]:
    """Return the addresses of a host if that is this machine, else none."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):  # no such name, or not a name
        return frozenset()
    local = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    return frozenset(address for address in found if ipaddress.ip_address(address).is_loopback or address in local)


def find_listener(port: int, addresses: Set[str]) -> psutil.Process | None:
    """Return the process that listens on a TCP port at one of this machine's addresses, or at all of them.

    None where there is none, or it belongs to another user.
    """
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if _listens(connection, port, addresses) and connection.pid:
                return psutil.Process(connection.pid)
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:  # macOS lists only the connections of one's own processes, one process at a time
        return _find_own_listener(port, addresses)
    return None


def _find_own_listener(port: int, addresses: Set[str]) -> psutil.Process | None:
    for process in psutil.process_iter():
        try:
            if any(_listens(connection, port, addresses) for connection in process.net_connections(kind="tcp")):
                return process
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return None


def _listens(connection: Any, port: int, addresses: Set[str]) -> bool:
    if connection.status != psutil.CONN_LISTEN or connection.laddr.port != port:
        return False
    address = connection.laddr.ip.removeprefix("::ffff:")
    return address in addresses or ipaddress.ip_address(address).is_unspecified


def _memory_bytes(process: psutil.Process) -> int | None:
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return None
    for member in family:
        try:
            total += member.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total or None


def gpu_memory_bytes() -> int | None:
    """Return the memory in use on this machine's NVIDIA GPUs; None without a GPU or an answer of the driver."""
    if shutil.which(_NVIDIA_SMI[0]) is None:
        return None
    try:
        done = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=10, check=True)
        return sum(int(line) for line in done.stdout.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


class ServerProcesses:
    """The processes of one server."""

    def __init__(self, server_url: str, pid: int | None = None) -> None:
        """Find out whether the server is on this machine.

        Args:
            pid: the process whose memory counts, with those that it started; None: the one that listens on the port.

        Raises:
            PokegemmaError: there is no process `pid`, or the URL is not an http or https URL.
        """
        parts = split_url(server_url, shown=f"--server_url {server_url}")
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._addresses = find_addresses(parts.hostname)
        self._process = None
        if pid is not None:
            try:
                self._process = psutil.Process(pid)
            except psutil.NoSuchProcess as error:
                raise PokegemmaError(f"--pid {pid}: no such process") from error

    def usage(self) -> Usage:
        """Return what the processes use now."""
        listener = find_listener(self._port, self._addresses) if self._addresses else None
        process = self._process or listener
        return Usage(
            memory_bytes=_memory_bytes(process) if process is not None else None,
            gpu_memory_bytes=gpu_memory_bytes() if self._addresses else None,
            listener=listener,
        )
