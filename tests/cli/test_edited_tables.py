"""Tables of captions that people have edited between two calls of `mmt caption --out`."""

import csv
from pathlib import Path

import pytest
from PIL import Image

from mmtransformer import ImageCaptioner, ImageTransform, TextDecoder, Tokenizer, VisionEncoderDecoder, ViT
from support.cli import mmt


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command that captions three pictures."""
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.train(["a red dog", "빨간 개"], 300, ("en", "ko"))
    decoder = TextDecoder(300, 16, 1, 2, max_len=64, context_dim=16)
    captioner = VisionEncoderDecoder(ViT(32, 8, 16, 1, 2, class_token=False, pool="mean"), decoder)
    ImageCaptioner(captioner, tokenizer, ImageTransform(32), device="cpu").save_pretrained("model")
    Path("photos").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 30), (40 * i, 0, 0)).save(f"photos/{i}.png")
    return ["caption", "photos", "--model", "model", "--out", "c.csv", "--language", "en"]


def _rows() -> list[dict[str | None, str]]:
    with Path("c.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, restval="missing"))


@pytest.mark.parametrize(
    "header",
    [
        "image,caption,검토,language,log_prob",
        "image,caption",
        "image,caption,log_prob,language",
        "image,caption,language,log_prob,note",
    ],
)
@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_columns_are_written_under_their_headers(
    header: str, more: tuple[str, ...], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmt(capsys, *words)[0] == 0
    columns = header.split(",")
    kept = {
        "image": "photos/0.png",
        "caption": "hand-made",
        "검토": "ok",
        "note": "ok",
        "language": "en",
        "log_prob": "",
    }
    end = "" if header.endswith("note") else "\n"
    text = "".join(f"{line}\n" for line in [header, ",".join(kept[column] for column in columns)])
    Path("c.csv").write_text("\ufeff" + text.removesuffix("\n") + end, "utf-8")
    assert mmt(capsys, *words, *more)[0] == 0
    found = _rows()
    assert [row["image"] for row in found] == [f"photos/{i}.png" for i in range(3)]
    if not more:
        assert found[0] == {column: kept[column] for column in columns}
    for row in found[0 if more else 1 :]:
        assert list(row) == columns
        assert (row.get("language", "en"), row.get("note", ""), row.get("검토", "")) == ("en", "", "")
        assert float(row.get("log_prob", "-1")) < 0


@pytest.mark.parametrize(("encoding", "guess"), [("cp949", "CP949, Korean Windows"), ("utf-16", "UTF-16")])
@pytest.mark.parametrize("out", ["c.csv", "c.jsonl"])
def test_another_encoding_is_named_and_no_file_is_to_be_deleted(
    encoding: str, guess: str, out: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    text = "image,caption,language,log_prob\nphotos/0.png,빨간 자동차 한 대,ko,-1.0000\n"
    Path(out).write_text(text, encoding)
    before = Path(out).read_bytes()
    code, _, err = mmt(capsys, *(out if word == "c.csv" else word for word in words))
    assert (code, err) == (
        2,
        f"mmt caption: error: {out} is there, and is not UTF-8 (it may be {guess}): save it as UTF-8 to go on with it, "
        f"or name another file\n",
    )
    assert Path(out).read_bytes() == before
