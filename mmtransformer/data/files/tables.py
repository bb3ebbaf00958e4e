"""Rows of manifests: which column is what, and reading CSV and TSV so that no odd line loses the file."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mmtransformer.data.files.cells import read_captions
from mmtransformer.data.files.endings import IMAGES
from mmtransformer.data.files.read_options import Wanted
from mmtransformer.data.files.text import (
    CODES,
    LANGUAGES,
    Line,
    is_missing,
    language_code,
    lines,
    normalize_text,
    split_word,
)
from mmtransformer.data.loading.source import Caption
from mmtransformer.serialization.printable import counted
from mmtransformer.text.conversation import Conversation

IMAGE = (
    "image", "filepath", "file_path", "image_path", "img_path", "imagepath", "image_file", "image_filename",
    "file_name", "filename", "image_name", "path", "img", "picture", "photo", "jpg", "png", "file", "image_url", "url",
    "이미지", "사진", "그림", "파일", "파일명", "파일이름", "파일_이름", "이미지_파일", "이미지_이름", "이미지_경로",
    "이미지파일", "이미지파일명", "이미지_파일명", "이미지경로", "이미지_url", "이미지url", "이미지주소", "대표이미지",
    "대표_이미지", "사진파일", "사진파일명", "사진_경로", "사진경로", "파일경로", "그림_파일",
    "image_file_name", "img_name", "img_file",
    "이미지명", "사진_파일", "사진_이름", "사진명", "파일_경로", "경로",
    "images", "photos",
    "bild", "bilddatei", "datei", "dateiname", "foto", "fichier", "imagen", "archivo", "immagine", "imagem",
)  # fmt: skip
CAPTION = (
    "captions", "caption", "title", "text", "texts", "txt", "sentences", "sentence", "descriptions", "description",
    "comment", "alt_text", "alt", "raw", "캡션", "설명", "설명문", "사진_설명", "이미지_설명",
    "이미지설명", "사진설명", "설명글", "한줄설명", "캡션문", "문구", "상품_설명", "상품설명", "상품명",
    "문장", "텍스트", "내용", "제목",
    "beschreibung", "bildunterschrift", "titel", "légende", "descripción", "descripcion", "título",
    "didascalia", "legenda",
)  # fmt: skip
IDS = (
    "image_id", "img_id", "imageid", "id", "key", "name", "uid", "아이디", "번호", "이름",
    "사진번호", "사진_번호", "이미지번호", "이미지_번호", "이미지_id", "사진_id",
)  # fmt: skip
"""Where no column names files."""
QUESTION = ("question", "질문", "질의", "문제", "frage", "pregunta", "domanda", "pergunta")
ANSWER = (
    "answers", "answer", "multiple_choice_answer", "답", "답변", "정답", "대답", "antwort", "respuesta", "réponse",
    "risposta",
)  # fmt: skip
LANGUAGE = ("language", "lang", "locale", "언어")
SPLIT = ("split", "subset", "partition", "분할")
TURNS = (("prefix", "suffix"), ("query", "response"), ("prompt", "response"), ("instruction", "output"))
"""What is asked and what is answered, in tables that have nothing else to say of a picture."""
FOLDER = ("folder", "folder_name", "foldername", "subfolder", "폴더", "폴더명", "폴더이름", "폴더_이름")
TITLES = 10  # lines at the top of a table, one of which is its header
_SOME = 20  # rows that tell which column has the pictures
_JOINED = 100  # lines that one quoted CSV field may span
_SEP = re.compile(r"sep=.\s*", re.IGNORECASE)  # Excel's first line


class ManifestRow(NamedTuple):
    """One row of a manifest, as written there.

    Attributes:
        image: The picture's name or path; None where its bytes lie in the manifest itself.
        captions: Its captions, normalised; missing ones are already gone.
        split: The split's name, if the row says one.
        where: "captions.csv:7".
        errors: What was wrong in the row: (cause, what).
        key: Where the bytes lie (Parquet), else None.
    """

    image: str | None
    captions: tuple[Caption, ...]
    split: str | None
    where: str
    errors: tuple[tuple[str, str], ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    key: Any = None


def bad_row(where: str, cause: str, what: str) -> ManifestRow:
    """A row of which nothing can be used, and why."""
    return ManifestRow(None, (), None, where, ((cause, what),))


class Columns(NamedTuple):
    """Which columns of a manifest hold what: a caption column comes with the language that its name says.

    `image` is "" in a table of texts alone.
    """

    image: str
    captions: tuple[tuple[str, str | None], ...]
    language: str | None = None
    split: str | None = None
    question: str | None = None
    folder: str | None = None

    def __str__(self) -> str:
        said = [f"image={self.image}"] * bool(self.image) + ["caption=" + "+".join(name for name, _ in self.captions)]
        said += [f"folder={self.folder}"] * bool(self.folder)
        said += [f"question={self.question}"] * bool(self.question)
        said += [f"language={self.language}"] * bool(self.language) + [f"split={self.split}"] * bool(self.split)
        return "columns " + " ".join(said)


def find_columns(names: Sequence[str], wanted: Wanted, where: str, some: Sequence[Mapping[str, Any]] = ()) -> Columns:
    """Decides which columns are used.

    Args:
        names: All columns of the manifest.
        wanted: Those that the user named.
        where: The manifest, for the error.
        some: Its first rows: where no name says which column has the pictures, the one whose cells all end like some.

    Raises:
        ValueError: If a named column isn't there, or none looks like a picture or a caption.
    """
    listing = ", ".join(filter(None, names)) or "none"
    for name in (wanted.image, *(wanted.captions or ()), wanted.language, wanted.split):
        if name is not None and name not in names:
            raise ValueError(f"{where} has no column {name!r}; its columns are: {listing}")
    by_key = {_key(name): name for name in reversed(names)}

    def first(aliases: Sequence[str]) -> str | None:
        return next((by_key[alias] for alias in aliases if alias in by_key), None)

    question = first(QUESTION) if wanted.images else None
    image = wanted.image or next(iter(image_columns(names)), None)
    if image is None and wanted.images and some:
        ending = [name for name in names if all(looks_like_image(str(row.get(name))) for row in some)]
        image = ending[0] if len(ending) == 1 else None
    image = image or (first(IDS) if wanted.images else None)
    if wanted.captions:
        captions = tuple((name, _language_of(name)) for name in wanted.captions)
    else:
        plain = (first(ANSWER) if question else None) or first(CAPTION)
        more = [name for name in names if _stem(name) in CAPTION and _stem(name) != _key(name)]
        captions = tuple((name, _language_of(name)) for name in ([plain] if plain else []) + more)
        for asked, answered in TURNS if not captions and wanted.images else ():
            if not captions and asked in by_key and answered in by_key:
                question, captions = by_key[asked], ((by_key[answered], None),)
        if not captions:  # columns called just "en" and "ko", or "한국어"
            captions = tuple((name, code) for name in names if (code := _code(_key(name))))
    image = image or ("" if not wanted.images else None)
    missing = [kind for kind, found in (("image", image), ("caption", captions)) if found in (None, ())]
    if missing:
        raise ValueError(
            f"{where}: no column looks like the {' or the '.join(missing)}; its columns are: {listing}. "
            f"Name it: {' '.join(f'--{kind}-column ...' for kind in missing)} (in a recipe data.read."
            f"{', data.read.'.join(f'{kind}_column' for kind in missing)})"
            if wanted.images
            else f"{where}: no column looks like the text; its columns are: {listing}. "
            "Name it: --data.read.text_column ..."
        )
    assert image is not None
    language, split = wanted.language or first(LANGUAGE), wanted.split or first(SPLIT)
    return Columns(image, captions, language, split, question, first(FOLDER) if wanted.image is None else None)


def image_columns(names: Sequence[str]) -> list[str]:
    """The columns whose names say that they hold pictures, the plainest name first."""
    by_key = {_key(name): name for name in reversed(names)}
    return [by_key[alias] for alias in IMAGE if alias in by_key]


def _key(name: str) -> str:
    return re.sub(r"[\s()\[\]:./-]+", "_", name.strip().casefold()).strip("_")


def _language_of(column: str) -> str | None:
    """The language that a column's name says: ko for "caption_ko", "text_korean", "ko_caption", "한국어_설명"."""
    before, _, ending = _key(column).rpartition("_")
    front, _, rest = _key(column).partition("_")
    said = _code(ending) if before or ending in LANGUAGES else None
    return said or (_code(front) if _without_number(rest) in CAPTION else None)


