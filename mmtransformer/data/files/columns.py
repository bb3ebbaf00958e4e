"""Which columns of a table hold what, by their names and by what stands in them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mmtransformer.data.files.endings import IMAGES
from mmtransformer.data.files.read_options import ColumnNames
from mmtransformer.data.files.text import CODES, LANGUAGES, SPLITS

IMAGE = (
    "image", "filepath", "file_path", "image_path", "img_path", "imagepath", "image_file", "image_filename",
    "file_name", "filename", "image_name", "path", "img", "picture", "photo", "jpg", "png", "file", "image_url", "url",
    "이미지", "사진", "그림", "파일", "파일명", "파일이름", "파일_이름", "이미지_파일", "이미지_이름", "이미지_경로",
    "이미지파일", "이미지파일명", "이미지_파일명", "이미지경로", "이미지_url", "이미지url", "이미지주소", "대표이미지",
    "대표_이미지", "사진파일", "사진파일명", "사진_경로", "사진경로", "파일경로", "그림_파일",
    "image_file_name", "img_name", "img_file",
    "이미지명", "사진_파일", "사진_이름", "사진명", "파일_경로", "경로",
    "images", "photos", "local_path", "uri", "src", "sourcefile", "image_link", "image_src", "image_uri", "img_url",
    "img_src", "photo_url", "picture_url",
    "bild", "bilddatei", "datei", "dateiname", "foto", "fichier", "imagen", "archivo", "immagine", "imagem",
)  # fmt: skip
CAPTION = (
    "captions", "caption", "title", "text", "texts", "txt", "sentences", "sentence", "descriptions", "description",
    "comment", "alt_text", "alt", "raw", "캡션", "설명", "설명문", "사진_설명", "이미지_설명",
    "이미지설명", "사진설명", "설명글", "한줄설명", "캡션문", "문구", "상품_설명", "상품설명", "상품명",
    "문장", "텍스트", "내용", "제목",
    "beschreibung", "bildunterschrift", "titel", "légende", "descripción", "descripcion", "título",
    "didascalia", "legenda", "productdisplayname", "product_name", "product_title", "report", "phrase",
)  # fmt: skip
LIKE = ("caption", "prompt", "description")
"""Words in the names of captions where no column is called by those above: "caption_str", "photo_description"."""
_UNLIKE = re.compile(r"(^|_)(negative|num|n)_|_(ids?|no|num|number|count|index|tokens?|length|score|url|lang|type)$")
IDS = (
    "image_id", "img_id", "imageid", "image_key", "id", "key", "name", "uid", "아이디", "번호", "이름",
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
SPLIT_LIKE = (
    "set", "fold", "phase", "mode", "usage", "type", "group", "dataset", "data_split", "dataset_split", "split_name",
    "구분", "데이터구분", "데이터_구분", "데이터셋", "데이터세트", "세트", "용도",
)  # fmt: skip
"""Where none is called so: a column all of whose first cells name splits, called like this, or with several."""
_SPLIT_ALONE = ("fold", "phase")
"""Those of them that are called so for nothing else."""
TURNS = (("prefix", "suffix"), ("query", "response"), ("prompt", "response"), ("instruction", "output"))
"""What is asked and what is answered, in tables that have nothing else to say of a picture."""
FOLDER = ("folder", "folder_name", "foldername", "subfolder", "폴더", "폴더명", "폴더이름", "폴더_이름")


class Columns(NamedTuple):
    """Which columns of a manifest hold what: a caption column comes with the language that its name says.

    `image` is "" in a table of texts alone; `other_split` is a column that is called like one of splits, and is none.
    """

    image: str
    captions: tuple[tuple[str, str | None], ...]
    language: str | None = None
    split: str | None = None
    question: str | None = None
    folder: str | None = None
    other_split: str | None = None

    def __str__(self) -> str:
        said = [f"image={self.image}"] * bool(self.image) + ["caption=" + "+".join(name for name, _ in self.captions)]
        said += [f"folder={self.folder}"] * bool(self.folder)
        said += [f"question={self.question}"] * bool(self.question)
        said += [f"language={self.language}"] * bool(self.language) + [f"split={self.split}"] * bool(self.split)
        other = f" ({self.other_split} is not taken for splits, as it has other words: --split-column takes it)"
        return "columns " + " ".join(said) + other * bool(self.other_split)


def find_columns(
    names: Sequence[str], wanted: ColumnNames, where: str, some: Sequence[Mapping[str, Any]] = ()
) -> Columns:
    """Decides which columns are used.

    Args:
        names: All columns of the manifest.
        wanted: Those that the user named.
        where: The manifest, for the error.
        some: Its first rows: where no name says which column has the pictures, the one whose cells all end like some.

    Raises:
        ValueError: If a named column isn't there, or none looks like a picture or a caption.
    """
    listing = ", ".join(_cut(name) for name in names if name) or "none"
    for name in (wanted.image, *(wanted.captions or ()), wanted.language, wanted.split):
        if name is not None and name not in names:
            raise ValueError(f"{where} has no column {name!r}; its columns are: {listing}")
    by_key = {key_of(name): name for name in reversed(names)}

    def first(aliases: Sequence[str]) -> str | None:
        return next((by_key[alias] for alias in aliases if alias in by_key), None)

    question = first(QUESTION) if wanted.images else None
    if wanted.image is None and any(map(is_place, names)):
        raise ValueError(f"{where} has no line that names its columns, but {_cut(listing)}; write one: image, caption")
    image = wanted.image or next(iter(image_columns(names)), None)
    if wanted.image is None and wanted.images and some:
        image = _by_cells(names, some, image)
    image = image or (first(IDS) if wanted.images else None)
    if wanted.captions:
        captions = tuple((name, _language_of(name)) for name in wanted.captions)
    else:
        plain = (first(ANSWER) if question else None) or first(CAPTION)
        more = [name for name in names if _stem(name) in CAPTION and _stem(name) != key_of(name)]
        captions = tuple((name, _language_of(name)) for name in ([plain] if plain else []) + more)
        for asked, answered in TURNS if not captions and wanted.images else ():
            if not captions and asked in by_key and answered in by_key:
                question, captions = by_key[asked], ((by_key[answered], None),)
        if not captions:  # columns called just "en" and "ko", or "한국어"
            captions = tuple((name, code) for name in names if (code := _code(key_of(name))))
        captions = captions or _called_like(names)
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
    language, split, other = wanted.language or first(LANGUAGE), wanted.split or first(SPLIT), None
    if split is None:
        split, other = _split_like(names, some)
    folder = first(FOLDER) if wanted.image is None else None
    return Columns(image, captions, language, split, question, folder, other)


def _by_cells(names: Sequence[str], some: Sequence[Mapping[str, Any]], named: str | None) -> str | None:
    """The column whose cells are names of pictures, where none is called so, or the one that is has addresses alone."""
    cells = {name: [str(row[name]) for row in some if row.get(name) not in (None, "")] for name in names}
    if named is not None and not (cells[named] and all("://" in cell for cell in cells[named])):
        return named
    ending = [name for name in names if cells[name] and all(map(looks_like_image, cells[name]))]
    files = [name for name in ending if not any("://" in cell for cell in cells[name])]
    best = files or ([] if named else ending)
    return best[0] if len(best) == 1 else named


def may_say_splits(name: str) -> bool:
    """Whether a column is called like one of splits."""
    return (key := key_of(name)) in (*SPLIT, *SPLIT_LIKE) or "split" in key


def _split_like(names: Sequence[str], some: Sequence[Mapping[str, Any]]) -> tuple[str | None, str | None]:
    """The column that says splits, by its cells (see `SPLIT_LIKE`); where there is none, one that may be meant to."""
    other = None
    for name in names:
        found = {SPLITS.get(str(cell).strip().casefold()) for row in some if (cell := row.get(name)) not in (None, "")}
        if found and None not in found and (len(found) > 1 or may_say_splits(name)):
            return name, None
        alone = "split" in key_of(name) or key_of(name) in _SPLIT_ALONE
        if found and may_say_splits(name) and (alone or found != {None}):
            other = other or name
    return None, other


def _called_like(names: Sequence[str]) -> tuple[tuple[str, str | None], ...]:
    """The one column with a word for captions somewhere in its name; () if there are several, or none."""
    for word in LIKE:
        found = [n for n in names if word in (key := key_of(n)) and not _UNLIKE.search(key)]
        if found:
            return ((found[0], _language_of(found[0])),) if len(found) == 1 else ()
    return ()


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def image_columns(names: Sequence[str]) -> list[str]:
    """The columns whose names say that they hold pictures, the plainest name first."""
    by_key = {key_of(name): name for name in reversed(names)}
    return [by_key[alias] for alias in IMAGE if alias in by_key]


def key_of(name: str) -> str:
    """A column's name as the lists above write it: "image_url" for "Image URL"."""
    return re.sub(r"[\s()\[\]:./-]+", "_", name.strip().casefold()).strip("_")


