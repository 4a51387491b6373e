"""What a run tells while it trains: a progress bar on stderr and one JSON object a line in metrics.jsonl."""

import json
import time
from pathlib import Path

from tqdm import tqdm

from core.codecs import atomic_file
from core.likelihood import nats_to_bits


class Report:
    """Progress, speed and metrics of a run. One that does not speak, as on all ranks but the first, only keeps the time."""

    def __init__(self, path: Path, *, step: int, num_steps: int, bytes_per_step: int, seconds: float, speaks: bool) -> None:
        """Goes on after `step` finished steps and `seconds` of training.

        Lines of later steps, from before a kill, are dropped from the file at `path`.
        """
        self._path = path
        self._bytes_per_step = bytes_per_step
        self._speaks = speaks
        self._seconds = seconds  # before the interval at hand
        self._num_bytes, self._began, self._stopped = 0, time.monotonic(), None
        # disable=None: no bar where stderr is not a terminal.
        self._bar = tqdm(
            total=num_steps * bytes_per_step,
            initial=step * bytes_per_step,
            unit="B",
            unit_scale=True,
            disable=None if speaks else True,
        )
        if speaks:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            with atomic_file(path) as file:
                file.writelines(f"{line}\n".encode() for line in lines if _step_of(line) <= step)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Spent training, over all starts, without the pauses in which a run validates, exports and saves."""
        return self._seconds + self._interval()

    def advance(self) -> None:
        """Counts one finished step."""
        self._num_bytes += self._bytes_per_step
        self._bar.update(self._bytes_per_step)

    def bytes_per_s(self) -> float:
        """Speed since the last line or pause; true only while the device has nothing left to do."""
        return self._num_bytes / self._interval()

    def stop_clock(self) -> None:
        """Begins a pause: what is done until `restart_clock` does not count as training."""
        self._stopped = time.monotonic()

    def restart_clock(self) -> None:
        """Ends a pause and begins a new interval for the speed."""
        self._seconds = self.seconds
        self._num_bytes, self._began, self._stopped = 0, time.monotonic(), None

    def _interval(self) -> float:
        return (time.monotonic() if self._stopped is None else self._stopped) - self._began

    def write(self, **values: float | None) -> None:
        """Appends a line of metrics."""
        if self._speaks:
            values["bits_per_byte"] = nats_to_bits(values["loss_nats"])
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            self._bar.set_postfix_str(f"{values['bits_per_byte']:.3f} bits/byte")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the last line of a run that was killed while writing it
