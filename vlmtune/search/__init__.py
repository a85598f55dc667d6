"""The search: its space, sampler, trials and results.

`vlmtune.search` is also the function `vlmtune.search(settings)`. Python replaces that function by this package
as soon as a module of the package is imported. So the package can be called as well, with the same meaning.
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
