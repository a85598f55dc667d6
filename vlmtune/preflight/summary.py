"""What the preflight reports, as plain values: the content of preflight.json, of the page and of the text."""

from dataclasses import asdict, dataclass, field
from typing import Any

# The fields' names are those of preflight.json.


@dataclass(frozen=True)
class BadRows:
    """Bad rows whose reasons are of the same kind.

    Attributes:
        kind: their reason, without its numbers and paths.
        first: (source, reason) of the first of these rows.
    """

    kind: str
    count: int
    first: list[tuple[str, str]]


@dataclass(frozen=True)
class RowGroups:
    """Groups of rows that share something.

    Attributes:
        groups: number of groups.
        rows: number of rows in all groups together.
        first: the sources of the first rows of the first groups.
    """

    groups: int
    rows: int
    first: list[list[str]]


@dataclass(frozen=True)
class ImageSizes:
    """Image sizes as "WIDTHxHEIGHT", in the order of their number of pixels.

    Attributes:
        common: the most common sizes, with their number of images.
        different: how many different sizes there are.
    """

    smallest: str
    median: str
    largest: str
    common: list[tuple[str, int]]
    different: int


@dataclass(frozen=True)
class TokenSpread:
    """Tokens in a row. The median (p95) is the least number that half (95 %) of the rows do not exceed."""

    min: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True)
class LengthEffect:
    """What one value of `max_length` does to the rows.

    Attributes:
        origin: why this value is listed: "usual", "search" (the search space has it) or "config".
        shortened: number of rows whose text is shortened.
        unfit: number of rows whose images and template do not fit.
        unfit_train: number of such rows in the training split.
    """

    max_length: int
    origin: str
    shortened: int
    unfit: int
    unfit_train: int


@dataclass(frozen=True)
class ExampleRow:
    """One row as the model reads it.

    Attributes:
        segments: (kind, text, number of tokens); kind is "template", "image", "text" or "answer".
    """

    source: str
    segments: list[tuple[str, str, int]]


@dataclass(frozen=True)
class Summary:
    """The whole report, for rows that a run with certain settings would use.

    Attributes:
        formats, image_formats: {name: number of rows or images}, the most common first.
        turns: number of turns of user and assistant in all rows.
        unused: fields, columns and attributes of turns that nothing uses, with the number of rows that have
            them.
        duplicates: rows with equal images and texts.
        contradictions: rows with equal images and question, but different answers.
        tokens: the spread of the number of tokens in a row (`row`), in its text (`text`) and in its images
            (`image`).
        histogram: (from, to, number of rows with from..to tokens, both included).
        fits_all: the smallest `max_length` that holds the images and template of every row.
        cuts_none: the smallest `max_length` that shortens no row.
        epoch_rows, epoch_tokens, epoch_answer_tokens: number of rows and tokens that one epoch trains on at
            `max_length`.
        problems: why training cannot work, each with what to do about it.
        gpu_steps: how training steps will run on a GPU, a line for each acceleration.
        serving: what serving must set so that the model sees what it saw in training.
        memory: the GPU memory that training on these rows needs, in words; empty if the model's config cannot
            be read.
    """

    data_path: str
    model: str
    formats: dict[str, int]
    rows: int
    turns: int
    images: int
    different_images: int
    image_formats: dict[str, int]
    bad_rows: int
    bad: list[BadRows]
    unused: dict[str, int]
    duplicates: RowGroups
    contradictions: RowGroups
    sizes: ImageSizes | None
    tokens: dict[str, TokenSpread]
    histogram: list[tuple[int, int, int]]
    lengths: list[LengthEffect]
    max_length: int | None
    fits_all: int
    cuts_none: int
    example: ExampleRow | None
    split: dict[str, int]
    epoch_rows: int
    epoch_tokens: int
    epoch_answer_tokens: int
    notes: list[str]
    problems: list[str]
    memory: str = ""
    gpu_steps: list[str] = field(default_factory=list)
    serving: list[str] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether training can work."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"ready": self.ready, **asdict(self)}
