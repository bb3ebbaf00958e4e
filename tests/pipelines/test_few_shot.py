"""Few-shot prompts: their form, the choice of examples, captions after them, the command line, and what is refused."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmtransformer import (
    FewShotPromptBuilder,
    Flamingo,
    GatedBlockConfig,
    ImageCaptioner,
    ImageTransform,
    TextDecoder,
    Tokenizer,
    VisionEncoderDecoder,
    ViT,
)
from mmtransformer.batch import CaptionBatch
from mmtransformer.data.documents.document_dataset import lay_out
from mmtransformer.data.documents.documents import Document
from mmtransformer.data.documents.packing import DocumentRows
from mmtransformer.data.loading.source import Caption
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.generation.captions import with_prompts, write_captions
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.generation.loop import generate
from mmtransformer.serialization.printable import program
from support.cli import mmt

TRANSFORM = ImageTransform(16)
COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (255, 255, 255), "black": (0, 0, 0)}


class Examples:
    """Plain colours; the k-th of a colour is a little darker. Captions in English, and in Korean but for the last."""

    def __init__(self, per_colour: int = 3):
        self.all = [(name, k) for k in range(per_colour) for name in COLOURS]

    def __len__(self) -> int:
        return len(self.all)

    def name(self, i: int) -> str:
        return "{}{}".format(*self.all[i])

    def image(self, i: int) -> Image.Image:
        name, k = self.all[i]
        return Image.new("RGB", (9, 9), tuple(max(0, value - 9 * k) for value in COLOURS[name]))

    def captions(self, i: int) -> list[Caption]:
        name, k = self.all[i]
        said = [Caption(f"a {name} picture number {k}", "en"), Caption(f"it is {name}", "en")]
        return said + ([Caption(f"{name} 그림", "ko")] if i + 1 < len(self.all) else [])


@functools.cache
def tokenizer() -> Tokenizer:
    examples = Examples()
    texts = [caption.text for i in range(len(examples)) for caption in examples.captions(i)]
    return Tokenizer.train(texts, 310, ("en", "ko"))


def captioner(visible_images: str = "last", max_len: int = 256, seed: int = 0) -> Flamingo:
    torch.manual_seed(seed)
    vision = ViT(16, 8, 12, 1, 2, class_token=False, pool="mean")
    decoder = TextDecoder(310, 20, 2, 2, max_len=max_len)
    model = Flamingo(vision, decoder, gated=GatedBlockConfig(2, 5), visible_images=visible_images).eval()  # type: ignore[arg-type]
    for block in model.gated_blocks:  # open gates: else no picture matters
        block.attn_gate.data.fill_(2.0)  # type: ignore[union-attr]
        block.mlp_gate.data.fill_(2.0)  # type: ignore[union-attr]
    return model


def shots(model: Flamingo | None = None, examples: Examples | None = None, **options: object) -> FewShotPromptBuilder:
    return FewShotPromptBuilder(examples or Examples(), model or captioner(), tokenizer(), TRANSFORM, **options)  # type: ignore[arg-type]


def queries(*colours: str, names: bool = False) -> CaptionBatch:
    pixels = torch.stack([TRANSFORM(Image.new("RGB", (9, 9), COLOURS[name])) for name in colours])[:, None]
    none = torch.zeros(len(colours), 0, dtype=torch.long)
    return CaptionBatch(none, none.bool(), none.bool(), pixels, names=tuple(f"{c}0" for c in colours) if names else ())


def examples_in(row: torch.Tensor) -> list[str]:
    """The captions of a prompt, between its marks."""
    tok = tokenizer()
    ids = [i for i in row.tolist() if i != tok.pad_id]
    assert ids[-1] == tok.image_token_id
    chunks: list[list[int]] = []
    for i in ids[:-1]:
        if i == tok.image_token_id:
            chunks.append([])
        elif chunks:
            chunks[-1].append(i)
    assert all(chunk[-1] == tok.eos_id for chunk in chunks)
    return [tok.decode(chunk) for chunk in chunks]


# -------------------------------------------------------------------------------------------------------- the form


def test_examples_are_seen_without_dropout_by_a_model_in_training() -> None:
    model = captioner()
    model.vision.blocks[0].branch1.append(torch.nn.Dropout(0.5))  # type: ignore[operator, union-attr]
    want = shots(model, num_shots=2, choose="nearest")(queries("red"), ["en"]).visual_tokens
    model.vision.train()
    found = shots(model, num_shots=2, choose="nearest")(queries("red"), ["en"]).visual_tokens
    assert torch.equal(found, want)  # type: ignore[arg-type]
    assert model.vision.blocks[0].training


@pytest.mark.parametrize("choose", ["random", "nearest"])
def test_a_prompt_has_the_form_of_a_document(choose: str) -> None:
    batch = shots(num_shots=3, choose=choose)(queries("red", "blue"), ["ko", "en"])
    tok = tokenizer()
    assert batch.visual_tokens is not None
    assert batch.visual_tokens.shape == (2, 4, 4, 12)
    assert batch.pixels is None
    assert batch.tokens.shape[0] == 4
    for row, language in enumerate(["ko", "en", "ko", "en"]):
        said = examples_in(batch.tokens[row])
        assert len(said) == 3
        assert all(("그림" in text) == (language == "ko") for text in said)
        # the same ids, and the same view of pictures, as a document of these pictures and texts
        document = Document(("", *said, "x"), language)
        (piece,) = DocumentRows(OneDocument(document), tok, row_len=256).row(0)
        whole = lay_out([piece], batch.tokens.new_tensor(tok.image_token_id).item())  # type: ignore[arg-type]
        q = int(batch.attention_mask[row].sum())
        assert batch.tokens[row, -q:].tolist() == whole.tokens[:q].tolist()
        assert batch.image_index is not None
        assert batch.image_index[row, -q:].tolist() == whole.image_index[:q].tolist()
        assert not batch.image_index[row, :-q].any()
        assert not batch.attention_mask[row, :-q].any()
        assert batch.attention_mask[row, -q:].all()


class OneDocument:
    def __init__(self, document: Document):
        self.text = document

    def __len__(self) -> int:
        return 1

    def document(self, i: int) -> Document:
        return self.text


def test_the_images_are_those_of_the_captions_and_the_last_is_the_query() -> None:
    model, examples = captioner(), Examples()
    batch = shots(model, num_shots=4, seed=5)(queries("white", "red"), ["en"])
    assert batch.visual_tokens is not None
    for row in range(2):
        for k, text in enumerate(examples_in(batch.tokens[row])):
            found = [
                i
                for i in range(len(examples))
                if text in [c.text for c in examples.captions(i)]
                and torch.allclose(
                    model.forward_features(TRANSFORM(examples.image(i))[None, None])[0, 0], batch.visual_tokens[row, k]
                )
            ]
            assert len(found) == 1
        query = model.forward_features(queries("white", "red").visual)[row, 0]
        torch.testing.assert_close(batch.visual_tokens[row, -1], query)


def test_no_shots_mark_the_image_alone() -> None:
    batch = shots(num_shots=0)(queries("red"), ["en", "ko"])
    plain = with_prompts(queries("red"), tokenizer(), ["en", "ko"], mark=True)
    assert batch.tokens.tolist() == plain.tokens.tolist()
    assert plain.image_index is not None
    assert batch.image_index is not None
    assert batch.image_index.tolist() == plain.image_index.tolist() == [[0, 0, 1]] * 2
    assert with_prompts(queries("red"), tokenizer(), ["en"]).image_index is None


# ------------------------------------------------------------------------------------------------------ the choice


def test_the_nearest_examples_are_alike_and_the_most_alike_is_last() -> None:
    for colour in COLOURS:
        (row,) = shots(num_shots=3, choose="nearest")(queries(colour), ["en"]).tokens
        assert all(colour in text.split() for text in examples_in(row))
    (row,) = shots(num_shots=15, choose="nearest")(queries("green"), ["en"]).tokens
    assert ["green" in text.split() for text in examples_in(row)] == [False] * 12 + [True] * 3
    model, examples = captioner(), Examples()
    near = FewShotPromptBuilder(examples, model, tokenizer(), TRANSFORM, num_shots=15, choose="nearest")

    def feature(image: Image.Image) -> torch.Tensor:  # by definition
        return model.forward_features(TRANSFORM(image)[None, None])[0, 0].mean(0)

    features = torch.stack([feature(examples.image(i)) for i in range(15)])
    query = feature(Image.new("RGB", (9, 9), COLOURS["blue"])) - features.mean(0)
    likeness = torch.cosine_similarity(features - features.mean(0), query[None], dim=1)
    (row,) = near(queries("blue"), ["en"]).tokens
    texts = [[c.text for c in examples.captions(i)] for i in range(15)]
    alike = [[likeness[i].item() for i in range(15) if text in texts[i]] for text in examples_in(row)]
    for place, expected in enumerate(likeness.sort().values.tolist()):  # Which of two comes first may hang on rounding.
        assert min(abs(one - expected) for one in alike[place]) < 1e-5


def test_the_choice_depends_on_image_and_seed_and_not_on_the_batch() -> None:
    one, other = shots(num_shots=4), shots(num_shots=4, seed=1)
    together = [examples_in(row) for row in one(queries("red", "blue", "green"), ["en"]).tokens]
    alone = [examples_in(one(queries(name), ["en"]).tokens[0]) for name in ("red", "blue", "green")]
    assert together == alone
    assert len({tuple(said) for said in together}) == 3
    assert [examples_in(row) for row in other(queries("red", "blue", "green"), ["en"]).tokens] != together


@pytest.mark.parametrize("choose", ["random", "nearest"])
def test_a_image_is_no_example_of_itself(choose: str) -> None:
    few = shots(examples=Examples(1), num_shots=4, choose=choose)
    for colour in COLOURS:
        said = examples_in(few(queries(colour, names=True), ["en"]).tokens[0])
        assert not any(colour in text.split() for text in said)
    (row,) = shots(num_shots=3, choose="nearest")(queries("red"), ["en"]).tokens
    assert all("red" in text.split() for text in examples_in(row)), "without a name nothing is left out"


def test_examples_without_the_language_are_passed_over() -> None:
    few = shots(examples=Examples(1), num_shots=4)
    assert len(examples_in(few(queries("red"), ["ko"]).tokens[0])) == 4
    with pytest.raises(ValueError, match=r"4 examples were asked for, but only 3 of 5 can .*in ko.* --language"):
        few(queries("red", names=True), ["ko"])


# ------------------------------------------------------------------------------------------------------- captioning


@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(0, 4),
    visible_images=st.sampled_from(["last", "all_previous"]),
    colours=st.lists(st.sampled_from(sorted(COLOURS)), min_size=2, max_size=3),
    beams=st.integers(1, 2),
)
def test_captions_of_a_batch_equal_one_by_one(count: int, visible_images: str, colours: list[str], beams: int) -> None:
    model = captioner(visible_images)
    few = shots(model, num_shots=count)
    options = {"generation": GenerationConfig(num_beams=beams, max_new_tokens=7), "prompt_builder": few}
    together = write_captions(model, tokenizer(), queries(*colours), ["en", "ko"], **options)  # type: ignore[arg-type]
    for row, colour in zip(together, colours, strict=True):
        (alone,) = write_captions(model, tokenizer(), queries(colour), ["en", "ko"], **options)  # type: ignore[arg-type]
        for (a,), (b,) in zip(row, alone, strict=True):
            assert a.tokens == b.tokens
            assert a.log_prob == pytest.approx(b.log_prob, abs=1e-4)


@torch.no_grad()
def test_generation_after_examples_is_the_full_forward() -> None:
    model = captioner("all_previous")
    batch = shots(model, num_shots=2)(queries("red", "black"), ["en"])
    for row, (said,) in enumerate(generate(model, batch, eos_id=tokenizer().eos_id, max_new_tokens=5)):
        q = int(batch.attention_mask[row].sum())
        tokens = torch.cat([batch.tokens[row, -q:], torch.tensor(said.tokens)])[None]
        assert batch.image_index is not None
        assert batch.visual_tokens is not None
        image_index = torch.cat([batch.image_index[row, -q:], torch.full((len(said.tokens),), 3)])[None]
        whole = CaptionBatch(
            tokens, torch.ones_like(tokens).bool(), torch.ones_like(tokens).bool(),
            visual_tokens=batch.visual_tokens[row : row + 1], image_index=image_index,
        )  # fmt: skip
        logits = model.logits(whole)[0, q - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, tokens[0, q:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(said.token_log_probs), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_examples_matter() -> None:
    model = captioner("all_previous")
    prompt = shots(model, num_shots=2)(queries("red"), ["en"])
    logits, _ = model.prefill(prompt)
    assert prompt.visual_tokens is not None
    for k in range(3):
        changed = prompt.visual_tokens.clone()
        changed[:, k] += torch.randn_like(changed[:, k])
        other, _ = model.prefill(dataclasses.replace(prompt, visual_tokens=changed))
        assert (logits - other).abs().max() > 1e-3, f"picture {k}"


def saved(folder: Path, model: Flamingo | VisionEncoderDecoder) -> Path:
    generation = GenerationConfig(num_beams=1, min_new_tokens=3, max_new_tokens=6)
    ImageCaptioner(model, tokenizer(), TRANSFORM, generation=generation, device="cpu").save_pretrained(folder)
    return folder


def test_the_pipeline_takes_examples_and_shows_where_it_looked(tmp_path: Path) -> None:
    model = ImageCaptioner.from_pretrained(saved(tmp_path, captioner()), device="cpu")
    few = FewShotPromptBuilder(Examples(), model.model, model.tokenizer, model.transform, num_shots=2)
    image = Image.new("RGB", (9, 9), (10, 200, 30))
    ((said,),) = model(image, prompt_builder=few, language="ko")
    ((plain,),) = model(image, language="ko")
    assert said.log_prob != plain.log_prob
    heat = model.heatmap(image, said, few)
    assert heat.shape == (len(said.words), 2, 2)
    assert model.heatmap(image, said).shape == heat.shape


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shots")
    source = Scenes(image_size=32, train_size=9).split("train")
    for i in range(9):
        source.image(i).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a red picture number {i}\n빨간 그림 {i}", "utf-8")
    saved(root / "model", captioner())
    return root


def test_mmt_caption_with_shots(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(folder / "3.png")
    words = ["caption", image, "--model", str(folder / "model"), "--device", "cpu", "--json", "--examples", str(folder)]
    for more in (["--num-shots", "2"], ["--nearest"], ["--num-shots", "0"], ["--language", "ko"]):
        code, out, err = mmt(capsys, *words, *more)
        assert code == 0, err
        assert json.loads(out)["captions"][0]["tokens"]
    said = {}
    for seed in ("1", "1", "2"):
        _, out, _ = mmt(capsys, *words, "--seed", seed)
        said.setdefault(seed, []).append(json.loads(out)["captions"][0]["log_prob"])
    assert said["1"][0] == said["1"][1] != said["2"][0]
    code, _, err = mmt(capsys, *words, "--heatmap", str(tmp_path / "h.png"))
    assert code == 0, err
    assert (tmp_path / "h.png").stat().st_size > 1000


def test_mmt_caption_refuses_with_the_numbers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, shot = str(folder / "3.png"), ["--examples", str(folder)]
    words = ["caption", image, "--model", str(folder / "model"), "--device", "cpu"]
    code, _, err = mmt(capsys, *words, "--num-shots", "2")
    assert code == 2
    assert "--examples FOLDER" in err
    code, _, err = mmt(capsys, *words, *shot, "--num-shots", "10")
    assert code == 2
    assert "num_shots (10) must be from 0 to the number of examples (9)" in err
    decoder = TextDecoder(310, 12, 1, 2, max_len=64, context_dim=12)
    other = VisionEncoderDecoder(ViT(16, 8, 12, 1, 2, class_token=False, pool="mean"), decoder)
    (tmp_path / "table.csv").write_bytes("image,caption\na.png,빨간 개\n".encode("cp949"))
    code, _, err = mmt(capsys, *words, "--examples", str(tmp_path / "table.csv"))
    way = f"repair them (`{program()} check {tmp_path}/table.csv` shows all), or make a CSV in UTF-8"
    assert (code, way in err, "in `mmt fit`: --data.read.encoding" in err) == (2, True, True), err
    words[3] = str(saved(tmp_path / "other", other))
    code, _, err = mmt(capsys, *words, "--examples", str(tmp_path / "table.csv"))  # of which data are of no use to it
    assert (code, "reads the pictures of a text as a whole" in err) == (2, True), err
    code, _, err = mmt(capsys, *words, *shot)
    assert code == 2
    assert "VisionEncoderDecoder reads the pictures of a text as a whole" in err


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_prompt_longer_than_the_model_reads() -> None:
    model = captioner(max_len=64)
    with pytest.raises(ValueError, match=r"the prompt of 12 examples is (\d+) tokens long") as error:
        shots(model, num_shots=12, choose="nearest")(queries("red"), ["en"])
    long, new, needed, most, fits = map(
        int,
        re.fullmatch(
            r".*is (\d+) tokens long and a caption like theirs takes (\d+) more: (\d+), but the model reads (\d+); "
            r"use fewer examples \((\d+) fit\)",
            str(error.value),
        ).groups(),  # type: ignore[union-attr]
    )
    assert long + new == needed > most == 64
    assert 0 < fits < 12
    batch = shots(model, num_shots=fits, choose="nearest")(queries("red"), ["en"])
    assert batch.tokens.shape[1] + new <= 64


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ValueError, match=r'Flamingo reads the pictures .*visible_images="last"'):
        shots(captioner("none"))
    with pytest.raises(ValueError, match=r"num_shots \(16\) must be from 0 to the number of examples \(15\)"):
        shots(num_shots=16)
    with pytest.raises(ValueError, match='choose must be "random" or "nearest", not "best"'):
        shots(choose="best")
    bare = Tokenizer(tokenizer().backend, languages=("en", "ko"))
    with pytest.raises(ValueError, match=rf"the tokenizer \({bare.vocab_size} tokens\) has no image token"):
        FewShotPromptBuilder(Examples(), captioner(), bare, TRANSFORM)
    with pytest.raises(ValueError, match=rf"pictures cannot be marked .* \({bare.vocab_size} tokens\)"):
        with_prompts(queries("red"), bare, ["en"], mark=True)
    two = queries("red", "blue")
    assert two.pixels is not None
    with pytest.raises(ValueError, match="examples go before one picture a sample, but these samples have 2"):
        shots()(dataclasses.replace(two, pixels=two.pixels.transpose(0, 1)), ["en"])


def test_drawn_captions_after_examples_are_those_of_one_by_one() -> None:
    """Features of a batch differ in their last bits: what is drawn must not come from them."""
    few, model = shots(num_shots=2), captioner()
    drawn = GenerationConfig(do_sample=True, max_new_tokens=7, num_return_sequences=2)
    together = write_captions(
        model, tokenizer(), queries("red", "blue", "black"), ["en", "ko"], generation=drawn, prompt_builder=few
    )
    for row, colour in zip(together, ("red", "blue", "black"), strict=True):
        (alone,) = write_captions(
            model, tokenizer(), queries(colour), ["en", "ko"], generation=drawn, prompt_builder=few
        )
        assert [[said.tokens for said in some] for some in row] == [[s.tokens for s in some] for some in alone]
