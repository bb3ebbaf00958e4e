"""Lists without a header: names of pictures, each with its caption behind it."""

from pathlib import Path

import pytest

from mmtransformer.data.formats.lists import list_format
from mmtransformer.data.pairs import PairFiles
from support.pair_files import draw

NAMES = [f"img {i}.png" for i in range(5)]


def captions(root: Path) -> tuple[dict[str, list[str]], PairFiles]:
    source = PairFiles(root)
    splits = [source.split(name) for name in source.splits()]
    return {s.name(i): [c.text for c in s.captions(i)] for s in splits for i in range(len(s)) if s.image(i)}, source


@pytest.mark.parametrize("file", ["list.txt", "meta/train.txt", "Captions.token", "list.txt.gz"])
@pytest.mark.parametrize(
    "line",
    ["{}\t{}", "{} {}", "{}  {}", "{}#0\t{}", "{}#0 {}", "{}|{}", "{}| 0| {}", "{}\t0\t{}", "{},{}", "{}: {}",
     '{},"{}"', "./{}\t{}"],
)  # fmt: skip
def test_lists_are_found_and_read(line: str, file: str, tmp_path: Path) -> None:
    draw(tmp_path, [f"photos/{name}" for name in NAMES])
    text = "\n".join(line.format(name, f"a dog, no. {i}") for i, name in enumerate(NAMES)) + "\n\n"
    (tmp_path / file).parent.mkdir(exist_ok=True)
    if file.endswith(".gz"):
        import gzip

        (tmp_path / file).write_bytes(gzip.compress(text.encode()))
    else:
        (tmp_path / file).write_text(text, "utf-8")
    if file == "Captions.token" and "#" not in line:
        assert list_format(text.encode())
    found, source = captions(tmp_path)
    assert {Path(name).name: said for name, said in found.items()} == {
        name: [f"a dog, no. {i}"] for i, name in enumerate(NAMES)
    }
    assert Path(file).name in source.describe()
    assert not source.report.errors


def test_several_captions_and_a_line_that_is_none(tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    rows = [f"{name}\ta dog\n{name}\tan animal" for name in NAMES] * 5
    (tmp_path / "list.txt").write_text("\n".join([*rows, "no picture"]))
    found, source = captions(tmp_path)
    assert found == {name: ["a dog", "an animal"] * 5 for name in NAMES}
    assert source.report.first["not name<TAB>caption"] == ["list.txt:51: no picture"]


@pytest.mark.parametrize(
    "text",
    ["img.jpg 3\nb.jpg 4", "a.jpg\nb.jpg", "a.jpg b.jpg\nc.jpg d.jpg", "a.jpg cat\nb.jpg dog", "some words\nand more",
     "a.jpg 0.1 0.2 0.3", "", "a.jpg,1,a dog\nb.jpg,2,a cat"],
)  # fmt: skip
def test_what_is_no_list_of_captions(text: str) -> None:
    assert list_format(text.encode()) is None


def test_a_table_without_header_whose_captions_have_commas(tmp_path: Path) -> None:
    draw(tmp_path, NAMES)
    said = [f"a dog{', big' * i}" for i in range(1, 6)]
    (tmp_path / "c.csv").write_text("\n".join(f"{name},{text}" for name, text in zip(NAMES, said, strict=True)))
    assert captions(tmp_path)[0] == {name: [text] for name, text in zip(NAMES, said, strict=True)}
