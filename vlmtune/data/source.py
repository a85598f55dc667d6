"""Which data a run prepares and how, and the key under which the prepared store is cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.data.box_formats import AUTO, box_format_name
from vlmtune.data.fragment import Fragment
from vlmtune.data.question_columns import NO_COLUMNS, Columns, columns_from
from vlmtune.data.scan import scan
from vlmtune.errors import ConfigError
from vlmtune.model_ref import ModelRef
from vlmtune.shown_text import redacted_values
from vlmtune.storage import file_states

if TYPE_CHECKING:
    from vlmtune.config.settings import Settings

STORE_FORMAT = 10  # part of every key: raise it when a prepared row changes for the same data
# Fields of DataSource that do not change prepared rows. The processor's content stands for the model's name.
NOT_IN_KEY = ("model", "on_bad_row", "max_bad_fraction")


@dataclass(frozen=True)
class ScannedData:
    """The fragments of the training files and of the evaluation files (None without `--eval_data_path`).

    Attributes:
        source_fragments: number of training fragments from each `--data_path`.
    """

    training: list[Fragment]
    evaluation: list[Fragment] | None
    source_fragments: tuple[int, ...] = ()

    @property
    def fragments(self) -> list[Fragment]:
        """All fragments, training files first. The store's column `fragment` is an index of this list."""
        return [*self.training, *(self.evaluation or [])]

    @property
    def first_evaluation_fragment(self) -> int | None:
        """The position in `fragments` where the evaluation files begin; None without `--eval_data_path`."""
        return None if self.evaluation is None else len(self.training)


@dataclass(frozen=True)
class DataSource:
    """Which data is prepared and how, as plain values.

    Every field that changes a prepared row is part of the store's key, under the field's name.

    Attributes:
        encoded: True if the store holds token ids and pixels; False (`--no_cache`) if it holds raw rows,
            which are encoded at every use.
    """

    data_path: str | tuple[str, ...]
    model: ModelRef
    eval_data_path: str | None = None
    image_root: str | None = None
    group_by: str | None = None
    columns: Columns = NO_COLUMNS
    eval_fraction: float = 0.1
    test_fraction: float = 0.1
    seed: int = 42
    on_bad_row: str = "error"
    max_bad_fraction: float = 0.05
    given_splits: str = "use"
    group_near_duplicates: str = "auto"
    allow_outside_paths: bool = False
    allow_remote_images: bool = False
    box_format: str = AUTO
    video_frames: int | None = None
    encoded: bool = True

    @classmethod
    def from_settings(cls, settings: Settings) -> DataSource:
        """The data that the settings of a run name.

        Raises:
            ConfigError: `--data_path` is missing.
        """
        data = settings.data
        if data.data_path is None:
            raise ConfigError("--data_path is missing: give a file, a folder or a dataset's name")
        paths = tuple(path if "://" in path else str(Path(path)) for path in data.paths)
        return cls(
            data_path=paths[0] if len(paths) == 1 else paths,
            model=settings.model.ref,
            eval_data_path=data.eval_data_path,
            image_root=data.image_root,
            group_by=data.group_by,
            columns=columns_from(data.columns, data.question, data.answer_column),
            eval_fraction=data.eval_fraction,
            test_fraction=data.test_fraction,
            seed=data.split_seed,
            on_bad_row=data.on_bad_row,
            max_bad_fraction=data.max_bad_fraction,
            given_splits=data.given_splits,
            group_near_duplicates=data.group_near_duplicates,
            allow_outside_paths=data.allow_outside_paths,
            allow_remote_images=data.allow_remote_images,
            box_format=data.box_format,
            video_frames=data.video_frames,
            encoded=not data.no_cache,
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """Every path of training data."""
        return (self.data_path,) if isinstance(self.data_path, str) else self.data_path

    @property
    def given_paths(self) -> list[str]:
        """Every path and URI of data and images, with the secrets that URIs may hold."""
        return [path for path in (*self.paths, self.eval_data_path, self.image_root) if path is not None]

    def scan(self) -> ScannedData:
        """Cut the files into fragments. Costs one pass over JSONL files; call it once and pass the result on.

        Raises:
            DataError: a file cannot be read, or vlmtune does not know its format.
        """
        sources = [self._scan_path(path) for path in self.paths]
        training = [fragment for fragments in sources for fragment in fragments]
        evaluation = None if self.eval_data_path is None else self._scan_path(self.eval_data_path)
        return ScannedData(training, evaluation, tuple(len(fragments) for fragments in sources))

    def _scan_path(self, path: str) -> list[Fragment]:
        return scan(
            path,
            image_root=self.image_root,
            group_by=self.group_by,
            columns=self.columns,
            allow_outside_paths=self.allow_outside_paths,
            allow_remote_images=self.allow_remote_images,
        )


def fingerprint(source: DataSource, fragments: Sequence[Fragment], processor: Any) -> str:
    """The store's key, 24 hex digits.

    It changes with the data files, the processor, the chat template and the options that change a prepared
    row, but not with secrets in URIs.
    """
    options = {name: value for name, value in asdict(source).items() if name not in NOT_IN_KEY}
    options["trust_remote_code"] = source.model.trust_remote_code
    options["box_format"] = box_format_name(source.model, source.box_format)
    content = {
        "format": STORE_FORMAT,
        "options": redacted_values(options),
        "fragments": redacted_values([asdict(fragment) for fragment in fragments]),
        "files": redacted_values(file_states(sorted({fragment.path for fragment in fragments}))),
        "processor": processor.to_json_string(),
        "template": processor.chat_template or processor.tokenizer.chat_template,
        "tokenizer": hashlib.blake2b(_tokenizer_content(processor.tokenizer).encode()).hexdigest(),
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _tokenizer_content(tokenizer: Any) -> str:
    """Everything that determines a tokenizer's ids; for a slow (Python) tokenizer, its vocabulary."""
    if tokenizer.is_fast:
        content: str = tokenizer.backend_tokenizer.to_str()
        return content
    return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
