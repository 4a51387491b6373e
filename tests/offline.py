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
    [script] = [code for _, code in BLOCKS if "gradio_client" in code]
    # It imports the client while the page is started, and goes on when it is told where the page is.
    code = f"import gradio_client; exec({script!r}.replace('http://127.0.0.1:7860', input()))"
    with (
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, text=True) as user,
        page_process(Path(weights), Path(folder)) as page,
    ):
        user.communicate(f"{page.url}\n")
    assert user.returncode == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
