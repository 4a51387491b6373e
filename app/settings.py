"""The settings of a completion and their ranges: one check for the page and the command line. Imports nothing heavy."""

import re
from dataclasses import dataclass

MAX_NUM_BYTES = 1_000_000
MAX_SAMPLES = 1000
FRAMINGS = ("tiles", "fit")
_SHOWN_BELOW = 10**40
_HEX = re.compile("([0-9a-f]{2})*")


@dataclass(frozen=True, kw_only=True)
class CompletionSettings:
    """What to keep of a file, how much to make and how the bytes are chosen.

    Attributes:
        keep: fraction of the file that is kept, 0 to 1; None stands for half of it.
        keep_bytes: the same as a number of bytes; at most one of the two is given.
        num_bytes: bytes to make; None stands for the rest of a picture, as much sound as was cut, 500 bytes of text.
        samples: completions of the same kept part.
        temperature, top_k, top_p, seed: as in `core.SampleConfig`.
        framing: "tiles" completes a picture larger than the model's at its own size, "fit" scales it to the model's.
        upside_down: keep the bottom of a picture and make its top.
        first_bytes: new bytes, in hex, that every sample begins with instead of drawing them.
    """

    keep: float | None = None
    keep_bytes: int | None = None
    num_bytes: int | None = None
    samples: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    framing: str = "tiles"
    upside_down: bool = False
    first_bytes: str = ""

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep_bytes is not None:
            raise ValueError("keep and keep_bytes say the same thing twice; give one of them")
        _check_range("keep", self.keep, 0, 1)
        _check_range("keep_bytes", self.keep_bytes, 0, 2**31)
        _check_range("num_bytes", self.num_bytes, 1, MAX_NUM_BYTES)
        _check_range("samples", self.samples, 1, MAX_SAMPLES)
        _check_range("temperature", self.temperature, 0, 100)
        _check_range("top_k", self.top_k, 1, 256)
        _check_range("top_p", self.top_p, 0, 1)
        _check_range("seed", self.seed, 0, 2**63 - 1)
        for name in ("keep_bytes", "num_bytes", "samples", "top_k", "seed"):
            _check_whole(name, getattr(self, name))
        if self.top_p == 0:
            raise ValueError("top_p=0 leaves no byte to choose; it must lie above 0 and up to 1")
        if self.framing not in FRAMINGS:
            raise ValueError(f"framing={self.framing!r} must be one of {', '.join(FRAMINGS)}")
        if not _HEX.fullmatch(self.first_bytes):
            raise ValueError("first_bytes must be bytes in hex, such as 4a6f; two digits are one byte")
        _check_range("the length of first_bytes", len(self.first_bytes) // 2, 0, MAX_NUM_BYTES - 1)


def _check_whole(name: str, value: object) -> None:
    if value is not None and type(value) is not int:
        raise ValueError(f"{name}={value} must be a whole number")


def _check_range(name: str, value: float | None, lowest: int, highest: int) -> None:
    if value is not None and not lowest <= value <= highest:
        given = f"{name}={value}" if isinstance(value, float) or abs(value) < _SHOWN_BELOW else f"{name} of so many digits"
        raise ValueError(f"{given} must lie in {lowest}..{highest}")
