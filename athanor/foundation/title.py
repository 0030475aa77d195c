"""What `ps` shows of this process, so that ranks forked from one server can be told apart."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path


def set_title(title: str, name: str) -> None:
    """Show `title` as the command line, cut to the room of the old one, and the first 15 bytes of `name` in `ps -e` and `top`.

    On Linux alone: its command line is what lies where the arguments lay when the program began, from arg_start to arg_end of
    /proc/self/stat (man 5 proc).
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_bytes(name.encode()[:15])
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # from the third on
        begin, end = int(fields[45]), int(fields[46])
        if 0 < begin < end:  # both are 0 to who may not know
            ctypes.memmove(begin, title.encode()[:end - begin - 1].ljust(end - begin, b"\0"), end - begin)