def _language_of(column: str) -> str | None:
    """The language that a column's name says: ko for "caption_ko", "text_korean", "ko_caption", "한국어_설명"."""
    before, _, ending = key_of(column).rpartition("_")
    front, _, rest = key_of(column).partition("_")
    said = _code(ending) if before or ending in LANGUAGES else None
    return said or (_code(front) if _without_number(rest) in CAPTION else None)


def _code(word: str) -> str | None:
    return LANGUAGES.get(word) or (word if word in CODES else None)


def _stem(column: str) -> str:
    """Returns the column that this is a variant of: "caption" for "caption_ko", "ko_caption" and "caption_2"."""
    key = key_of(column)
    if _language_of(column) is None:
        return _without_number(key)
    return rest if (rest := _without_number(key.partition("_")[2])) in CAPTION else key.rpartition("_")[0]


def _without_number(key: str) -> str:
    """A column's name without a number behind it: "caption" of "caption_2"."""
    return re.sub(r"_?\d+$", "", key)


def looks_like_image(cell: str) -> bool:
    """Whether a cell ends like the name of a picture; of an address, what stands before its question mark."""
    return (cell.partition("?")[0] if "://" in cell else cell).strip().lower().endswith(IMAGES)


def is_place(cell: str) -> bool:
    """Whether a cell is the name of a picture, or an address."""
    return looks_like_image(cell) or re.match(r"\s*(https?|s3|gs|file)://", cell) is not None
