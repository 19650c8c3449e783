"""The program that stands for `python`: it has a server fork itself into a script. See forked_python.py.

It imports little, so that it starts in some hundredths of a second. The arguments are the server's socket, what the
script is to take for its `sys.executable`, and the command line of the script.
"""

import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What is passed on to the script."""


def request_fork(address: str, python: str, arguments: list[str], *, files: list[int]) -> socket.socket:
    """Ask for a fork with these standard files; return the connection, on which its process id and its end come.

    While the connection is open, each byte that is sent is a signal for the script. Where it is closed, the script is
    killed with its process group.
    """
    request = {
        "python": python,
        "arguments": arguments,
        "folder": str(Path.cwd()),
        "environment": dict(os.environ),
        "ignored": [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN],
    }
    message = json.dumps(request).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [struct.pack("Q", len(message))], files)
    connection.sendall(message)
    return connection


def receive_number(connection: socket.socket) -> int:
    """Return the process id of the script, or the second time its return code, which is negative after a signal."""
    return struct.unpack("i", connection.recv(4, socket.MSG_WAITALL))[0]


def main() -> None:
    address, python, *arguments = sys.argv[1:]
    connection = request_fork(address, python, arguments, files=[0, 1, 2])
    for number in SIGNALS:
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    receive_number(connection)
    status = receive_number(connection)
    if status >= 0:
        os._exit(status)
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)


if __name__ == "__main__":
    main()
