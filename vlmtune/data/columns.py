"""Which columns of Parquet and Hugging Face datasets are read, and which are reported as not used."""

from collections.abc import Collection

import pyarrow as pa

from vlmtune.data.records import CONTENT_FIELDS
from vlmtune.errors import DataError

IMAGE_FIELDS = {"bytes", "path"}  # fields of the struct in which Hugging Face datasets store an image


def readable_columns(schema: pa.Schema, group_by: str | None, named: Collection[str] = ()) -> list[str]:
    """The columns with the content of rows, and all of plain values, in which a row may name its image.

    Other columns of lists, structs or bytes may be large and are not read, unless they are in `named`.
    """
    wanted = {*CONTENT_FIELDS, *named, group_by}
    return [
        field.name
        for field in schema
        if (field.name in wanted and not _is_detection(field)) or not _is_large(field.type)
    ]


def unread_columns(
    schema: pa.Schema, group_by: str | None, rows: int, shown_path: str, named: Collection[str] = ()
) -> tuple[tuple[str, int], ...]:
    """("field NAME", rows) of each column that is not read.

    Raises:
        DataError: one of them holds the images, and no other column does.
    """
    read = {*readable_columns(schema, group_by, named)}
    unread = [field for field in schema if field.name not in read]
    if not {"image", "images"} & set(schema.names) and not any(
        _is_image(field.type) for field in schema if field.name in read
    ):
        for field in unread:
            if _is_image(field.type):
                raise DataError(
                    f"{shown_path}: column {field.name!r} holds images, but is not read: "
                    "call it 'image', or take it out"
                )
    return tuple((f"field {field.name}", rows) for field in unread)


def _is_detection(field: pa.Field) -> bool:
    """Whether a column `objects` holds boxes of a detection dataset, without the `ref` of ms-swift."""
    type_ = field.type
    return (
        field.name == "objects"
        and pa.types.is_nested(type_)
        and not (pa.types.is_struct(type_) and {"ref", "bbox"} <= {inner.name for inner in type_})
    )


def _is_large(type_: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_nested(type_) or types.is_binary(type_) or types.is_large_binary(type_))


def _is_image(type_: pa.DataType) -> bool:
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return _is_image(type_.value_type)
    return pa.types.is_struct(type_) and {field.name for field in type_} == IMAGE_FIELDS
