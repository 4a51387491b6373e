"""A script's client of a page on this machine."""

from typing import Any

from gradio_client import Client


def client_of(page_url: str, **options: Any) -> Client:
    """A client that says nothing.

    Without a check of certificates, which plain HTTP has none of: `gradio_client` would read all of this machine's for each
    of its several requests a call, which takes more of a processor than most of our answers.
    """
    return Client(page_url, verbose=False, ssl_verify=False, **options)
