"""Rows of Parquet and Arrow: captions or conversations, and pictures as bytes or paths (extra: parquet)."""

from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from mmtransformer.data.files.archives import Files
from mmtransformer.data.files.columns import Columns, find_columns, image_columns, may_say_splits
from mmtransformer.data.files.members import Entry
from mmtransformer.data.files.read_options import ColumnNames
from mmtransformer.data.files.tables import ManifestRow, make_row
from mmtransformer.data.formats.json.conversations import KEYS, is_turn
from mmtransformer.data.formats.json.files import read_records
from mmtransformer.data.formats.parquet import (
    ARROW,
    TableBytes,
    open_table,
    read_texts,
    refuse_bombs,
    require_pyarrow,
    with_words,
)

_SOME = 20  # rows that tell whether a column says splits


def holds_images(path: Path) -> bool:
    """Whether a Parquet or Arrow file has the bytes of pictures, and not their paths; True if it can't be read."""
    pa = require_pyarrow(path.name)
    try:
        return any(_holds_bytes(field.type) for field in open_table(str(path)).schema_arrow)
    except (pa.ArrowException, OSError):
        return True  # whoever reads it says what is wrong


def read_columnar(files: Files, entry: Entry, wanted: ColumnNames) -> tuple[Columns, Iterator[ManifestRow]]:
    """Reads captions, or conversations, and paths; of pictures kept as bytes only the places, as `ManifestRow.key`.

    Raises:
        ValueError: If pyarrow is missing, the file lies in an archive or is damaged, or no column fits.
    """
    path = str(files.root / entry.path)
    kind = "Arrow" if path.lower().endswith(ARROW) else "Parquet"
    pa = require_pyarrow(entry.path, kind)
    if entry.archive >= 0:
        raise ValueError(f"{entry.path}: {kind} inside an archive can't be read in place: unpack it")
    try:
        table = open_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{entry.path} is not {kind}: {error}") from None
    if kind == "Parquet":  # an ArrowFile has looked itself
        refuse_bombs(table.metadata, entry)
    schema = table.schema_arrow
    if all(name in schema.names and _is_words(schema.field(name).type) for name in ("images", "texts")):
        raise ValueError(f"{entry.path} holds interleaved documents, which are read as JSON lines: save it as .jsonl")
    turns = _turns(schema) if wanted.captions is None and wanted.images else ""
    if not turns:
        words = [
            name for name in schema.names if may_say_splits(name) and not pa.types.is_nested(schema.field(name).type)
        ]
        some = [cells for _, cells, _ in islice(_Rows(path, entry, table, words, ""), _SOME)] if words else []
        columns = find_columns(schema.names, wanted, entry.path, some)
        image = columns.image
        texts = [name for name, _ in columns.captions]
        texts += [name for name in (columns.language, columns.split, columns.question) if name]
    else:
        columns, image = None, wanted.image or _image(schema)
        texts = [turns, *(name for name in ("language", "split") if name in schema.names)]
    rows = _Rows(path, entry, table, texts, image)
    if columns is not None:
        return columns, rows.captions(columns)
    return rows.conversations(turns, wanted)


