"""Which settings may come from the config.yaml of an adapter's folder. Such a folder may come from anybody.

The file says how the adapter was trained. Settings that grant rights or name a place to write to come from
the command line alone.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.storage import scheme

logger = logging.getLogger(__name__)

RIGHTS = ("trust_remote_code", "trust_folder", "allow_remote_images", "allow_outside_paths", "overwrite")
PLACES = ("output_dir", "storage_path", "cache_dir", "cache_size_gb", "resume")
# Places to read from. Local folders and the Hub are allowed; a URI could name any server, which would be
# contacted with the user's own keys.
READ_PLACES = ("data_path", "eval_data_path", "image_root", "model_name_or_path")
NOT_REPORTED = ("output_dir", "cache_size_gb")  # left out silently, because every run has its own


def allowed_settings(settings: Settings, given: Mapping[str, Any], shown_path: str) -> Settings:
    """The settings of an adapter's config.yaml without those that only the command line may set.

    Args:
        given: settings of the command line, by flag name. They override the file's, so nothing is logged
            about them. URIs of the same server as its `data_path` are allowed.
        shown_path: the file's name in the line that is logged.
    """
    servers = {"", *_servers(given.get("data_path"))}
    refused = [name for name in (*RIGHTS, *PLACES) if settings.value(name) != _default(name)]
    refused += [name for name in READ_PLACES if not _servers(settings.value(name)) <= servers]
    if _names_a_kernel(settings.model.attn_implementation):
        refused.append("attn_implementation")
    if named := [name for name in refused if name not in (*given, *NOT_REPORTED)]:
        text = f"{shown_path} sets {', '.join(named)}: left out, because only the command line may"
        logger.info(console_line("Adapter", text))
    return settings.replace(**{name: _default(name) for name in refused})


def _servers(paths: str | Sequence[str] | None) -> set[str]:
    """The servers (with their options) that paths refer to; "" for a local path."""
    several = [paths] if isinstance(paths, str) else paths or []
    return {
        urlsplit(path)._replace(path="", fragment="").geturl() if scheme(path) else "" for path in several
    }


def _names_a_kernel(attention: str | None) -> bool:
    """Whether transformers would fetch this attention from the Hub, as compiled code."""
    return attention is not None and not attention.replace("_", "").isalnum()


def _default(name: str) -> Any:
    return Settings().value(name)
