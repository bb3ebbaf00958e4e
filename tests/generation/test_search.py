"""Streaming, diverse beams, required words and guidance: against their definitions, on models small enough to know."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from mmtransformer import (
    CaptionBatch,
    GenerationConfig,
    ImageCaptioner,
    ImageTransform,
    TextDecoder,
    Tokenizer,
    VisionEncoderDecoder,
    ViT,
    generate,
    stream,
)
from mmtransformer.generation import forced_words
from mmtransformer.generation.beam_search import Beams
from mmtransformer.generation.captions import with_prompts, write_captions
from mmtransformer.generation.forced_words import ForcedWords
from mmtransformer.generation.guidance import blank_images
from mmtransformer.layers.linear import Linear

EOS, VOCAB = 2, 23


def captioner(vocab: int = VOCAB, seed: int = 0) -> VisionEncoderDecoder:
    torch.manual_seed(seed)
    model = VisionEncoderDecoder(ViT(16, 8, 20, 1, 4), TextDecoder(vocab, 20, 2, 4, max_len=31, context_dim=20))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def batch(rows: int = 3, vocab: int = VOCAB) -> CaptionBatch:
    torch.manual_seed(1)
    tokens = torch.randint(3, vocab, (rows, 2))
    every = torch.ones_like(tokens, dtype=torch.bool)
    return CaptionBatch(tokens, every, every, pixels=torch.randn(rows, 1, 3, 16, 16))


def one(given: CaptionBatch, row: int) -> CaptionBatch:
    texts = {k: getattr(given, k)[row : row + 1] for k in ("tokens", "attention_mask", "loss_mask")}
    assert given.pixels is not None
    return replace(given, **texts, pixels=given.pixels[row : row + 1])


@torch.no_grad()
def next_log_probs(model: VisionEncoderDecoder, given: CaptionBatch, ids: list[int]) -> Tensor:
    """The definition: the full pass over prompt and text, of one row."""
    tokens = torch.cat((given.tokens, torch.tensor([ids], dtype=torch.long)), 1)
    every = torch.ones_like(tokens, dtype=torch.bool)
    full = replace(given, tokens=tokens, attention_mask=every, loss_mask=every)
    return model.logits(full)[0, -1].log_softmax(-1)


# ---------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize(
    "options", [{}, {"no_repeat_ngram_size": 2}, {"do_sample": True, "top_k": 7}, {"guidance_scale": 2.0}]
)
def test_a_stream_is_what_generate_gives(options: dict[str, Any]) -> None:
    model, given = captioner(), batch()
    whole = generate(model, given, eos_id=EOS, max_new_tokens=17, **options)
    steps = list(stream(model, given, eos_id=EOS, max_new_tokens=17, **options))
    columns = [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
    assert columns == [text.tokens for (text,) in whole]
    assert len({len(c) for c in columns}) > 1 or len(steps) == 17


def test_a_stream_that_is_left_early_leaves_the_model_as_it_was() -> None:
    model, given = captioner().train(), batch()
    words = stream(model, given, eos_id=EOS, max_new_tokens=5)
    next(words)
    assert not model.training
    words.close()  # type: ignore[attr-defined]
    assert model.training


# ------------------------------------------------------------------------------------------------ diverse beams


def diverse(
    model: VisionEncoderDecoder, given: CaptionBatch, groups: int, size: int, penalty: float, length: int
) -> list[tuple[float, tuple[int, ...]]]:
    """Diverse beam search of one row, spelled out with Python lists; texts of the full length or ended."""
    running = [[(0.0, ())] for _ in range(groups)]
    ended: list[list[tuple[float, tuple[int, ...]]]] = [[] for _ in range(groups)]
    for step in range(length):
        taken: dict[int, int] = {}
        for g in range(groups):
            candidates = []
            for score, ids in running[g]:
                log_probs = next_log_probs(model, given, list(ids))
                for token in range(VOCAB):
                    value = score + float(log_probs[token]) - penalty * taken.get(token, 0)
                    candidates.append((value, (*ids, token)))
            candidates.sort(key=lambda x: -x[0])
            for score, ids in candidates[:size]:
                if ids[-1] == EOS or step + 1 == length:
                    ended[g].append((score / (step + 1), ids))
            running[g] = [c for c in candidates[: 2 * size] if c[1][-1] != EOS][:size]
            for _, ids in running[g]:
                taken[ids[-1]] = taken.get(ids[-1], 0) + 1  # pyright: ignore
    best = [sorted(some, key=lambda x: -x[0])[:size] for some in ended]
    return sorted((text for some in best for text in some), key=lambda x: -x[0])


@pytest.mark.parametrize("sample", [False, True])
def test_what_is_scored_is_the_model_and_not_what_the_rules_left(sample: bool) -> None:
    model, given = captioner(), batch()
    rules = GenerationConfig(max_new_tokens=6, min_new_tokens=5, no_repeat_ngram_size=1, do_sample=sample, seed=3)
    for row, (text,) in enumerate(generate(model, given, eos_id=EOS, config=rules)):
        for k, (token, log_prob) in enumerate(zip(text.tokens, text.token_log_probs, strict=False)):
            right = next_log_probs(model, one(given, row), text.tokens[:k])
            assert log_prob == pytest.approx(float(right[token]), abs=1e-4)


@pytest.mark.parametrize(("groups", "size", "penalty"), [(3, 1, 1.3), (2, 2, 0.7)])
def test_diverse_beams_by_definition(groups: int, size: int, penalty: float) -> None:
    model, given = captioner(), batch()
    found = generate(
        model, given, eos_id=EOS, max_new_tokens=4, num_beams=groups * size, num_return_sequences=groups * size,
        num_beam_groups=groups, diversity_penalty=penalty,
    )  # fmt: skip
    for row in range(3):
        want = diverse(model, one(given, row), groups, size, penalty, 4)
        ours = [tuple(text.tokens) + (EOS,) * text.finished for text in found[row]]
        assert ours == [ids for _, ids in want]
        for text, ids in zip(found[row], ours, strict=True):
            log_probs = [float(next_log_probs(model, one(given, row), list(ids[:k]))[ids[k]]) for k in range(len(ids))]
            assert text.log_prob == pytest.approx(sum(log_probs), abs=1e-4)


@pytest.mark.parametrize(("size", "vocab"), [(1, 7), (3, 5), (5, 101), (7, 3)])
def test_a_beam_goes_on_with_the_likeliest_of_all_beams_and_tokens(size: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(size)
    for trial in range(20):
        beams = Beams(2, size, GenerationConfig(max_new_tokens=4), torch.tensor([0]))
        beams.running = torch.randn(2, size, generator=generator)
        scores = torch.randn(2, size, vocab, generator=generator) * (10 if trial % 2 else 0.1)
        total = beams.running[..., None] + scores
        total[..., 0] = float("-inf")  # What ends is not gone on with.
        total = total.flatten(1)
        beam, token = beams.advance(scores, scores, 0)
        likeliest = total.argsort(1, descending=True)[:, :size]
        assert torch.equal(beam * vocab + token, likeliest)
        assert torch.equal(beams.running, total.gather(1, likeliest))
        assert torch.equal(beams.log_probs[..., 0], scores.flatten(1).gather(1, likeliest))
        assert torch.equal(beams.ids[..., 0], token)


def test_a_row_is_done_when_even_its_best_running_text_cannot_come_in() -> None:
    """Not when the worst of the running ones cannot: the best may still put an ended text out."""
    for ended, done in (([-2.0, -2.5], False), ([-0.5, -2.5], False), ([-0.5, -1.5], False), ([-0.5, -1.0], True)):
        beams = Beams(1, 2, GenerationConfig(max_new_tokens=9, length_penalty=0.0), torch.tensor([0]))
        beams.running = torch.tensor([[-1.0, -9.0]])
        beams.ended_scores = torch.tensor([ended])
        scores = torch.full((1, 2, 7), -30.0)
        scores[..., 3] = -0.25  # so the best goes on with -1.25, the worst with -9.25
        beams.advance(scores, scores, 1)
        assert beams.running[0].tolist() == [-1.25, -9.25]
        assert beams.done.item() is done


def test_groups_begin_with_different_words() -> None:
    model, given = captioner(), batch()
    found = generate(
        model, given, eos_id=EOS, max_new_tokens=5, num_beams=4, num_return_sequences=4, num_beam_groups=4,
        diversity_penalty=100.0,
    )  # fmt: skip
    for row in found:
        for place in range(5):
            tokens = [text.tokens[place] for text in row if len(text.tokens) > place]
            assert len(set(tokens)) == len(tokens)


# ----------------------------------------------------------------------------------------------- required words


def contains(ids: list[int], spelling: list[int]) -> bool:
    return any(ids[k : k + len(spelling)] == spelling for k in range(len(ids)))


def test_required_words_come_and_the_text_is_the_best_that_has_them() -> None:
    vocab, length = 6, 4
    model, given = captioner(vocab, seed=5), batch(2, vocab)
    words = [[[5, 3]], [[4], [0, 0]]]
    found = generate(
        model, given, eos_id=EOS, max_new_tokens=length, num_beams=400, force_words_ids=words, length_penalty=0.0
    )
    for row in range(2):
        best = -1e9
        for ids in itertools.product(range(vocab), repeat=length):
            text = list(ids[: ids.index(EOS) + 1]) if EOS in ids else list(ids)
            if EOS in ids and any(ids[len(text) :]):
                continue  # counted once
            body = text[:-1] if text[-1] == EOS else text
            if all(any(contains(body, s) for s in word) for word in words):
                steps = [next_log_probs(model, one(given, row), text[:k])[text[k]] for k in range(len(text))]
                best = max(best, float(sum(steps)))
        (text,) = found[row]
        assert all(any(contains(text.tokens, s) for s in word) for word in words)
        assert text.log_prob == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("beams", [2, 5])
def test_required_words_come_with_few_beams_too(beams: int) -> None:
    model, given = captioner(), batch()
    words = [[[7, 9, 11]], [[13]], [[20, 20], [21]]]
    plain = generate(model, given, eos_id=EOS, max_new_tokens=14, num_beams=beams)
    found = generate(
        model, given, eos_id=EOS, max_new_tokens=14, num_beams=beams, num_return_sequences=beams, force_words_ids=words
    )
    assert not any(contains(row[0].tokens, [7, 9, 11]) for row in plain)
    for row in found:
        assert row
        for text in row:
            assert all(any(contains(text.tokens, s) for s in word) for word in words)
    again = [
        generate(model, one(given, k), eos_id=EOS, max_new_tokens=14, num_beams=beams, force_words_ids=words)[0][
            0
        ].tokens
        for k in range(3)
    ]
    assert again == [row[0].tokens for row in found]


@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_makes_another_word_of_a_forced_one(beams: int, seed: int) -> None:
    model, given = captioner(seed=seed), batch()
    extends = torch.arange(VOCAB) % 3 > 0
    forced = ForcedWords([[[6, 8]], [[12], [13, 3]]], extends)  # 13 extends: "13 3" counts at the beginning only
    found = generate(model, given, eos_id=EOS, max_new_tokens=12, num_beams=beams, force_words_ids=forced)
    for (text,) in found:
        ids = text.tokens
        ends = [next(k for k in range(len(ids)) if ids[k : k + 2] == [6, 8]) + 2]
        ends += [2 if ids[:2] == [13, 3] else ids.index(12) + 1]
        assert not any(extends[ids[end]] for end in ends if end < len(ids))


@pytest.mark.parametrize(
    ("piece", "goes_on"),
    [
        (b"ntains", True), (b" dog", False), (b"s", True), (b"'s", False), (b".", False), (b"", False), (b"2", True),
        ("é".encode(), True), ("é".encode()[:1], True), ("ế".encode(), True), ("별".encode(), False),
        ("이 ".encode(), False), ("犬".encode(), False), ("Жук".encode(), True), (b"\xff", False), (b"\n", False),
    ],
)  # fmt: skip
def test_what_goes_on_with_a_word(piece: bytes, goes_on: bool) -> None:
    assert forced_words._goes_on(piece) is goes_on


def hub_like() -> Tokenizer:
    """As GPT-2's: no space before a text, so a word has two spellings."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(["star", "a star", "a red star and a ring"] * 3, trainer)
    return Tokenizer(backend, bos_token="</s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "as GPT-2's"])
def test_a_forced_word_is_a_word(ours: bool) -> None:
    tokenizer = Tokenizer.train(["a red star", "a star and a red ring"] * 3, 290) if ours else hub_like()
    whole = re.compile(r"(?<![A-Za-z0-9])star(?![A-Za-z0-9])")
    config = GenerationConfig(num_beams=4, max_new_tokens=9, force_words=("star",))
    glued = 0
    for seed in range(12):
        model, given = captioner(tokenizer.vocab_size, seed=seed), batch(1)
        ((said,),) = write_captions(model, tokenizer, given, generation=config)[0]
        assert whole.search(said.text), said.text
        words = ForcedWords.of(tokenizer, ["star"], model.vocab_size).words
        start = with_prompts(given, tokenizer, [None])
        (plain,) = generate(model, start, eos_id=0, max_new_tokens=9, num_beams=4, force_words_ids=words)[0]
        glued += not whole.search(tokenizer.decode(plain.tokens))
    assert glued > 0  # or else the test would show nothing


# ----------------------------------------------------------------------------------------------------- guidance


def test_guidance_by_definition() -> None:
    model, given = captioner(), batch()
    blank = blank_images(model, given)
    assert blank.pixels is not None
    assert not blank.pixels.any()
    (text,) = generate(model, one(given, 1), eos_id=EOS, max_new_tokens=6, guidance_scale=3.0)[0]
    ids: list[int] = []
    for token, log_prob in zip(text.tokens, text.token_log_probs, strict=True):
        right, other = (next_log_probs(model, one(b, 1), ids) for b in (given, blank))
        guided = (other + 3.0 * (right - other)).log_softmax(-1)
        assert token == int(guided.argmax())
        assert log_prob == pytest.approx(float(guided[token]), abs=1e-4)
        ids.append(token)
    plain = generate(model, given, eos_id=EOS, max_new_tokens=6)
    assert generate(model, given, eos_id=EOS, max_new_tokens=6, guidance_scale=1.0) == plain
    blind = generate(model, given, eos_id=EOS, max_new_tokens=6, guidance_scale=0.0, num_beams=3)
    assert blind[0][0].tokens == generate(model, blank, eos_id=EOS, max_new_tokens=6, num_beams=3)[0][0].tokens


def test_cached_features_are_guided_by_the_features_of_a_blank_image() -> None:
    model, given = captioner(), batch()
    assert given.pixels is not None
    cached = replace(given, pixels=None, visual_tokens=model.forward_features(given.pixels))
    found = [generate(model, b, eos_id=EOS, max_new_tokens=7, guidance_scale=2.0) for b in (given, cached)]
    assert [text.tokens for (text,) in found[0]] == [text.tokens for (text,) in found[1]]
    half = captioner().bfloat16()
    kept = replace(cached, visual_tokens=cached.visual_tokens.half())  # pyright: ignore[reportOptionalMemberAccess]
    assert generate(half, kept, eos_id=EOS, max_new_tokens=7, guidance_scale=2.0)


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 5, "num_beam_groups": 2}, r"num_beams \(5\) must be a multiple of num_beam_groups \(2\)"),
        ({"num_beams": 4, "diversity_penalty": 0.5}, r"diversity_penalty \(0.5\) needs num_beam_groups above 1"),
        ({"force_words_ids": [[[4]]]}, "force_words_ids need beams in one group: num_beams is 1"),
        ({"num_beams": 2, "force_words_ids": [[[4], []]]}, "force_words_ids has a word without a token"),
        ({"num_beams": 2, "force_words_ids": [[[4] * 9, [5] * 8]]}, r"8 tokens, more than max_new_tokens \(7\)"),
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0.0, not -1.0"),
    ],
)
def test_numbers_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(captioner(), batch(), eos_id=EOS, max_new_tokens=7, **options)


