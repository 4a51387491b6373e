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
from test_readme import BLOCKS, ROOT

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


def raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def main(weights: str, folder: str, *alone: str) -> None:
    if alone:
        raise_loopback()
    with page_process(Path(weights), Path(folder)) as page:
        [script] = [code for _, code in BLOCKS if "gradio_client" in code]
        subprocess.run([sys.executable, "-c", script.replace("http://127.0.0.1:7860", page.url)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
