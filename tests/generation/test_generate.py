"""generate() against transformers' generate with the same weights, against the definition of its scores, and itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtransformer import CaptionBatch, GenerationConfig, TextDecoder, VisionEncoderDecoder, ViT, generate, stream
from mmtransformer.backbones.base import PromptBatch
from mmtransformer.generation.base import GenerationResult
from mmtransformer.generation.logits_processors import BANNED, logits_processors, min_length, no_repeat_ngram, top_p
from mmtransformer.generation.sampling import checksums, noise
from mmtransformer.weights import from_transformers

EOS, VOCAB, WIDTH = 2, 53, 24


@pytest.fixture(scope="module")
def hub() -> Any:
    """A random GPT-2 with cross-attention that repeats itself less than an untrained one does."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True,
        bos_token_id=1, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.25 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def captioner(hub: Any) -> VisionEncoderDecoder:
    torch.manual_seed(8)
    return VisionEncoderDecoder(ViT((16, 24), 8, WIDTH, 1, 4), from_transformers(hub)).eval()


def prompts(rows: int = 5, length: int = 3, images: int | None = None) -> CaptionBatch:
    torch.manual_seed(9)
    tokens = torch.randint(3, VOCAB, (rows, length))
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    return CaptionBatch(tokens, attention_mask, attention_mask, visual_tokens=torch.randn(images or rows, 1, 7, WIDTH))


def theirs(hub: Any, batch: CaptionBatch, **options: Any) -> list[list[int]]:
    """What transformers generates, one list of ids for each returned text, without the prompt and from EOS on."""
    assert batch.visual_tokens is not None
    states = batch.visual_tokens[:, 0]
    out = hub.generate(
        batch.tokens,
        attention_mask=batch.attention_mask.long(),
        encoder_hidden_states=states,
        do_sample=False,
        early_stopping=False,
        **options,
    )
    rows = out[:, batch.tokens.shape[1] :].tolist()
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_new_tokens": 6},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.6},
        {"num_beams": 4, "length_penalty": 2.0, "min_new_tokens": 4},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_equals_transformers(hub: Any, captioner: VisionEncoderDecoder, options: dict[str, Any]) -> None:
    batch = prompts()
    want = theirs(hub, batch, max_new_tokens=13, **options)
    ours = generate(captioner, batch, eos_id=EOS, max_new_tokens=13, **options)
    assert [text.tokens for row in ours for text in row] == want


def scored(captioner: VisionEncoderDecoder, batch: CaptionBatch, row: int, text: GenerationResult) -> Tensor:
    """Log-probabilities of a text's tokens (and its end) by one uncached pass."""
    assert batch.visual_tokens is not None
    real = batch.tokens[row][batch.attention_mask[row]]
    ids = torch.cat((real, torch.tensor(text.tokens + [EOS] * text.finished, dtype=torch.long)))
    per_image = batch.tokens.shape[0] // batch.visual_tokens.shape[0]
    image = batch.visual_tokens[row // per_image][None]
    one = CaptionBatch(ids[None], torch.ones_like(ids[None], dtype=torch.bool), ids[None] > 0, visual_tokens=image)
    log_probs = captioner.logits(one)[0].log_softmax(-1)
    return log_probs[len(real) - 1 : -1].gather(1, ids[len(real) :, None])[:, 0]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}],
    ids=str,
)
def test_log_probabilities_are_those_of_an_uncached_pass(
    captioner: VisionEncoderDecoder, options: dict[str, Any]
) -> None:
    batch = prompts(rows=6, images=3)
    texts = generate(captioner, batch, eos_id=EOS, max_new_tokens=9, **options)
    assert len(texts) == 6
    assert all(len(row) == options.get("num_return_sequences", 1) for row in texts)
    for row, found in enumerate(texts):
        for text in found:
            want = scored(captioner, batch, row, text)
            assert text.log_prob == pytest.approx(want.sum().item(), abs=1e-4)
            assert text.token_log_probs == pytest.approx(want[: len(text.tokens)].tolist(), abs=1e-5)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_batch_equals_one_by_one_with_prompts_of_different_length(
    captioner: VisionEncoderDecoder, beams: int
) -> None:
    batch = prompts(rows=4, length=5)
    attention_mask = batch.attention_mask.clone()
    for row, padding in enumerate((0, 3, 1, 2)):
        attention_mask[row, :padding] = False
    batch = CaptionBatch(
        batch.tokens.masked_fill(~attention_mask, 0), attention_mask, attention_mask, visual_tokens=batch.visual_tokens
    )
    together = generate(captioner, batch, eos_id=EOS, max_new_tokens=9, num_beams=beams)
    assert batch.visual_tokens is not None
    for row, found in enumerate(together):
        real = batch.tokens[row][attention_mask[row]][None]
        mask = torch.ones_like(real, dtype=torch.bool)
        one = CaptionBatch(real, mask, mask, visual_tokens=batch.visual_tokens[row][None])
        alone = generate(captioner, one, eos_id=EOS, max_new_tokens=9, num_beams=beams)[0][0]
        assert alone.tokens == found[0].tokens
        assert alone.log_prob == pytest.approx(found[0].log_prob, abs=1e-5)


