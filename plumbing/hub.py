"""Asks once whether the Hugging Face hub answers. Its libraries would ask for minutes."""
from contextlib import suppress
from functools import cache
from threading import Thread

import datasets
from huggingface_hub import constants, get_session

SECONDS = 5  # for any answer


@cache
def check_hub() -> None:
    """If the hub does not answer, its libraries use their cache alone from now on."""
    answers = []

    def ask():
        with suppress(Exception):  # any error means no answer
            answers.append(get_session().head(constants.ENDPOINT, timeout=SECONDS))

    thread = Thread(target=ask, daemon=True)  # because name resolution ignores the timeout
    thread.start()
    thread.join(SECONDS)
    if not answers:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
