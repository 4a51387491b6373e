"""The page's own events, as strangers may send them: wrong values are refused in a sentence and disturb nobody."""

import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from page_server import PageProcess

RECIPE = '[[jobs]]\ntext = "Once"\nnum_bytes = 1'


def ask(page: PageProcess, path: str, value: Any = None) -> Any:
    body = None if value is None else json.dumps(value).encode()
    request = urllib.request.Request(f"{page.url}{path}", body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=60)


class Events:
    """The page's events by their numbers, and what the page said while they were called."""

    def __init__(self, page: PageProcess) -> None:
        self._page = page
        with ask(page, "config") as answer:
            config = json.load(answer)
        components = {each["id"]: each["props"].get("value") for each in config["components"]}
        self.all = {each["id"]: each for each in config["dependencies"] if each["backend_fn"]}
        self.values = {number: [components[k] for k in each["inputs"]] for number, each in self.all.items()}
        self._num_calls = 0

    def named(self, name: str, num_inputs: int) -> int:
        """The number of an event of the page, by its handler and its inputs."""
        [number] = [number for number, each in self.all.items()
                    if str(each["api_name"]).startswith(name) and len(each["inputs"]) == num_inputs]  # fmt: skip
        return number

    def call(self, number: int, values: list[Any], event_data: Any = None) -> str:
        """All that the page answers to one event."""
        self._num_calls += 1
        session = f"stranger {self._num_calls}"
        body = {"data": values, "fn_index": number, "session_hash": session, "event_data": event_data}
        try:
            ask(self._page, "gradio_api/queue/join", body).close()
        except urllib.error.HTTPError as refusal:
            with refusal:
                return f"status {refusal.code}: {refusal.read().decode()}"
        with ask(self._page, f"gradio_api/queue/data?session_hash={session.replace(' ', '%20')}") as stream:
            return stream.read().decode()


@pytest.fixture(scope="module")
def events(page_server: PageProcess) -> Events:
    return Events(page_server)


def generated(page: PageProcess) -> str:
    values = [None, "Once", "", -1, 8, 1, 1.0, 0, 1.0, 0, -1, "tiles", False, ""]
    with ask(page, "gradio_api/call/generate", {"data": values}) as answer:
        event = json.load(answer)["event_id"]
    with ask(page, f"gradio_api/call/generate/{event}") as stream:
        return stream.read().decode()


@pytest.mark.parametrize("visitor", [[1], {"a": 1}, "\ud800"])
def test_a_wrong_visitor_is_refused_and_everybody_else_is_answered(page_server, events, visitor):
    assert "needs an owner" in events.call(events.named("submit", 3), [visitor, None, RECIPE])
    assert "event: complete" in generated(page_server)


def test_no_event_cancels_others(events):
    """`app.tabs.newest` says why."""
    assert [each["cancels"] for each in events.all.values()] == [[]] * len(events.all)


HUGE = 10**400
WRONG_DATA = [
    None, [], "x", 5, {}, {"id": None}, {"id": [1]}, {"id": "\ud800"}, {"offset": "x"}, {"offset": HUGE}, {"value": None},
    {"id": "x", "place": None, "number": HUGE, "value": HUGE}, {"form": 5, "id": "a", "other": "b"},
]  # fmt: skip
WRONG_VALUES = [None, True, -1, 1.5, HUGE, -HUGE, 1e308, "\ud800", "\0", [1], {"a": 1}, [[[]]], "9" * 5000]


def wrong_events(events: Events) -> list[tuple[int, list[Any], Any]]:
    """Calls of every event, each with wrong data of its own or one wrong value."""
    calls = [(number, values, data) for number, values in events.values.items() for data in WRONG_DATA]
    return calls + [
        (number, [*values[:place], wrong, *values[place + 1 :]], {"offset": 1})
        for number, values in events.values.items()
        for place in range(len(values))
        for wrong in WRONG_VALUES
    ]


@pytest.mark.parametrize("every", [211, pytest.param(1, marks=pytest.mark.slow)])
def test_wrong_data_and_values_of_events_are_refused_without_a_traceback(page_server, events, every):
    calls = wrong_events(events)
    logged = page_server.log.stat().st_size
    for call in calls[::every]:
        answer = events.call(*call)
        assert "process_completed" in answer or answer.startswith("status 4"), (call, answer[:500])
    said = page_server.log.read_bytes()[logged:].decode(errors="replace")
    assert "Traceback" not in said, said[-3000:]
