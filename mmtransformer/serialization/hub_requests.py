"""How long a hub is waited for while files are fetched from it."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOOK = 10.0
"""Seconds; then the hub counts as out of reach."""
TRIES = 3
"""How often the same bytes are asked for."""


class Stalled(Exception):
    """The hub stays silent; of no kind that `huggingface_hub` tries again after."""


@contextmanager
def few_tries() -> Iterator[None]:
    """Ends a download of which nothing more comes within half a minute, and lets one go on that gets ahead.

    By itself `huggingface_hub` waits for a file's head six times a minute, for a list without end, and for a file's
    bytes six times ten seconds. Here no answer is waited for longer than `LOOK` or what HF_HUB_DOWNLOAD_TIMEOUT and
    HF_HUB_ETAG_TIMEOUT say, and what is asked for the fourth time, from the same byte on, is refused. A hub that says
    that it is busy (429, 503) is silent no more, and when to ask again is its own matter.

    Raises:
        Stalled: in the requests, within.
    """
    from huggingface_hub import constants, utils

    longest = max(LOOK, constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT)
    asked: Counter[tuple[str, str, str]] = Counter()
    lock = threading.Lock()

    def key_of(request: Any) -> tuple[str, str, str]:
        return request.method, str(request.url), request.headers.get("range", "")

    def answered(response: Any) -> None:
        if response.status_code >= 400:
            with lock:
                asked[key_of(response.request)] = 0

    def check(request: Any) -> None:
        said = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            kind: longest if (wait := said.get(kind)) is None else min(wait, longest)
            for kind in ("connect", "read", "write", "pool")
        }
        with lock:
            asked[key_of(request)] += 1
            if max(asked.values()) > TRIES:
                raise Stalled(f"nothing came in {TRIES} tries of {longest:g} s")

    hooks = getattr(utils.get_session(), "event_hooks", None)  # versions before 1.0 have none
    if not isinstance(hooks, dict):
        yield
        return
    hooks["request"].append(check)
    hooks["response"].append(answered)
    try:
        yield
    finally:
        hooks["request"].remove(check)
        hooks["response"].remove(answered)
