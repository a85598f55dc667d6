"""The `--help` of the training commands: options in groups, each once, with its real default."""

import re
import textwrap
from collections.abc import Sequence

from vlmtune.config.flag_table import GROUPS, flags
from vlmtune.config.flags import Flag

WIDTH = 100  # columns
TEXT_COLUMN = 36  # where descriptions begin
TITLES = {
    "run": "run",
    "data": "data",
    "model": "base model",
    "lora": "LoRA",
    "training": "training",
    "search": "search",
}
# What `--help` shows; `--help_all` shows every option.
COMMON = frozenset(
    """
    data_path eval_data_path eval_fraction test_fraction group_by image_root on_bad_row on_long_row
    columns question answer_column
    output_dir num_workers gpus storage_path overwrite resume use_cpu
    model_name_or_path quantization dtype trust_remote_code
    lora_r lora_alpha lora_dropout lora_target_modules lora_vision
    learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps
    max_length lr_scheduler_type warmup_steps weight_decay eval_steps gradient_checkpointing seed report_to
    trial_runner
    search_space num_samples max_concurrent_trials metric mode more_metrics time_budget_s refit confirm
    """.split()  # noqa: SIM905  # fifty names read better so
)
# Options of the group `search` that the help of a command without a search shows too.
SEARCH_OPTIONS_OF_TRAIN = frozenset({"trial_runner"})


def help_text(usage: str, description: str, *, search: bool, everything: bool) -> str:
    """The help text of a command.

    Args:
        search: whether the command is a search, and so has the options of a search.
        everything: show every option, with its whole description.
    """
    parts = [
        usage,
        description.strip(),
        _entry("--config FILE", "YAML file of options by name; flags override it."),
    ]
    for group in GROUPS:
        if group not in TITLES:
            continue
        listed = [
            flag
            for flag in flags().values()
            if flag.group == group
            and (everything or flag.name in COMMON)
            and (search or group != "search" or flag.name in SEARCH_OPTIONS_OF_TRAIN)
        ]
        if listed:
            entries = [_entry(*_columns(flag, everything=everything)) for flag in listed]
            parts.append("\n".join([f"{TITLES[group]}:", *entries]))
    if not everything:
        parts.append("--help_all shows every option, those of TRL and transformers too.")
    return "\n\n".join(parts) + "\n"


def _columns(flag: Flag, *, everything: bool) -> tuple[str, str]:
    """(flag with its kind of value, description with its default): the two columns of the help."""
    if flag.choices and len(",".join(flag.choices)) <= 40:
        value = "{" + ",".join(flag.choices) + "}"
    else:
        value = {
            "bool": "[true|false]",
            "list": "NAME ...",
            "pairs": "FIELD=COLUMN ...",
            "paths": "PATH ...",
            "numbers": "NUMBER ...",
        }.get(flag.kind, flag.kind.upper())
    text, automatic = _without_default(flag.help)
    words = text if everything else first_sentence(text)
    default = default_text(flag, automatic)
    return f"--{flag.name} {value}", f"{words} ({default})" if default else words


def first_sentence(text: str) -> str:
    """A description up to the end of its first sentence, which a capital or a flag's name follows."""
    first = re.split(r"\.(?= (?:[A-Z`]|\w+_))|;", text, maxsplit=1)[0].rstrip(".")
    return f"{first}." if first else ""


def _without_default(text: str) -> tuple[str, str]:
    """A description without its words on the default ("By default, …", "auto: …"), and those words."""
    found = re.search(r"\s*By default,? (?P<what>[^.]+)\.|; auto: (?P<auto>[^.]+)\.", text)
    if found is None:
        return text, ""
    rest = (text[: found.start()] + ("." if found["auto"] else "") + text[found.end() :]).strip()
    return rest, found["what"] or found["auto"]


def default_text(flag: Flag, automatic: str) -> str:
    """The default as a user would type it; `auto: …` if vlmtune decides."""
    default = flag.default
    if default is None or default == "auto":
        return (
            f"auto: {automatic}" if automatic else "auto" if default == "auto" or flag.kind == "bool" else ""
        )
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list):
        return ",".join(map(str, default)) or "none"
    text = f"{default:g}" if isinstance(default, float) else str(default)
    return f"{text}; {automatic}" if automatic else text


def _entry(flag: str, text: str) -> str:
    """A flag and its description in two columns."""
    lines: Sequence[str] = textwrap.wrap(text, WIDTH - TEXT_COLUMN)
    head = f"  {flag}"
    if len(head) + 2 > TEXT_COLUMN:
        return "\n".join([head, *(" " * TEXT_COLUMN + line for line in lines)])
    first, *rest = lines or [""]
    return "\n".join([f"{head:<{TEXT_COLUMN}}{first}", *(" " * TEXT_COLUMN + line for line in rest)])
