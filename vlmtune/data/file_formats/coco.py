"""Reads COCO's caption files: one object with `images` and `annotations`. Each caption is a row."""

from collections.abc import Iterator
from dataclasses import replace

from vlmtune.data.file_formats.json_object import is_object_of_lists, load_object
from vlmtune.data.fragment import Format, Fragment, PathContents
from vlmtune.data.records import RawRow
from vlmtune.errors import DataError

CAPTION_QUESTION = "Describe this image in one sentence."


def _recognizes(contents: PathContents) -> bool:
    return is_object_of_lists(contents, ("images", "annotations"))


def _cut(contents: PathContents) -> list[Fragment]:
    whole = contents.whole
    content = load_object(whole.path, whole.shown_path)
    captions = [one for one in content["annotations"] if isinstance(one, dict) and "caption" in one]
    if not captions:
        raise DataError(
            f"{whole.shown_path} holds COCO annotations without captions, which are no answers: "
            "write a CSV of image, question and answer"
        )
    if whole.columns.question is None:
        raise DataError(
            f"{whole.shown_path} holds captions and no question: give the one that a caption answers: "
            f'--question "{CAPTION_QUESTION}"'
        )
    if whole.columns.answer_column is None:
        whole = replace(whole, columns=replace(whole.columns, answer_column="caption"))
    return [replace(whole, format=COCO.name)]


def _rows(fragment: Fragment) -> Iterator[RawRow]:
    content = load_object(fragment.path, fragment.shown_path)
    images = {image.get("id"): image for image in content["images"] if isinstance(image, dict)}
    for number, annotation in enumerate(content["annotations"]):
        source = f"{fragment.shown_path} annotations[{number}]"
        image = images.get(annotation.get("image_id")) if isinstance(annotation, dict) else None
        if image is None or "file_name" not in image:
            yield RawRow(source, error="its image_id is the id of no image with a file_name")
            continue
        record = {"image": image["file_name"], "caption": annotation.get("caption")}
        yield RawRow(source, record, group_fields={**image, **annotation})


COCO = Format("COCO captions", _recognizes, _cut, _rows)
