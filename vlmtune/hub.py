"""Whether the Hugging Face Hub can be reached."""

import os
import socket
import urllib.request
from functools import cache
from urllib.parse import urlsplit

ANSWER_S = 5.0  # seconds that the Hub has to answer


@cache
def stay_offline_unless_reachable() -> None:
    """Make huggingface_hub use its cache alone where the Hub does not answer, also in child processes.

    Otherwise huggingface_hub tries to reach the Hub for each file of a model, 25 seconds and ten printed
    lines each, before it looks into its cache.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection(
            (hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)), timeout=ANSWER_S
        ).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