def _code(word: str) -> str | None:
    return LANGUAGES.get(word) or (word if word in CODES else None)


def _stem(column: str) -> str:
    """Returns the column that this is a variant of: "caption" for "caption_ko", "ko_caption" and "caption_2"."""
    key = _key(column)
    if _language_of(column) is None:
        return _without_number(key)
    return rest if (rest := _without_number(key.partition("_")[2])) in CAPTION else key.rpartition("_")[0]


def _without_number(key: str) -> str:
    """A column's name without a number behind it: "caption" of "caption_2"."""
    return re.sub(r"_?\d+$", "", key)


def looks_like_image(cell: str) -> bool:
    """Whether a cell ends like the name of a picture."""
    return cell.strip().lower().endswith(IMAGES)


def make_row(
    record: Mapping[str, Any], columns: Columns, where: str, notes: tuple[tuple[str, str], ...] = ()
) -> ManifestRow:
    """A row of any table-like manifest, its cells checked and its captions normalised."""
    errors: list[tuple[str, str]] = []
    image = record.get(columns.image)
    if isinstance(image, int) and not isinstance(image, bool) and _key(columns.image) in IDS:
        image = str(image)
    elif isinstance(image, list):
        if len(image) > 1:
            errors.append(("several pictures", f"{len(image)} in {columns.image}"))
        image = image[0] if len(image) == 1 else None
    if not columns.image or errors:
        image = None
    elif not isinstance(image, str) or is_missing(image.strip()):
        errors.append(("no picture named", "" if image is None else repr(image)[:60]))
        image = None
    folder = record.get(columns.folder) if columns.folder and image else None
    if image and isinstance(folder, str) and not is_missing(folder.strip()) and not re.search(r"[/\\]", image):
        image = f"{folder.strip()}/{image}"
    language = None
    try:
        language = language_code(str(record.get(columns.language) or "")) if columns.language else None
    except ValueError as error:
        errors.append(("not a language", str(error)))
    captions: list[Caption] = []
    found = [*notes]
    for name, said in columns.captions:
        value = record.get(name)
        # one of several caption columns may stay empty, an only one may not
        empty = value is None or value != value or (isinstance(value, str) and is_missing(normalize_text(value)))
        if len(columns.captions) == 1 or not empty:
            captions += read_captions(value, said or language, image or name, errors, found)
    if not captions and not errors:
        errors.append(("empty caption", image or ""))
    asked = record.get(columns.question) if columns.question else None
    if isinstance(asked, tuple):  # the turns of a conversation
        captions = [caption._replace(question=Conversation([*map(normalize_text, asked)])) for caption in captions]
    elif isinstance(asked, str) and not is_missing(asked := normalize_text(asked)):
        captions = [caption._replace(question=asked) for caption in captions]
    split = record.get(columns.split) if columns.split else None
    return ManifestRow(image, tuple(captions), _split(split), where, tuple(errors), tuple(found))


