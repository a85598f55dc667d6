"""The words of the project are those of docs/glossary.md; words that it had before do not come back.

Each pattern here is written so that it does not match its own text.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# History keeps its words, and the demo's base model is numbers and token pieces. The families of models are
# still being worked on: take them off this list when they are done.
EXEMPT = ("docs/LOG.md", "CHANGELOG.md", "vlmtune/demo/base/", "tests/families/")
# Questions of the demo's data and of probes. Other words would make other data, and so other numbers. The
# last one is an older flag of `demo/pretrain.py`.
SAMPLE_TEXTS = re.compile(r'in this pictur[e]\b|\("pictur[e]", "|"--pictur[e]s"')
TEXT_SUFFIXES = {"", ".py", ".md", ".yaml", ".toml", ".txt", ".sh"}

# The word that is written instead, by a pattern of the one that is not.
PHRASES = {
    r"pictur[e]": "image",
    r"config'?s'? ow[n] values": "the baseline (the config's values)",
    r"goes o[n] where it was|(ended|command is) (and )?give[n] again": "resumes when you rerun the command",
    r"i[s] no number": "NaN or infinite",
    r"the larger i[s] the better": "higher is better for this metric",
    r"onl[y] pad it": "padding images",
    r"of row[s] that went through": "per-row loss and correct-token count",
    r"\bresiden[t]\b": "dequantized base",
}
# Names that have another name now, or that did not say what they hold.
IDENTIFIERS = {
    "OnTheWay": "AsyncHostCopy",
    "Share": "WorkerShard",
    "Found": "PassResult",
    "add_up": "all_reduce_sum",
    "without_walks": "TrainedView",
    "own_trial": "baseline_trial",
    "_let_in_and_out": "_apply_joins_and_leaves",
    "told": "notes_sent",
    "taken": "next_report",
    "asked": "last_polled",
    "coming": "pending",
    "LATER": "ENGINE_START_GRACE_S",
    "AHEAD": "MAX_UNREAD_REPORTS",
    "PassRow": "PackedRow",
    "NO_ROW_FITS": "DOES_NOT_FIT",
    "_end_too_large": "_end_trials_that_do_not_fit",
    "run_plain_model": "record_reference",
    "DISCARDED_OUTPUTS": "NOT_MODEL_TENSORS",
    "with_observations": "with_earlier_results",
    "cut_passes": "packed_batches",
    "MicroBatch": "BatchRows",
    "score_positions": "add_positions_argument",
    "label_scores": "log_probs_at_labels",
    "recapture": "discard_graphs",
    "judged_by_best": "with_best_model_at_end",
    "unfinished_search": "read_interrupted_trials",
    "describe_ties": "describe_largest_group",
    "kept_rows": "usable_rows",
    "Piece": "Fragment",
    "skip_module_traversal": "TrainedView",
    "EarlierTrial": "ReplayedTrial",
    "needs_has_images": "reduce_has_images",
    "_prompt_ends_first": "_move_trailing_tokens",
    "repeat_from_before": "rewind_before_damage",
    "names_of": "image_names",
    "cost_is_told": "cost_is_printed",
}
SETTINGS_BY_NAME = re.compile(r"\bsettings(\.\w+)*\.get\(|[sS]ettings\.from_dict\(")


def tracked_files() -> list[Path]:
    """The text files that git tracks, without the exempt ones."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in names.splitlines() if not name.startswith(EXEMPT)]
    return [path for path in paths if path.suffix in TEXT_SUFFIXES and path.is_file()]


def wrong_words(text: str) -> Iterator[str]:
    """Old phrases in a text, each with its line number and the words to use."""
    text = SAMPLE_TEXTS.sub("", text)  # none of them spans lines
    for pattern, instead in PHRASES.items():
        for match in re.finditer(pattern.replace(" ", r"\s+"), text, re.IGNORECASE):
            yield f"{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}: write {instead!r}"


def wrong_names(source: str) -> Iterator[str]:
    """Old identifiers that a module defines or uses."""
    for node in ast.walk(ast.parse(source)):
        name = {
            ast.Name: "id",
            ast.Attribute: "attr",
            ast.arg: "arg",
            ast.FunctionDef: "name",
            ast.ClassDef: "name",
        }.get(type(node))
        if name is not None and (found := getattr(node, name)) in IDENTIFIERS:
            yield f"{node.lineno}: {found}: call it {IDENTIFIERS[found]}"


def test_texts_use_the_words_of_the_glossary() -> None:
    assert [
        f"{path.relative_to(ROOT)}:{wrong}"
        for path in tracked_files()
        for wrong in wrong_words(path.read_text(encoding="utf-8"))
    ] == []


def test_names_say_what_they_hold() -> None:
    assert [
        f"{path.relative_to(ROOT)}:{wrong}"
        for path in tracked_files()
        if path.suffix == ".py"
        for wrong in wrong_names(path.read_text(encoding="utf-8"))
    ] == []


def test_settings_are_read_by_field() -> None:
    assert [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in tracked_files()
        if path.suffix == ".py" and path.is_relative_to(ROOT / "vlmtune")
        for match in SETTINGS_BY_NAME.finditer(path.read_text(encoding="utf-8"))
    ] == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("an image", 0),
        ("two Pictur" + "es", 1),
        ("How many are in this pictur" + "e?", 0),
        ("the config's\n    ow" + "n values", 1),
        ("residents", 0),
    ],
)
def test_an_old_phrase_is_found_across_lines(text: str, wrong: int) -> None:
    assert len(list(wrong_words(text))) == wrong


def test_old_names_and_settings_by_name_are_found() -> None:
    source = "def run(asked):\n    told = asked.coming\n    return taken_back(told)\n"
    assert [wrong.split(":")[1].strip() for wrong in wrong_names(source)] == [
        "asked",
        "told",
        "coming",
        "asked",
        "told",
    ]
    assert SETTINGS_BY_NAME.search('settings.training.get("seed")')
    assert not SETTINGS_BY_NAME.search("settings.training.seed")
