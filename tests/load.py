"""Many users of a page at once, for a test: what they ask for, and whether each got the bytes of its own seed.

`python tests/load.py URL WEIGHTS USERS SECONDS` prints one JSON object.
"""

import json
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from gradio_client import handle_file
from page_client import client_of
from PIL import Image
from waiting import wait_until

ROOT = Path(__file__).parents[1]
SEEDS = range(20)
NUM_BYTES = 60
AT_LEAST = 4  # things that a user asks for, however slow the machine is
TEXT = "The lamp was lit."


class Expected:
    """What the service answers without a page; made before the load begins."""

    def __init__(self, weights: Path, folder: Path) -> None:
        from app.service import Service

        service = Service(weights=weights, runs=weights / "no-runs")
        self.picture, self.text = folder / "picture.png", folder / "text.txt"
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.picture)
        self.text.write_bytes(b"Nobody came to the door.\n" * 40)
        self.completions = {}
        for seed in SEEDS:
            job = service.complete(None, text=TEXT.encode(), num_bytes=NUM_BYTES, seed=seed)
            for _ in job.run():
                pass
            self.completions[seed] = job.results[0].media.data.tobytes()
        self.bits = {path: service.score_file(path).bits_per_byte for path in (self.picture, self.text)}


class User:
    """One user, who asks for one thing after another until the time is over, and for some in any case."""

    def __init__(self, number: int, url: str, expected: Expected, deadline: float, folder: Path) -> None:
        self._downloads = folder / str(number)  # of its own: clients name a file after its content
        self._choices = random.Random(number)
        self._url = url
        self._expected = expected
        self._deadline = deadline
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.seconds: list[float] = []

    def run(self) -> None:
        try:
            self._client = client_of(self._url, download_files=self._downloads)
            while time.monotonic() < self._deadline or self.counts.total() < AT_LEAST:
                task = self._choices.choice([self._complete, self._complete, self._score, self._plan, self._cancel])
                started = time.monotonic()
                task()
                self.seconds.append(time.monotonic() - started)
                self.counts[task.__name__.strip("_")] += 1
        except Exception:
            self.problems.append(traceback.format_exc())

    def _complete(self) -> None:
        seed = self._choices.choice(SEEDS)
        [file], _ = self._client.predict(None, TEXT, "", num_bytes=NUM_BYTES, seed=seed, api_name="/generate")
        self._check(Path(file).read_bytes() == self._expected.completions[seed], f"the bytes of seed {seed}")
        Path(file).unlink()

    def _score(self) -> None:
        path = self._choices.choice(list(self._expected.bits))
        answer = self._client.predict(handle_file(path), "", api_name="/score")
        self._check(abs(answer["bits_per_byte"] - self._expected.bits[path]) < 1e-4, f"the score of {path.name}")

    def _plan(self) -> None:
        recipe = f'[[jobs]]\ntext = "Once"\nnum_bytes = {self._choices.randrange(1, 99)}'
        [item] = self._client.predict(None, recipe, api_name="/batch_plan")["items"]
        self._check("error" not in item, "a plan")

    def _cancel(self) -> None:
        call = self._client.submit(None, TEXT, "", num_bytes=1_000_000, api_name="/generate")
        time.sleep(self._choices.uniform(0, 0.5))
        call.cancel()
        # gradio_client 2.7 loses a call that is made in the moment when the stream of the one before it closes.
        wait_until(lambda: call.communicator.event_id and self._client.streaming_future is None, limit_s=60, every_s=0.05)

    def _check(self, is_right: bool, what: str) -> None:
        if not is_right:
            self.problems.append(f"wrong: {what}")


def main(url: str, weights: str, num_users: str, seconds: str) -> None:
    sys.path.insert(0, str(ROOT))
    with TemporaryDirectory() as folder:
        expected = Expected(Path(weights), Path(folder))
        deadline = time.monotonic() + float(seconds)
        users = [User(number, url, expected, deadline, Path(folder)) for number in range(int(num_users))]
        threads = [threading.Thread(target=user.run, daemon=True) for user in users]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline + 60 - time.monotonic()))
        problems = [problem for user in users for problem in user.problems]
        if any(thread.is_alive() for thread in threads):
            problems.append("somebody waits for more than a minute")
        taken = [second for user in users for second in user.seconds]
        counts = sum((user.counts for user in users), Counter())
        print(json.dumps({"counts": counts, "problems": problems, "seconds": taken}), flush=True)
    os._exit(0)  # the client's threads would wait for the calls that were cancelled


if __name__ == "__main__":
    main(*sys.argv[1:])
