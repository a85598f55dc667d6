"""Reads VQA's files: one object with `questions`, and one with `annotations` that are the answers."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pyarrow import fs

from vlmtune.data.file_formats.json_object import is_object_of_lists, load_object
from vlmtune.data.fragment import Format, Fragment, PathContents
from vlmtune.data.names import IMAGE_SUFFIXES
from vlmtune.data.records import RawRow
from vlmtune.errors import DataError
from vlmtune.storage import filesystem, join, parent

LAST_NUMBER = re.compile(r"([0-9]+)[^0-9]*$")


def _recognizes(contents: PathContents) -> bool:
    return is_object_of_lists(contents, ("questions",)) or _is_answers(contents)


def _is_answers(contents: PathContents) -> bool:
    return is_object_of_lists(contents, ("annotations",))


def _cut(contents: PathContents) -> list[Fragment]:
    whole = contents.whole
    if _is_answers(contents):
        return []  # read together with its questions file, which is beside it
    if whole.columns.question is not None:
        raise DataError(f"{whole.shown_path} holds questions of its own: leave out --question")
    questions = load_object(whole.path, whole.shown_path)["questions"]
    answers_file = "" if _has_answers(questions) else _answers_file(whole, questions)
    version = _state(join(parent(whole.path), answers_file)) if answers_file else ""
    return [replace(whole, format=VQA.name, files=(answers_file,), version=version)]


def _state(path: str) -> str:
    """The size of a file and the time of its last change."""
    system, inner = filesystem(path)
    info = system.get_file_info(inner)
    return f"{info.size} {info.mtime_ns}"


def _has_answers(questions: list[Any]) -> bool:
    return bool(questions) and isinstance(questions[0], Mapping) and "answer" in questions[0]


def _answers_file(whole: Fragment, questions: list[Any]) -> str:
    """The name of the file beside the questions that holds their answers."""
    question_ids = {question.get("question_id") for question in questions if isinstance(question, Mapping)}
    folder = parent(whole.path)
    system, inner = filesystem(folder)
    names: list[str] = sorted(
        entry.base_name
        for entry in system.get_file_info(fs.FileSelector(inner))
        if entry.base_name.endswith(".json") and not whole.path.endswith(f"/{entry.base_name}")
    )
    for name in names:
        content = load_object(join(folder, name), name)
        answers = content.get("annotations")
        first = answers[0] if isinstance(answers, list) and answers else None
        if isinstance(first, Mapping) and first.get("question_id") in question_ids:
            return name
    raise DataError(
        f"{whole.shown_path} holds questions, but no file beside it holds their answers (an object with "
        "`annotations` of the same question_id): put it in the same folder"
    )


def _rows(fragment: Fragment) -> Iterator[RawRow]:
    questions = load_object(fragment.path, fragment.shown_path)["questions"]
    answers: dict[Any, Any] = {}
    if answers_file := fragment.files[0]:
        content = load_object(join(parent(fragment.path), answers_file), answers_file)
        answers = {one.get("question_id"): one for one in content["annotations"] if isinstance(one, Mapping)}
    images = _images_by_number(fragment.rules.root)
    for number, question in enumerate(questions):
        source = f"{fragment.shown_path} questions[{number}]"
        yield _row(source, question, answers, images)


def _row(source: str, question: Any, answers: Mapping[Any, Any], images: Mapping[int, list[str]]) -> RawRow:
    if not isinstance(question, Mapping) or "question" not in question:
        return RawRow(source, error="it has no 'question'")
    image = question.get("image") or question.get("file_name")
    if image is None:
        fitting = images.get(int(question.get("image_id", -1)), [])
        if len(fitting) != 1:
            several = f"fits {len(fitting)} images ({', '.join(fitting[:2])})" if fitting else "fits no image"
            return RawRow(source, error=f"image_id {question.get('image_id')} {several} below --image_root")
        image = fitting[0]
    answer = _answer({**answers.get(question.get("question_id"), {}), **question})
    if answer is None:
        return RawRow(source, error="its question_id has no answer among the annotations")
    record = {"image": image, "question": question["question"], "answer": answer}
    return RawRow(source, record, group_fields=question)


def _answer(annotation: Mapping[str, Any]) -> Any:
    """The answer that most people gave, or the only one."""
    for name in ("multiple_choice_answer", "answer"):
        if annotation.get(name) is not None:
            return annotation[name]
    given = [
        one.get("answer") if isinstance(one, Mapping) else one for one in annotation.get("answers") or []
    ]
    return max(given, key=given.count) if given else None


def _images_by_number(root: str) -> dict[int, list[str]]:
    """The images below a folder, by the last number in their name, which `image_id` refers to."""
    system, inner = filesystem(root)
    by_number: dict[int, list[str]] = {}
    for entry in system.get_file_info(fs.FileSelector(inner, recursive=True)):
        stem, _, ending = entry.base_name.rpartition(".")
        number = LAST_NUMBER.search(stem)
        if number and f".{ending.lower()}" in IMAGE_SUFFIXES:
            by_number.setdefault(int(number.group(1)), []).append(entry.path[len(inner) :].lstrip("/"))
    return by_number


VQA = Format("VQA", _recognizes, _cut, _rows)
