"""A terminal joined to the console of a machine."""

from __future__ import annotations

import os
import select
import socket
import termios
import tty
from pathlib import Path

from lab.cache import say

LEAVE = b"\x1c"  # Ctrl-\; Ctrl-] is what consoles of VMs inside are left by


def interact(directory: Path) -> None:
    """Join this terminal to a machine's console; Ctrl-\\ leaves."""
    before = termios.tcgetattr(0)
    with socket.socket(socket.AF_UNIX) as console:
        console.connect(str(directory / "console.sock"))
        say("root shell on the console; Ctrl-\\ leaves, and the machine is gone")
        console.sendall(b"\n")
        try:
            tty.setraw(0)
            while True:
                ready, _, _ = select.select([0, console], [], [])
                if 0 in ready:
                    typed = os.read(0, 4096)
                    if not typed or LEAVE in typed:
                        return
                    console.sendall(typed)
                if console in ready:
                    shown = console.recv(4096)
                    if not shown:
                        return
                    os.write(1, shown)
        finally:
            termios.tcsetattr(0, termios.TCSADRAIN, before)