def test_guidance_needs_a_image() -> None:
    model, tokens = TextDecoder(VOCAB, 20, 1, 4), torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="a TextDecoder sees no picture"):
        generate(model, CaptionBatch(tokens, tokens > 0, tokens > 0), eos_id=EOS, guidance_scale=2.0)  # pyright: ignore


# --------------------------------------------------------------------------------------------------------- pipeline


def words_and_model() -> tuple[ImageCaptioner, Any]:
    texts = ["a red star", "a blue dot and a red ring", "빨간 별 하나", "파란 점과 빨간 고리"]
    tokenizer = Tokenizer.train(texts, 290, ("en", "ko"))
    torch.manual_seed(2)
    model = VisionEncoderDecoder(
        ViT(16, 8, 20, 1, 4), TextDecoder(tokenizer.vocab_size, 20, 2, 4, max_len=40, context_dim=20)
    )
    image = Image.new("RGB", (16, 16), (200, 30, 30))
    return ImageCaptioner(model, tokenizer, ImageTransform(16), device="cpu"), image


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_a_captioner_is_made_ready_with_its_first_image() -> None:
    said = {}
    for precision in ("fp32", "bf16", "int8"):
        captioner, image = words_and_model()
        captioner.precision = precision
        head = captioner.model.get_submodule("decoder.lm_head")
        assert type(head) is Linear
        want = write_captions(captioner.model, captioner.tokenizer, captioner.batch([image]), ["ko"])
        (said[precision],) = captioner(image, language="ko")[0]
        assert captioner.inference_model().get_submodule("decoder.lm_head").weight is head.weight
        assert type(captioner.inference_model().get_submodule("decoder.lm_head")) is not torch.nn.Linear
        assert said[precision].log_prob == pytest.approx(want[0][0][0].log_prob, rel=0.02)
        assert captioner.heatmap(image, said[precision]).isfinite().all()
        guided = GenerationConfig(num_beams=1, guidance_scale=2.0)
        assert "".join(captioner.stream_text(image, generation=guided)) is not None
    assert said["fp32"].text == want[0][0][0].text
    assert said["fp32"].log_prob != said["int8"].log_prob


