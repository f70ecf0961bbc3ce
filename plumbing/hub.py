"""Whether the Hugging Face hub answers: asked once, before its libraries ask again and again."""
from contextlib import suppress
from functools import cache
from threading import Thread

import datasets
from huggingface_hub import constants, get_session

SECONDS = 5  # within which it has to give any answer


@cache
def check_hub() -> None:
    """Lets the hub's libraries look into their cache alone if the hub gives no answer: they would
    try for minutes, name by name, before they do."""
    answers = []

    def ask():
        with suppress(Exception):  # whatever it is: no answer
            answers.append(get_session().head(constants.ENDPOINT, timeout=SECONDS))

    # In a thread, for the search of an address knows no timeout.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if not answers:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