def _split(value: Any) -> str | None:
    word = normalize_text(value).casefold() if isinstance(value, str) else ""
    return None if is_missing(word) else split_word(word) or word


def sniff(header: str) -> str:
    """The delimiter of a table: the one of tab, comma, semicolon and bar that cuts its header into most columns."""
    return max("\t,;|", key=lambda mark: (len(split_cells(header, mark) or ()), mark == "\t"))


def read_table(data: bytes, name: str, wanted: Wanted) -> tuple[Columns, Iterator[ManifestRow]]:
    """Reads CSV, TSV and the like, with or without a header.

    Line by line, so that a bad byte or a stray quote costs no other line. A quoted field may span lines, unless
    the lines inside it are rows of their own: then the quote is taken for a letter, and noted.

    Args:
        data: The file.
        name: Its name, for file:line.
        wanted: The columns that the user named.

    Returns:
        The columns, and the rows, read as they are asked for.
    """
    text = list(lines(data))
    while text and text[0].text is not None and (not text[0].text.strip() or _SEP.fullmatch(text[0].text)):
        text.pop(0)
    if not text or text[0].text is None:
        raise ValueError(f"{name}:1 is not UTF-8: {text[0].hint}" if text else f"{name} is empty")
    header, mark, columns, start = _header(text, name, wanted)
    return columns, _rows(text, start, name, mark, header, columns)


