"""The page and the script of the README in one process tree, for a test that takes the network away from both.

`python tests/offline.py WEIGHTS FOLDER [alone]`; `alone` says that the network holds nothing, not even a loopback that is up.
"""

import fcntl
import socket
import struct
import subprocess
import sys
from pathlib import Path

from page_server import page_process

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


def raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def main(weights: str, folder: str, *alone: str) -> None:
    if alone:
        raise_loopback()
    with page_process(Path(weights), Path(folder)) as page:
        subprocess.run([sys.executable, Path(__file__).with_name("client_script.py"), page.url], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
