"""Search the image resolution: the same rows are prepared once for each resolution of a search.

The split depends on the images in the files, before they are resized, and the labels are the answers' tokens.
So a row is in the same split and has the same labels at every resolution.
"""

import itertools
import logging
from collections.abc import Sequence

from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.cache import prepare_store
from vlmtune.data.lengths import length_problem
from vlmtune.data.source import DataSource, ScannedData
from vlmtune.data.store import Store
from vlmtune.errors import ConfigError, DataError
from vlmtune.image_resolution import ImageResolution
from vlmtune.search.distributions import Categorical
from vlmtune.search.first_points import recipe_outside_space
from vlmtune.search.max_lengths import searched_max_lengths
from vlmtune.search.space import Space
from vlmtune.session import cache_folder

logger = logging.getLogger(__name__)

NAMES = ("max_pixels", "min_pixels", "max_image_tiles")
IMAGE_TOKENS = (
    "image_tokens"  # column of the tables of trials: the mean number of image tokens per row of a trial
)


def varies_resolution(space: Space) -> bool:
    """Whether trials have different resolutions."""
    return any(name in space.names for name in NAMES)


def searched_resolutions(space: Space) -> list[ImageResolution]:
    """Every resolution that a trial may have, the baseline's first.

    Raises:
        ConfigError: a limit is searched in a range, or computed from an option that is not such a limit. The
            rows could not be prepared for all its values.
    """
    for name in NAMES:
        if name in space.distributions and not isinstance(space.distributions[name], Categorical):
            raise ConfigError(
                f"search_space: {name}: the rows are prepared for each value before the trials start, so "
                "name the values: {choice: [200704, 401408]}"
            )
        variables = space.expressions[name].variables if name in space.expressions else ()
        if others := [one for one in variables if one in space.names and one not in NAMES]:
            raise ConfigError(f"search_space: {name}: must not follow from {others[0]}, only from {NAMES[0]}")
    drawn = {name: one for name, one in space.distributions.items() if name in NAMES}
    first = {name: one.ends[0] for name, one in space.distributions.items()}
    settings = [space.settings]
    if (recipe := recipe_outside_space(space)) is not None:
        settings.append(space.settings.replace(**recipe))
    if varies_resolution(space):
        for values in itertools.product(*(one.ends for one in drawn.values())):
            point = space.complete({**first, **dict(zip(drawn, values, strict=True))})
            settings.append(space.settings.replace(**point))
    return list(dict.fromkeys(one.model.resolution for one in settings))


def with_resolution(settings: Settings, resolution: ImageResolution) -> Settings:
    """The settings with another resolution."""
    return settings.replace(**vars(resolution))


def at_resolution_of(store: Store, settings: Settings) -> Settings:
    """The settings with the resolution of a store."""
    return settings if store.model is None else with_resolution(settings, store.model.resolution)


def prepare_resolutions(
    settings: Settings, space: Space, store: Store, scanned: ScannedData | None = None
) -> Store:
    """Prepare the rows at every other resolution that trials may have, or find them in the cache.

    Args:
        store: the rows at the resolution of `settings`.
        scanned: the data's fragments, if the caller has them already.

    Returns:
        The store, with the stores of the other resolutions in `others`; `store` itself if there are none.

    Raises:
        ConfigError: the model's processor cannot have a resolution.
        DataError: a row can be used at one resolution and not at another.
    """
    resolutions = [one for one in searched_resolutions(space) if one != settings.model.resolution]
    if not resolutions:
        return store
    if scanned is None:
        scanned = DataSource.from_settings(settings).scan()
    others = []
    for resolution in resolutions:
        source = DataSource.from_settings(with_resolution(settings, resolution))
        try:
            other = prepare_store(
                source, cache_folder(settings), size_gb=settings.data.cache_size_gb, scanned=scanned
            )
        except (ConfigError, DataError) as error:
            raise type(error)(f"search_space: {resolution}: {error}") from error
        _check_same_rows(store, other, resolution)
        others.append(other)
    return Store(store.folder, store.train_splits, store.model, tuple(others))


def check_lengths(settings: Settings, store: Store) -> None:
    """Raises DataError if the rows of a resolution do not fit `max_length`, where that is not searched."""
    if not store.others or searched_max_lengths(settings.search.search_space or {}):
        return  # `usable_max_lengths` removes the values that the largest resolution does not fit
    for one in store.resolutions:
        problem = length_problem(one, settings.training.max_length, settings.data.on_long_row)
        if problem is not None and one.model is not None:
            raise DataError(f"search_space: {one.model.resolution}: {problem}")


def resolution_lines(store: Store) -> list[str]:
    """A line for each resolution with its image tokens per row; empty if the search has only one."""
    return [
        f"{one.model.resolution}: {image_tokens_per_row(one):.0f} image tokens a row, "
        f"up to {one.column('tokens').max()} tokens"
        for one in store.resolutions
        if store.others and one.model is not None
    ]


def announce_resolutions(store: Store) -> None:
    """Log the resolutions of a search that varies them."""
    for number, line in enumerate(resolution_lines(store)):
        logger.info(console_line("" if number else "Images", line))


def image_tokens_per_row(store: Store) -> float:
    """The mean number of image tokens of the rows that have any."""
    tokens = store.column("image_tokens")
    return float(tokens[tokens > 0].mean()) if (tokens > 0).any() else 0.0


def _check_same_rows(store: Store, other: Store, resolution: ImageResolution) -> None:
    """Raises DataError if two stores differ in their rows, their splits, or the form of their tensors."""
    columns = ("fragment", "number", "split")
    places: list[Sequence[tuple[int, int, str]]] = [
        list(zip(*(one.column(name) for name in columns), strict=True)) for one in (store, other)
    ]
    if places[0] != places[1]:
        usable = [{place[:2] for place in one} for one in places]
        in_one_only = sorted(usable[0] ^ usable[1])
        difference = "the splits of their rows differ"
        if in_one_only:
            owner = store if in_one_only[0] in usable[0] else other
            index = zip(owner.column("fragment"), owner.column("number"), owner.column("source"), strict=True)
            source = next(
                source for fragment, number, source in index if (fragment, number) == in_one_only[0]
            )
            difference = f"{source} can be used at one of them only"
        raise DataError(
            f"search_space: {resolution}, and {store.model.resolution if store.model else 'the config'}: "
            f"{difference}; leave this value or such rows out"
        )
    if store.meta.input_format != other.meta.input_format:
        raise DataError(
            f"search_space: {resolution}: the processor gives rows in another form than at the config's own "
            "resolution; leave this value out"
        )
