"""Formats of data that have a module of their own here."""

from vlmtune.data.file_formats.coco import COCO
from vlmtune.data.file_formats.image_folders import CLASS_FOLDERS, METADATA
from vlmtune.data.file_formats.table_files import TABLE
from vlmtune.data.file_formats.vqa import VQA
from vlmtune.data.file_formats.webdataset import SHARD, SHARDS
from vlmtune.data.fragment import Format

# The first format in this order that recognizes a folder, or a file, reads it.
FOLDER_FORMATS: tuple[Format, ...] = (METADATA, SHARDS, CLASS_FOLDERS)
FILE_FORMATS: tuple[Format, ...] = (SHARD, COCO, VQA, TABLE)