class _Rows:
    """The rows of a table, some columns of each.

    Args:
        path: The file.
        entry: Its place.
        table: The file, opened.
        texts: The columns that are read.
        image: The column of pictures; "" = none.
    """

    def __init__(self, path: str, entry: Entry, table: Any, texts: list[str], image: str):
        kind = table.schema_arrow.field(image).type if image else None
        self.entry, self.image, self.as_bytes = entry, image, kind is not None and _holds_bytes(kind)
        self.lists = kind is not None and _element(kind) is not kind
        self.holder = TableBytes(path, image)
        places = _name_leaves(table, image, kind) if self.as_bytes else [image] if image else []
        self.read = [*dict.fromkeys(texts + places)]
        self.table = table if path.lower().endswith(ARROW) else with_words(path, self.read)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any], Any]]:
        """Where each row stands, its cells, names in the place of pictures' bytes, and where these are."""
        import pyarrow as pa

        number = 0
        for group in range(self.table.num_row_groups):
            try:
                found, names = read_texts(self.table, group, self.read, self.entry), repeat(None)
                if self.as_bytes:
                    here = self.image in found.column_names
                    names = _names(found.column(self.image)) if here else repeat([None])
                    found = found.drop_columns([self.image] if here else [])
                records = found.to_pylist() if found.num_columns else [{}] * found.num_rows
            except (pa.ArrowException, OSError, ValueError) as error:
                said = " ".join(str(error).split())
                raise ValueError(f"{self.entry.path} is damaged in row group {group}: {said}") from None
            for at, (record, pictures) in enumerate(zip(records, names, strict=False)):
                number += 1
                where = f"{self.entry.path}:{number}"
                if pictures is None:
                    yield where, record, None
                else:
                    named = [name or where for name in pictures]
                    yield where, record | {self.image: named if self.lists else named[0]}, (self.holder, group, at)

    def captions(self, columns: Columns) -> Iterator[ManifestRow]:
        """Rows with captions."""
        for where, record, key in self:
            row = make_row(record, columns, where)
            yield row if row.image is None else row._replace(key=key)

    def conversations(self, turns: str, wanted: ColumnNames) -> tuple[Columns, Iterator[ManifestRow]]:
        """Rows of conversations, whose column is `turns`, read as those of JSON are."""
        keys: dict[str, Any] = {}

        def records() -> Iterator[tuple[str, Any, str]]:
            for where, record, key in self:
                keys[where] = key
                record[KEYS[0]] = record.pop(turns) or []
                record["images" if self.lists else "image"] = record.pop(self.image, None)
                yield where, record, ""

        columns, rows = read_records(records(), self.entry.path, wanted._replace(image=None))
        return columns, (row if row.image is None else row._replace(key=keys[row.where]) for row in rows)


def _turns(schema: Any) -> str:
    """The column of conversations: lists of turns under one of the names that JSON has them by; "" = none."""
    import pyarrow as pa

    for name in [name for name in KEYS if name in schema.names]:
        element = _element(kind := schema.field(name).type)
        if element is not kind and pa.types.is_struct(element) and is_turn([field.name for field in element]):
            return name
    return ""


def _image(schema: Any) -> str:
    """The column of pictures beside conversations; "" = none."""
    named = image_columns(schema.names)
    held = [name for name in named if _holds_bytes(schema.field(name).type)]
    return next(iter(held or named), "")


def _is_words(kind: Any) -> bool:
    import pyarrow as pa

    element = _element(kind)
    return element is not kind and (pa.types.is_string(element) or pa.types.is_large_string(element))


def _element(kind: Any) -> Any:
    """What lists of a type hold; of no list the type itself."""
    import pyarrow as pa

    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return kind.value_type if listed else kind


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of this type holds files: bytes, or `datasets`' struct of bytes and path, or lists of these."""
    import pyarrow as pa

    kind = _element(kind)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _name_leaves(table: Any, image: str, kind: Any) -> list[str]:
    """What is to be read for the names of pictures, and in lists for their number, without the bytes if it can be."""
    import pyarrow as pa

    inside = _element(kind)
    named = pa.types.is_struct(inside) and inside.get_field_index("path") >= 0
    if not named and inside is kind:
        return []
    if named and (leaves := getattr(table, "schema", None)) is not None:
        paths = [leaves.column(i).path for i in range(len(leaves))]
        return [path for path in paths if path.startswith(f"{image}.") and path.endswith(".path")]
    return [image]


def _names(column: Any) -> Iterator[list[str | None]]:
    """The names of each row's pictures; a picture in no list is there, named or not."""
    import pyarrow as pa
    from pyarrow import compute

    pc: Any = compute  # its functions are made when it is loaded
    for chunk in column.chunks:
        lists = _element(chunk.type) is not chunk.type
        flat: Any = pc.list_flatten(chunk) if lists else chunk
        named = pa.types.is_struct(flat.type) and flat.type.get_field_index("path") >= 0
        names = iter(pc.struct_field(flat, "path").to_pylist() if named else repeat(None))
        for count in pc.list_value_length(chunk).to_pylist() if lists else repeat(1, len(chunk)):
            yield [next(names) for _ in range(count or 0)]
