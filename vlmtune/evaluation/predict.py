"""Answer images or rows. Answers are written as they come, so that a killed run can be resumed.

OUTPUT_DIR/predict.yaml               which data, model and options; a run with others cannot resume
OUTPUT_DIR/parts/FRAGMENT-ROW.jsonl   finished rows, up to this row of this fragment; appears only when
complete OUTPUT_DIR/predictions.jsonl          or .parquet: all rows in the order of the data, written at the
end
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vlmtune import output, storage
from vlmtune.cluster import connect, in_ray_job
from vlmtune.config import yaml12
from vlmtune.config.settings import Settings
from vlmtune.console import console_line
from vlmtune.data.box_formats import box_format_name
from vlmtune.data.find_input_format import find_input_format
from vlmtune.data.find_video_format import find_video_format
from vlmtune.data.fragment import Fragment
from vlmtune.data.question_columns import columns_from
from vlmtune.data.video_frames import check_installed
from vlmtune.errors import ConfigError
from vlmtune.evaluation.actors import ADAPTER, BASE, AnswerJob, answer_rows
from vlmtune.evaluation.adapter import adapter_settings, check_adapter_fits, read_adapter_files
from vlmtune.evaluation.generate import BatchBuilder
from vlmtune.evaluation.options import PredictOptions
from vlmtune.evaluation.prediction_parts import join_parts, next_row, read_predictions, write_parts
from vlmtune.evaluation.questions import ImageList, question_fragments, read_questions
from vlmtune.session import with_absolute_paths
from vlmtune.shown_text import redacted_values
from vlmtune.storage import file_states

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

# Settings that the answers depend on, beside the data, the question and the adapter's weights.
MODEL_SETTINGS = (
    *("model_name_or_path", "model_revision", "trust_remote_code", "quantization", "dtype"),
    *("attn_implementation", "use_bnb_nested_quant", "llm_int8", "use_cpu"),
    *("max_pixels", "min_pixels", "max_image_tiles"),
)


@dataclass(frozen=True)
class PredictResult:
    """What `vlmtune.predict` wrote.

    Attributes:
        folder: absolute path or URI of the output folder.
        predictions_file: the answers as JSONL or Parquet, see `predictions`.
        rows: number of rows.
        errors: number of rows that could not be answered; their `error` says why.
    """

    folder: str
    predictions_file: str
    rows: int
    errors: int

    def predictions(self) -> "pd.DataFrame":
        """One row for each image or data row, in the order of the data.

        Columns: `source`, `images` (paths or URLs), `question`, `answer`, `reference` (the answer in the
        data, if any), `error` (missing if the row was answered).
        """
        return read_predictions(self.predictions_file)


def predict_rows(options: PredictOptions) -> PredictResult:
    """Answer all rows, or resume an interrupted run with the same options.

    Raises:
        UserError: something is wrong with the adapter, its base, the data or the machine. A row that cannot
            be answered does not raise: its `error` holds the reason.
    """
    overrides = {**options.overrides, "data_path": options.data_path, "output_dir": options.output_dir}
    settings = with_absolute_paths(adapter_settings(options.adapter, overrides))
    folder = output.resolve_folder(settings.run.output_dir, in_job=in_ray_job())
    data = settings.data
    fragments = question_fragments(
        options.data_path,
        options.question,
        image_root=data.image_root,
        allow_outside_paths=data.allow_outside_paths,
        allow_remote_images=data.allow_remote_images,
        columns=columns_from(data.columns, None, None, answers=False),
    )
    identity = _identity(options, settings, fragments)
    start = _resume_point(folder, identity, overwrite=settings.run.overwrite)
    check_adapter_fits(settings, options.adapter)
    cluster = connect()
    model_ref = settings.model.ref
    processor: Any = model_ref.processor()
    input_format = find_input_format(processor)
    if data.video_frames is not None:
        check_installed()
        input_format = find_video_format(processor, input_format)
    boxes = box_format_name(model_ref, data.box_format)
    pad = processor.tokenizer.pad_token_id
    job = AnswerJob(
        settings,
        {} if options.base_only else {ADAPTER: read_adapter_files(options.adapter)},
        (BASE if options.base_only else ADAPTER,),
        BatchBuilder(input_format, processor.tokenizer.eos_token_id if pad is None else pad),
        options.max_new_tokens,
        likelihoods=False,
    )

    def read_fragment(item: dict[str, Any]) -> Iterator[dict[str, bytes]]:
        fragment = fragments[item["fragment"]]
        return read_questions(
            fragment, item["fragment"], item["first"], model_ref, input_format, boxes, data.video_frames
        )

    first_fragment, first_row = start or (0, 0)
    items = [
        {"fragment": index, "first": first_row if index == first_fragment else 0}
        for index in range(first_fragment, len(fragments))
    ]
    if start is None:
        output.claim(folder, overwrite=settings.run.overwrite, kind=output.PREDICTION)
        storage.write_text(f"{folder}/predict.yaml", output.dump_redacted(identity))
    else:
        logger.info(console_line("", "resuming: answers that are already written are kept"))
    images = sum(len(fragment.paths) for fragment in fragments if isinstance(fragment, ImageList)) or None
    write_parts(folder, answer_rows(job, items, read_fragment, cluster, rows=images), job.models[0], images)
    file, rows, errors = join_parts(folder, options.format)
    return PredictResult(folder, file, rows, errors)


def _identity(
    options: PredictOptions, settings: Settings, fragments: Sequence[Fragment | ImageList]
) -> dict[str, Any]:
    """Everything that the answers depend on: the content of predict.yaml."""
    paths = sorted(
        {
            path
            for fragment in fragments
            for path in (fragment.paths if isinstance(fragment, ImageList) else (fragment.path,))
        }
    )
    weights = {} if options.base_only else read_adapter_files(options.adapter)
    data = [[asdict(fragment) for fragment in fragments], file_states(paths)]
    identity: dict[str, Any] = {
        "data_path": settings.data.data_path,
        "question": options.question,
        "adapter": None if options.base_only else options.adapter,
        "max_new_tokens": options.max_new_tokens,
        **{name: settings.value(name) for name in MODEL_SETTINGS},
        "weights": _digest(*weights.values()),
        "data": _digest(json.dumps(data, default=str).encode()),
    }
    return {name: redacted_values(value) for name, value in identity.items()}  # as predict.yaml is written


def _digest(*contents: bytes) -> str:
    return hashlib.blake2b(b"\0".join(contents), digest_size=12).hexdigest()


def _resume_point(folder: str, identity: dict[str, Any], *, overwrite: bool) -> tuple[int, int] | None:
    """The (fragment, row) at which an interrupted run with the same identity resumes; None for a new run.

    Raises:
        ConfigError: the folder holds finished predictions, those of another run, or other things, and
            `overwrite` is not set.
    """
    finished = any(storage.exists(f"{folder}/predictions.{suffix}") for suffix in ("jsonl", "parquet"))
    if overwrite or finished or not storage.exists(f"{folder}/predict.yaml"):
        output.check_free(folder, overwrite=overwrite, kind=output.PREDICTION)
        return None
    before = yaml12.load_value(storage.read_text(f"{folder}/predict.yaml"))
    if changed := [name for name, value in identity.items() if before.get(name) != value]:
        raise ConfigError(
            f"--output_dir {folder}: holds predictions that were begun with another {changed[0]}; "
            "choose another folder, or replace them with --overwrite"
        )
    return next_row(folder)