def test_several_prompts_share_a_image(captioner: VisionEncoderDecoder) -> None:
    shared = prompts(rows=6, images=3)
    assert shared.visual_tokens is not None
    spread = CaptionBatch(
        shared.tokens,
        shared.attention_mask,
        shared.loss_mask,
        visual_tokens=shared.visual_tokens.repeat_interleave(2, 0),
    )
    for options in ({}, {"num_beams": 3}):
        a, b = (generate(captioner, batch, eos_id=EOS, max_new_tokens=7, **options) for batch in (shared, spread))  # pyright: ignore
        assert [row[0].tokens for row in a] == [row[0].tokens for row in b]


def test_beams_are_never_worse_than_the_best_of_all_texts_when_wide_enough() -> None:
    """With as many beams as texts exist, beam search is exhaustive search."""
    torch.manual_seed(1)
    decoder = TextDecoder(5, 8, 1, 2, max_len=8, context_dim=8)
    for parameter in decoder.parameters():
        parameter.data += torch.randn_like(parameter)
    tiny = VisionEncoderDecoder(ViT(8, 8, 8, 1, 2), decoder).eval()
    start = torch.tensor([[1]])
    batch = CaptionBatch(start, start > 0, start > 0, visual_tokens=torch.randn(1, 1, 2, 8))
    others = [i for i in range(5) if i != EOS]
    texts = [[], *([a] for a in others), *([a, b] for a in others for b in others)]
    texts = [(t, True) for t in texts] + [([a, b, c], False) for a in others for b in others for c in others]
    best = max(scored(tiny, batch, 0, GenerationResult(t, 0, [], ends)).sum().item() for t, ends in texts)
    found = generate(tiny, batch, eos_id=EOS, max_new_tokens=3, num_beams=64, length_penalty=0.0)[0][0]
    assert found.log_prob == pytest.approx(best, abs=1e-5)


def test_sampling_follows_the_distribution_and_its_seed(captioner: VisionEncoderDecoder) -> None:
    batch = prompts(rows=1)
    draw = lambda seed, **options: [  # noqa: E731
        text.tokens[0] if text.tokens else EOS
        for text in generate(
            captioner, batch, eos_id=EOS, max_new_tokens=1, do_sample=True, num_return_sequences=4000, seed=seed,
            **options,
        )[0]
    ]  # fmt: skip
    logits, _ = captioner.prefill(batch, max_new_tokens=1)
    for options, temperature in (({}, 1.0), ({"temperature": 0.5}, 0.5)):
        drawn = torch.bincount(torch.tensor(draw(3, **options)), minlength=VOCAB) / 4000
        assert (drawn - (logits[0] / temperature).softmax(0)).abs().sum() < 0.2
    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    order = logits[0].argsort(descending=True).tolist()
    assert set(draw(3, top_k=3)) == set(order[:3])
    shares = logits[0].softmax(0)[order].cumsum(0)
    nucleus = order[: int((shares < 0.6).sum()) + 1]
    assert set(draw(3, top_p=0.6)) == set(nucleus)
    assert len(nucleus) > 1


