"""What the server's other processes have in common: started with a connection, deaf to signals, and gone with their parent."""

import os
import queue
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")
NICE = 15  # of what may wait: beside one that computes all the time it gets a thirtieth of a processor, alone all of it


def start(module: str) -> tuple["subprocess.Popen[bytes]", Connection]:
    """`python -m MODULE FD`, and this end of the connection whose other end FD is."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", module, str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)  # noqa: S603
    theirs.close()
    return process, Connection(ours.detach())


def ignore_signals() -> None:
    """The server decides when its processes end: a terminal's Ctrl-C and a group's SIGTERM reach all of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def receive(connection: Connection, inbox: "queue.SimpleQueue[T]") -> None:
    """Reads all that the parent says. When it is gone, so is the reason to be here, even in the middle of a load."""
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)
