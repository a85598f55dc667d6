"""`StoreMeta`: what all rows of a prepared store share, kept in its meta.json."""

from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from vlmtune.data.input_format import InputFormat

# The types of the fields of meta.json. They are checked when it is read, because the folder may be damaged.
META_TYPES: dict[str, tuple[type, ...]] = {
    "key": (str,),
    "inputs": (dict,),
    "pad_token_id": (int,),
    "rows": (int,),
    "bad_rows": (int,),
    "problem": (str, NoneType),
    "encoded": (bool,),
    "box_format": (str,),
    "video_frames": (int, NoneType),
    "unlabelled": (int,),
    "unused": (dict,),
    "reading_notes": (dict,),
    "source_fragments": (list,),
}


@dataclass(frozen=True)
class StoreMeta:
    """Values that all rows of a store share.

    Attributes:
        key: fingerprint of the data, processor and options that the store was made from; see
            `source.fingerprint`.
        input_format: how the processor's inputs are stored and joined into a batch; `inputs` in meta.json.
        pad_token_id: the token that rows are padded with.
        rows, bad_rows: the number of rows in the shards, and of those that were left out.
        problem: why the rows cannot be trained on, for another reason than bad rows; None if they can.
        unlabelled: the number of bad rows that are frames without a row in labels.csv.
        unused: fields, columns and attributes of turns that nothing uses, each with its number of rows.
        reading_notes: notes on values that are read differently from how they are written, each with its
            number of rows; 0 if the note is about the data as a whole.
        encoded: whether the store holds token ids and pixels; if not, it holds the rows as they were read
            (`Store.records`).
        box_format: how the model writes boxes, see `box_formats.box_format_name`.
        video_frames: the number of frames that were read of each video; None if no row has a video.
        source_fragments: the number of fragments of each `--data_path`.
    """

    key: str
    input_format: InputFormat
    pad_token_id: int
    rows: int
    bad_rows: int
    problem: str | None
    encoded: bool
    box_format: str = "unknown"
    video_frames: int | None = None
    unlabelled: int = 0
    unused: dict[str, int] = field(default_factory=dict)
    reading_notes: dict[str, int] = field(default_factory=dict)
    source_fragments: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        values = {name: value for name, value in vars(self).items() if name != "input_format"}
        return {**values, "inputs": self.input_format.to_dict()}

    @classmethod
    def from_dict(cls, values: Any) -> "StoreMeta":
        """The inverse of `to_dict`. Raises ValueError or KeyError for other values."""
        if not isinstance(values, dict) or values.keys() != META_TYPES.keys():
            raise ValueError("it has other fields than a store has")
        for name, types in META_TYPES.items():
            if type(values[name]) not in types:
                raise ValueError(f"{name} is {values[name]!r:.40}")
        if not all(type(number) is int for number in values["source_fragments"]):
            raise ValueError("source_fragments holds other values than whole numbers")
        input_format = InputFormat.from_dict(values["inputs"])
        return cls(input_format=input_format, **{name: values[name] for name in values if name != "inputs"})