@pytest.mark.parametrize("language", ["en", "ko"])
def test_a_streamed_caption_is_the_greedy_one(language: str) -> None:
    captioner, image = words_and_model()
    greedy = GenerationConfig(num_beams=1, max_new_tokens=30)
    (said,) = captioner(image, language=language, generation=greedy)[0]
    parts = list(captioner.stream_text(image, language=language, generation=greedy))
    assert "".join(parts) == said.text
    assert all(parts)


@pytest.mark.parametrize(("language", "word"), [("en", "star"), ("ko", "고리")])
def test_a_caption_contains_the_words_that_it_must(language: str, word: str) -> None:
    captioner, image = words_and_model()
    plain = GenerationConfig(num_beams=3, max_new_tokens=14)
    (before,) = captioner(image, language=language, generation=plain)[0]
    (said,) = captioner(image, language=language, generation=replace(plain, force_words=(word,)))[0]
    assert word not in before.text
    assert word in said.text
    with pytest.raises(ValueError, match="has an empty word"):
        captioner(image, generation=replace(plain, force_words=(" ",)))


def test_settings_of_the_search_are_saved_with_the_model(tmp_path: Path) -> None:
    captioner, _ = words_and_model()
    captioner.generation = GenerationConfig(num_beams=4, length_penalty=0.5, force_words=("별",))
    captioner.save_pretrained(tmp_path)
    assert (tmp_path / "generation_config.json").is_file()
    assert ImageCaptioner.from_pretrained(tmp_path, device="cpu").generation == captioner.generation
