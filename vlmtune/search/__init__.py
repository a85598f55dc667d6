"""The search: its space, sampler, trials and results.

`vlmtune.search` is also a function, `vlmtune.search(settings)`. As soon as a module of this package is
imported, Python puts the package in the function's place. So the package can be called too.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmtune.config.settings import Settings
    from vlmtune.search.search_result import SearchResult


class CallablePackage(ModuleType):
    """A package that is called like `vlmtune.api.search`."""

    def __call__(self, settings: Settings) -> SearchResult:
        from vlmtune.search.run_search import run_search

        return run_search(settings)


sys.modules[__name__].__class__ = CallablePackage
