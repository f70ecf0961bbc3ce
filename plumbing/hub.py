"""Whether the Hugging Face hub answers. This is asked once, because its libraries retry for
minutes. """
from contextlib import suppress
from functools import cache
from threading import Thread

import datasets
from huggingface_hub import constants, get_session

SECONDS = 5  # until a hub without any answer counts as offline


@cache
def check_hub() -> None:
    """If the hub does not answer, sets its libraries to offline, so that they use only their cache.
    Otherwise they would retry for minutes, for every name."""
    answers = []

    def ask():
        with suppress(Exception):  # any error means no answer
            answers.append(get_session().head(constants.ENDPOINT, timeout=SECONDS))

    # In a thread, because looking up an address has no timeout.
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if not answers:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
