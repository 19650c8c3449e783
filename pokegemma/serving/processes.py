"""The processes of a server on this machine, and the memory that they use."""

import contextlib
import ipaddress
import socket
import subprocess
from dataclasses import dataclass
from typing import Any

import psutil

from pokegemma.errors import PokegemmaError
from pokegemma.serving.client import split_url


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
    """Return the addresses at which a server of this host may listen if that is this machine, else none."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):  # no such name, or not a name
        return frozenset()
    local = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    own = {address for address in found if ipaddress.ip_address(address).is_loopback or address in local}
    return frozenset(own | {"0.0.0.0", "::"} if own else ())


def _memory_bytes(process: psutil.Process) -> int | None:
    total = 0
    with contextlib.suppress(psutil.Error):
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += member.memory_info().rss
    return total or None


def gpu_memory_bytes() -> int | None:
    """Return the memory in use on this machine's NVIDIA GPUs; None without a GPU or an answer of the driver."""
    command = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
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
        try:
            self._process = None if pid is None else psutil.Process(pid)
        except psutil.NoSuchProcess as error:
            raise PokegemmaError(f"--pid {pid}: no such process") from error

    def _listens(self, connection: Any) -> bool:
        if connection.status != psutil.CONN_LISTEN or connection.laddr.port != self._port:
            return False
        return connection.laddr.ip.removeprefix("::ffff:") in self._addresses

    def _find_listener(self) -> psutil.Process | None:
        """Return the process that listens on the port; None where there is none, or it belongs to another user."""
        if not self._addresses:
            return None
        try:
            pids = [one.pid for one in psutil.net_connections(kind="tcp") if one.pid and self._listens(one)]
            return psutil.Process(pids[0]) if pids else None
        except psutil.NoSuchProcess:
            return None
        except psutil.AccessDenied:  # macOS lists only the connections of one's own processes, one process at a time
            for process in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if any(map(self._listens, process.net_connections(kind="tcp"))):
                        return process
            return None

    def usage(self) -> Usage:
        """Return what the processes use now."""
        listener = self._find_listener()
        process = self._process or listener
        return Usage(
            memory_bytes=_memory_bytes(process) if process is not None else None,
            gpu_memory_bytes=gpu_memory_bytes() if self._addresses else None,
            listener=listener,
        )