def _header(text: list[Line], name: str, wanted: Wanted) -> tuple[list[str], str, Columns, int]:
    """The names of a table's columns, what divides them, what they hold, and the first line behind; titles may stand
    above.

    Raises:
        ValueError: If no line at the top names columns of pictures and captions, nor are there two without names.
    """
    fault: ValueError | None = None
    for at in range(min(TITLES, len(text))):
        if not (line := text[at].text or "").strip():
            continue
        mark = sniff(line)
        header = [cell.strip() for cell in split_cells(line, mark) or line.split(mark)]
        start = at + 1
        if at == 0 and (len(header) == 2 or wanted.image is None) and any(looks_like_image(cell) for cell in header):
            if len(header) != 2:
                raise ValueError(
                    f"{name} has no header line and {counted(len(header), 'column')}; write one, such as "
                    f"image{mark}caption"
                )
            header = ["image", "caption"] if looks_like_image(header[0]) else ["caption", "image"]
            start = 0
        first = (split_cells(line.text, mark) for line in text[start : start + _SOME] if line.text)
        some = [dict(zip(header, cells, strict=True)) for cells in first if cells and len(cells) == len(header)]
        try:
            return header, mark, find_columns(header, wanted, name, some), start
        except ValueError as error:
            fault = fault or error
    assert fault is not None
    raise fault


def _rows(
    text: list[Line], start: int, name: str, mark: str, header: list[str], columns: Columns
) -> Iterator[ManifestRow]:
    at, width = start, len(header)
    for line in text[: max(0, start - 1)]:
        if line.text and line.text.strip(f'{mark} "'):
            note = ("lines above the header, left out", line.text)
            yield ManifestRow(None, (), None, f"{name}:{line.number}", notes=(note,))
    image = header.index(columns.image) if columns.image else None
    last = columns.captions[-1][0] == header[-1]

    def is_row(line: Any) -> bool:
        cells = line.text.split(mark) if line.text is not None else []
        return image is not None and len(cells) >= width and looks_like_image(cells[image])

    while at < len(text):
        line, notes = text[at], ()
        where = f"{name}:{line.number}"
        at += 1
        if line.text is None:
            yield bad_row(where, "not UTF-8", line.hint)
            continue
        if not line.text.strip(f'{mark} "'):  # spreadsheets write rows that nobody has filled in
            continue
        whole, more = line.text, at
        cells = split_cells(whole, mark)
        while cells is None and more < len(text) and more - at < _JOINED:
            if text[more].text is None or is_row(text[more]):
                break
            whole += "\n" + (text[more].text or "")
            more += 1
            cells = split_cells(whole, mark)
        if cells is None:
            cells = line.text.split(mark)
            notes = (("stray quote, kept as text", line.text[:80]),)
        else:
            at = more
        if len(cells) > width and last:  # an unquoted caption with commas, at the end of its row
            cells = [*cells[: width - 1], mark.join(cells[width - 1 :])]
        if len(cells) != width:
            what = f"{len(cells)} cells where the header has {width}: {line.text[:80]}"
            yield bad_row(where, "wrong number of cells", what)
            continue
        record = {key: cell.strip() for key, cell in zip(header, cells, strict=True)}
        yield make_row(record, columns, where, notes)


def split_cells(line: str, mark: str) -> list[str] | None:
    """The cells of a line; None while a quote is open or closed in the middle of a cell."""
    if '"' not in line:
        return line.split(mark)
    try:
        rows = list(csv.reader([line.rstrip(" ")], delimiter=mark, strict=True, skipinitialspace=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None