def test_rules_begin_and_end_where_they_say() -> None:
    scores, ends = torch.zeros(1, 9), torch.tensor([EOS])
    ids = torch.tensor([[5, 5, 7]])
    short = no_repeat_ngram(scores.clone(), ids[:, :2], ids[:, :2] > 0, size=2, eos_ids=ends)
    assert (short == BANNED).nonzero().tolist() == [[0, 5]]  # "5 5" has come once, in a text of two tokens
    assert no_repeat_ngram(scores.clone(), ids[:, :1], ids[:, :1] > 0, size=2, eos_ids=ends).isfinite().all()
    for count, banned in ((2, True), (3, False)):
        least = min_length(scores.clone(), ids[:, :count], ids[:, :count] > 0, least=3, eos_ids=ends)
        assert (least[0, EOS] == BANNED) == banned


@pytest.mark.parametrize("p", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_nucleus_is_that_of_transformers(p: float) -> None:
    from transformers import TopPLogitsWarper

    torch.manual_seed(3)
    scores = 2 * torch.randn(7, 29)
    kept = TopPLogitsWarper(p)(torch.zeros(7, 1, dtype=torch.long), scores).isfinite()
    assert torch.equal(top_p(scores, p) > BANNED, kept)
    assert kept.any(1).all()


def processed(scores: list[float], ids: list[int], real: list[bool] | None = None, **options: Any) -> list[float]:
    """One row's scores after the processors that the options ask for."""
    found, history = torch.tensor([scores]), torch.tensor([ids])
    mask = torch.ones_like(history, dtype=torch.bool) if real is None else torch.tensor([real])
    for processor in logits_processors(GenerationConfig(**options), torch.tensor([EOS]), 0):
        found = processor(found, history, mask)
    return found[0].tolist()


def test_logits_processors_leave_padding_out() -> None:
    real = [False, False, True, True, True]
    got = processed([4.0, -4.0, 1.0, 2.0], [0, 0, 1, 3, 1], real, repetition_penalty=2.0, no_repeat_ngram_size=2)
    assert got == [4.0, -8.0, 1.0, BANNED]  # 0 only pads; 1 was said; "1 3" would come twice.
    for real, two in (([False, True, True, True], 2.0), ([True] * 4, BANNED)):  # "1 2" begins with padding, or was said
        assert processed([1.0, 4.0, 2.0, 3.0], [1, 2, 3, 1], real, no_repeat_ngram_size=2) == [1.0, 4.0, two, 3.0]


@pytest.mark.parametrize("count", [1, 2, 127, 128, 255, 256, 257, 512])
def test_it_does_not_matter_how_often_a_token_came(count: int) -> None:
    """Counts that wrap at 256 would forget what came so often."""
    assert processed([1.0, -1.0, 2.0, 0.5], [1, 0] * count, repetition_penalty=2.0) == [0.5, -2.0, 2.0, 0.5]
    assert processed([1.0, -1.0, 2.0, 0.5], [1, 0] * count, no_repeat_ngram_size=1) == [BANNED, BANNED, 2.0, 0.5]
    want = [BANNED, -1.0, 2.0, 0.5] if count > 1 else [1.0, -1.0, 2.0, 0.5]
    assert processed([1.0, -1.0, 2.0, 0.5], [1, 0] * (count - 1) + [1], no_repeat_ngram_size=2) == want


def test_a_text_that_may_go_on_with_no_token_ends() -> None:
    for least in (0, 9):
        got = processed([1.0, 2.0, 3.0, 4.0], [0, 1, 2, 3], no_repeat_ngram_size=1, min_new_tokens=least)
        assert got == [BANNED, BANNED, 0.0, BANNED]


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("forced", [False, True])
def test_every_prompt_gets_a_text_where_every_token_is_banned(beams: int, forced: bool) -> None:
    if forced and beams == 1:
        pytest.skip("forced words need beams")
    torch.manual_seed(0)
    model = TextDecoder(5, 8, 1, 2, max_len=30)
    tokens = torch.tensor([[0, 1], [3, 4]])
    words = [[[0, 0]]] if forced else []
    found = generate(
        model, PromptBatch(tokens, tokens >= 0), eos_id=EOS, max_new_tokens=20, min_new_tokens=9, num_beams=beams,
        no_repeat_ngram_size=1, force_words_ids=words,
    )  # fmt: skip
    for row, prompt in zip(found, tokens.tolist(), strict=True):
        (text,) = row
        assert text.finished
        assert set(text.tokens) <= set(range(5)) - {EOS, *prompt}
        assert len(text.tokens) == 2


def test_batches_and_settings_of_another_kind_are_refused(captioner: VisionEncoderDecoder) -> None:
    batch, anything = prompts(3), captioner
    with pytest.raises(TypeError, match=r"generate reads a batch, such as CaptionBatch.*, not a tensor"):
        generate(anything, batch.tokens, eos_id=2)  # type: ignore[arg-type]
    for call in (generate, lambda *args, **options: next(stream(*args, **options))):
        with pytest.raises(TypeError, match="config is a GenerationConfig, not a Tensor: pictures travel in the batch"):
            call(anything, batch, batch.tokens, eos_id=2)


def test_prompts_padded_on_the_right_are_refused(captioner: VisionEncoderDecoder) -> None:
    batch = prompts(3)
    batch.attention_mask = torch.tensor([[True] * 3, [True, True, False], [False, True, True]])
    with pytest.raises(ValueError, match=r"row 1 of the prompts has padding behind its tokens: .* padded on the left"):
        generate(captioner, batch, eos_id=2)
    with pytest.raises(ValueError, match="row 1 of the prompts"):
        next(stream(captioner, batch, eos_id=2))


def test_errors_name_the_numbers(captioner: VisionEncoderDecoder) -> None:
    batch = prompts()
    faults: list[tuple[dict[str, Any], str]] = [
        ({"max_new_tokens": 62}, r"prompt of 3 and max_new_tokens \(62\).*64.*at most 61"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, r"num_return_sequences \(3\).*num_beams \(2\)"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2"),
        ({"num_return_sequences": 2}, r"one text, not num_return_sequences \(2\)"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0, .*not 0"),
        ({"do_sample": True, "top_k": 0}, "top_k must be at least 1, not 0"),
        ({"do_sample": True, "top_p": 1.5}, r"\(0, 1\], not 1.5"),
    ]
    for options, message in faults:
        with pytest.raises(ValueError, match=message):
            generate(captioner, batch, eos_id=EOS, **options)
    for name, value in (("temperature", 0.5), ("top_k", 3), ("top_p", 0.5)):
        calls: list[Callable[[], Any]] = [
            lambda changes={name: value}: generate(captioner, batch, eos_id=EOS, **changes),
            lambda changes={name: value}: next(stream(captioner, batch, eos_id=EOS, **changes)),
            lambda changes={name: value}: GenerationConfig(**changes),
            lambda changes={name: value}: GenerationConfig().updated(**changes),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=f"{name} changes how tokens are drawn, and none are"):
                call()
    drawn = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, max_new_tokens=5)
    greedy = generate(captioner, batch, eos_id=EOS, max_new_tokens=5)
    assert generate(captioner, batch, drawn, eos_id=EOS, do_sample=False) == greedy
    assert drawn.updated(do_sample=False) == GenerationConfig(max_new_tokens=5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_of_several_ids_ends_a_text(
    hub: Any, captioner: VisionEncoderDecoder, options: dict[str, Any], count: int
) -> None:
    batch = prompts(rows=9)
    said = [
        token for (text,) in generate(captioner, batch, eos_id=EOS, max_new_tokens=13) for token in text.tokens[2:5]
    ]
    ends = [*said[:: len(said) // count][:count], EOS]
    assert batch.visual_tokens is not None
    want = hub.generate(
        batch.tokens, attention_mask=batch.attention_mask.long(), encoder_hidden_states=batch.visual_tokens[:, 0],
        do_sample=False, early_stopping=False, max_new_tokens=13, eos_token_id=ends, **options,
    )  # fmt: skip
    found = [text for row in generate(captioner, batch, eos_id=ends, max_new_tokens=13, **options) for text in row]
    assert not any({*ends} & {*text.tokens} for text in found)
    assert any(text.finished for text in found)
    for text, row in zip(found, want[:, 3:].tolist(), strict=True):
        assert text.tokens == row[: len(text.tokens)]
        assert text.finished == (len(text.tokens) < len(row) and row[len(text.tokens)] in ends)


def test_ends_hold_for_streams_least_lengths_and_samples(captioner: VisionEncoderDecoder) -> None:
    batch, ends = prompts(rows=9), [7, 2, 30]
    (steps, whole) = (
        list(stream(captioner, batch, eos_id=ends, max_new_tokens=13)),
        generate(captioner, batch, eos_id=ends, max_new_tokens=13),
    )
    assert [[i for i in row if i is not None] for row in zip(*steps, strict=True)] == [t.tokens for (t,) in whole]
    for options in ({}, {"num_beams": 3}, {"do_sample": True}):
        found = generate(captioner, batch, eos_id=ends, max_new_tokens=13, min_new_tokens=6, **options)  # pyright: ignore
        assert all(len(text.tokens) >= 6 and not {*ends} & {*text.tokens} for (text,) in found)


@pytest.mark.parametrize("ends", [VOCAB, -1, [2, VOCAB], []])
def test_an_end_outside_the_vocabulary_is_refused(captioner: VisionEncoderDecoder, ends: Any) -> None:
    for search in (generate, stream):
        with pytest.raises(ValueError, match=r"eos_id \[.*\] is not in the model's vocabulary, 0 to 52"):
            list(search(captioner, prompts(), eos_id=ends))


@pytest.mark.parametrize("ends", [None, "3", 1.5, True, [None], [1, True], [1.0], torch.tensor(1.5)], ids=repr)
def test_an_end_that_is_no_id_is_refused(captioner: VisionEncoderDecoder, ends: Any) -> None:
    with pytest.raises(ValueError, match=r"^eos_id must be an id or several, not "):
        generate(captioner, prompts(), eos_id=ends, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"^eos_id must be an id or several, not "):
        next(stream(captioner, prompts(), eos_id=ends, max_new_tokens=3))


@pytest.mark.parametrize("penalty", [-1.0, -6.0, -10.0])
def test_beams_that_prefer_short_texts_give_long_ones_where_they_must(penalty: float) -> None:
    torch.manual_seed(0)
    model = TextDecoder(13, 16, 2, 2, max_len=100)
    batch = PromptBatch(torch.randint(0, 13, (2, 3)), torch.ones(2, 3, dtype=torch.bool))
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 90, "min_new_tokens": 60}
    for row in generate(model, batch, eos_id=2, length_penalty=penalty, **options):
        lengths = [len(text.tokens) for text in row]
        assert len(row) == 3
        assert min(lengths) >= 60
        means = [text.log_prob * (len(text.tokens) + text.finished) ** -penalty for text in row]
        assert means == sorted(means, reverse=True)


def one_row(batch: CaptionBatch, row: int, padding: int = 0) -> CaptionBatch:
    """One row of a batch, with more padding before its prompt."""
    assert batch.visual_tokens is not None
    tokens = torch.cat((torch.full((1, padding), 5), batch.tokens[row : row + 1]), 1)
    mask = torch.arange(tokens.shape[1])[None] >= padding
    return CaptionBatch(tokens, mask, mask, visual_tokens=batch.visual_tokens[row : row + 1])


def test_samples_depend_on_the_seed_the_row_and_their_number_alone(captioner: VisionEncoderDecoder) -> None:
    batch = prompts(rows=4, length=3)

    def drawn(batch: CaptionBatch, count: int = 3, **options: Any) -> list[list[list[int]]]:
        found = generate(
            captioner, batch, eos_id=EOS, max_new_tokens=9, do_sample=True, num_return_sequences=count, **options
        )
        return [[text.tokens for text in row] for row in found]

    together = drawn(batch)
    assert len({str(text) for row in together for text in row}) == 12
    for row in range(4):
        assert drawn(one_row(batch, row)) == [together[row]]
        assert drawn(one_row(batch, row, padding=2), count=2) == [together[row][:2]]
        steps = stream(captioner, one_row(batch, row), eos_id=EOS, max_new_tokens=9, do_sample=True)
        assert [token for (token,) in steps if token is not None] == together[row][0]
    assert drawn(batch, seed=1) != together
    assert batch.visual_tokens is not None
    others = CaptionBatch(
        batch.tokens, batch.attention_mask, batch.loss_mask, visual_tokens=batch.visual_tokens.flip(0)
    )
    assert noise(GenerationConfig(), checksums(others)).tolist() != noise(GenerationConfig(), checksums(batch)).tolist()
    two = CaptionBatch(  # two prompts a picture
        batch.tokens, batch.attention_mask, batch.loss_mask, visual_tokens=batch.visual_tokens[:2]
    )
    own = CaptionBatch(
        batch.tokens, batch.attention_mask, batch.loss_mask, visual_tokens=batch.visual_tokens[[0, 0, 1, 1]]
    )
    assert checksums(two) == checksums(own)


def test_a_longer_text_begins_as_a_shorter_one(captioner: VisionEncoderDecoder) -> None:
    batch = prompts(rows=4)
    short, long = (
        generate(captioner, batch, eos_id=EOS, max_new_tokens=new, do_sample=True, seed=3) for new in (5, 12)
    )
    assert [b.tokens[:5] for (b,) in long] == [a.tokens for (a,) in short]


def test_every_module_keeps_its_own_mode(captioner: VisionEncoderDecoder) -> None:
    def modes() -> list[bool]:
        return [module.training for module in captioner.modules()]

    captioner.train()
    captioner.vision.blocks[0].eval()
    captioner.decoder.blocks[1].mlp.eval()
    before = modes()
    seen: list[bool] = []
    hook = captioner.decoder.register_forward_pre_hook(lambda *_: seen.extend(modes()))
    for options in ({}, {"num_beams": 2}, {"do_sample": True}, {"guidance_scale": 2.0}):
        generate(captioner, prompts(), eos_id=EOS, max_new_tokens=2, **options)  # pyright: ignore
        assert modes() == before
    words = stream(captioner, prompts(), eos_id=EOS, max_new_tokens=9)
    next(words)
    assert not any(modes())
    words.close()  # type: ignore[attr-defined]
    assert modes() == before
    hook.remove()
    hook = captioner.decoder.register_forward_pre_hook(raise_stop)
    with pytest.raises(RuntimeError, match="stop"):
        generate(captioner, prompts(), eos_id=EOS, max_new_tokens=2)
    hook.remove()
    assert modes() == before
    captioner.eval()
    assert not any(seen)


def raise_stop(*_: Any) -> None:
    raise RuntimeError("stop")
