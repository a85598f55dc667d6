"""What tests of pages in headless Chromium share."""

import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium and its driver")


def wait_for(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """What `condition` returns, once that is true."""
    for _ in range(int(seconds * 10)):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("the page did not change")
