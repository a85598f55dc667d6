"""Columns of Parquet and of datasets."""

import pyarrow as pa
import pytest

from vlmtune.data.columns import readable_columns, unread_columns
from vlmtune.errors import DataError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def test_columns_of_plain_values_are_read_and_others_named() -> None:
    schema = pa.schema(
        [("image", IMAGE), ("output", pa.int64()), ("name", pa.string()), ("boxes", pa.list_(pa.float32()))]
    )
    assert readable_columns(schema, None) == ["image", "output", "name"]
    assert readable_columns(schema, "boxes") == ["image", "output", "name", "boxes"]
    assert unread_columns(schema, None, 5, "a.parquet") == (("field boxes", 5),)


@pytest.mark.parametrize("kind", [IMAGE, pa.list_(IMAGE)])
def test_images_in_a_column_that_is_not_read(kind: pa.DataType) -> None:
    schema = pa.schema([("output", pa.string()), ("photo", kind)])
    with pytest.raises(DataError, match=r"a.parquet: column 'photo' holds images, but is not read"):
        unread_columns(schema, None, 5, "a.parquet")
