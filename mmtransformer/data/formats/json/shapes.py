"""Which shape a JSON file with captions has: records in a list, below a key, by column or by picture, or COCO's."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from mmtransformer.data.files.columns import find_columns, image_columns, looks_like_image
from mmtransformer.data.files.endings import IMAGES
from mmtransformer.data.files.read_options import ColumnNames
from mmtransformer.data.files.text import split_word
from mmtransformer.data.formats.json.conversations import NoCaption, as_records, laid_open

_SOME = 20  # records that tell
_DEEP = 4  # keys below each other


class Shape(NamedTuple):
    """What a JSON file holds, in a form that is read.

    Attributes:
        format: "json", "coco" or "karpathy".
        data: Records in a list; of COCO's and Karpathy's form the mapping.
        key: Under which key of the file they stand, "data" or "dataset.rows"; "" = they are all of it.
    """

    format: str
    data: Any
    key: str = ""


def json_shape(data: Any, wanted: ColumnNames, ids: Collection[str] = ()) -> Shape | None:
    """The shape of what a JSON file holds; None if it can't be told.

    Args:
        data: The content.
        wanted: Columns that the user named.
        ids: The names of the pictures, without ending, which keys may be.
    """
    return _shape(data, wanted, ids, _DEEP)


def _shape(data: Any, wanted: ColumnNames, ids: Collection[str], deep: int) -> Shape | None:
    if isinstance(data, list) and data and isinstance(data[0], dict):
        inner = [] if fits(data, wanted) else _unrolled(data[:_SOME])
        return Shape("json", _unrolled(data) if inner and fits(inner, wanted) else data)
    if isinstance(data, list):
        return _of_rows(data, wanted)
    if not isinstance(data, dict) or not data:
        return None
    if (found := _coco(data, wanted)) is not None:
        return found
    images = data.get("images")
    if isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]:
        return Shape("karpathy", data)
    by_name = all(str(key).lower().endswith(IMAGES) for key in list(data)[:10])
    if by_name or (ids and all(map(_says, list(data.values())[:_SOME])) and _mostly(list(data)[:_SOME], ids)):
        return Shape("json", [_with_name(key, value) for key, value in data.items()])
    if (table := _of_columns(data, wanted)) is not None:
        return Shape("json", table)
    if deep:
        return _below(data, wanted, ids, deep)
    return None


def fits(records: Sequence[Any], wanted: ColumnNames) -> bool:
    """Whether records name pictures and captions, by the first of them."""
    some: list[Any] = []
    for record in records[:_SOME]:
        if not isinstance(record, dict):
            return False
        try:
            some += as_records(record)[0]
        except NoCaption:
            continue
    for records in (some, [laid_open(record) for record in some]):
        keys = dict.fromkeys(str(key) for record in records for key in record)
        try:
            find_columns(list(keys), wanted, "", records)
        except ValueError:
            continue
        return True
    return False


def _unrolled(records: Sequence[Any]) -> list[dict[str, Any]]:
    """Of records with a list of records each, these, with what stands beside their list: regions of a picture, say."""
    found: list[dict[str, Any]] = []
    for record in records:
        if not isinstance(record, dict):
            return []
        lists = [v for v in record.values() if isinstance(v, list) and v and all(isinstance(item, dict) for item in v)]
        if len(lists) > 1:
            return []
        beside = {key: value for key, value in record.items() if not isinstance(value, list | dict)}
        said = (
            {key: value for key, value in item.items() if value not in ("", None)} for some in lists for item in some
        )
        found.extend(beside | item for item in said)
    return found


def _below(data: Mapping[str, Any], wanted: ColumnNames, ids: Collection[str], deep: int) -> Shape | None:
    """What stands under one key, or under keys that name splits."""
    found: dict[str, Shape] = {}
    for key, value in data.items():
        if isinstance(value, list) and not (value and (isinstance(value[0], list) or fits(value, wanted))):
            continue
        if (inner := _shape(value, wanted, ids, deep - 1)) and (inner.format != "json" or fits(inner.data, wanted)):
            found[str(key)] = inner
    if len(found) == 1:
        ((key, shape),) = found.items()
        return shape._replace(key=f"{key}.{shape.key}" if shape.key else key)
    splits = {key: split_word(key) for key in found}
    if found and all(splits.values()) and {shape.format for shape in found.values()} == {"json"}:
        rows = [record | {"split": splits[key]} for key, shape in found.items() for record in shape.data]
        return Shape("json", rows, ", ".join(found))
    lists = [shape.data for shape in found.values() if isinstance(shape.data, list)]
    image = next(iter(image_columns([*lists[0][0]])), "") if lists else ""
    often = Counter(name for some in lists for name in {str(record.get(image)) for record in some})
    if image and len(lists) == len(data) and max(often.values()) == 1:  # a list a class, each of other pictures
        return Shape("json", [record for some in lists for record in some])
    return None


def _coco(data: dict[str, Any], wanted: ColumnNames) -> Shape | None:
    """COCO's form: pictures, and beside them, under any one key, captions with an image_id."""
    images = data.get("images")
    if not isinstance(images, list):
        return None
    for key, notes in data.items():
        some = notes[:10] if isinstance(notes, list) and key != "images" else ()
        keys = dict.fromkeys(key for note in some if isinstance(note, dict) and "image_id" in note for key in note)
        try:
            find_columns(list(keys), wanted._replace(images=False, image=None, language=None, split=None), "")
        except ValueError:
            continue
        return Shape("coco", {"images": images, "annotations": notes}, key)
    return None


def _of_columns(data: Mapping[str, Any], wanted: ColumnNames) -> list[dict[str, Any]] | None:
    """Records of a table by column, as data frames write them: {"image": {"0": ...}}, {"image": [...]}, and others."""
    columns, rows = data.get("columns"), data.get("data")
    if isinstance(columns, list) and isinstance(rows, list):
        table = _of_rows([columns, *rows], wanted)
        return table.data if table else None
    values = list(data.values())
    if all(isinstance(value, dict) for value in values):
        if all(value.keys() == values[0].keys() for value in values) and image_columns(list(data)):
            table = [{key: data[key][row] for key in data} for row in values[0]]
            return table if table and fits(table, wanted) else None
        return values if fits(values, wanted) else None
    if all(isinstance(value, list) and len(value) == len(values[0]) for value in values) and values[0]:
        table = [dict(zip(data, row, strict=True)) for row in zip(*values, strict=True)]
        return table if fits(table, wanted) else None
    return None


def _of_rows(rows: Sequence[Any], wanted: ColumnNames) -> Shape | None:
    """A list of lists: rows behind a header, or pairs of a picture's name and its caption."""
    if not rows or not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows) or not rows[0]:
        return None
    header, rest = rows[0], rows[1:]
    if len(header) == 2 and isinstance(header[0], str) and looks_like_image(header[0]):
        header, rest = ["image", "caption"], rows
    if not all(isinstance(name, str) for name in header):
        return None
    records = [dict(zip(header, row, strict=True)) for row in rest]
    return Shape("json", records) if records and fits(records, wanted) else None


def _says(value: Any) -> bool:
    """Whether what stands under a picture's name can be its captions."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, str | dict)


def _mostly(keys: Sequence[str], ids: Collection[str]) -> bool:
    return 2 * sum(str(key).rpartition("/")[2] in ids for key in keys) >= len(keys)


def _with_name(key: str, value: Any) -> dict[str, Any]:
    """A record of what stands under a picture's name."""
    return {"image": str(key), "captions": value}
