"""NGram: against Kneser-Ney written out with dictionaries, and as a probability."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest

from mmtransformer.metrics.ngram_baseline import NGram, discounts

VOCAB = 7


def corpus(count: int, seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    """Texts of 0 (bos), ids with a habit each, and 1 (eos)."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        text = [0]
        for _ in range(int(rng.integers(0, 9))):
            often = (3 * text[-1] + len(text)) % (vocab - 2) + 2
            text.append(often if rng.random() < 0.6 else int(rng.integers(2, vocab)))
        texts.append([*text, 1])
    return texts


def flat(texts: Sequence[Sequence[int]], prompt: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    loss_mask = [place >= prompt for text in texts for place in range(len(text))]
    starts = np.cumsum([0, *map(len, texts)])
    return np.array([i for text in texts for i in text]), starts, np.array(loss_mask)


class Definition:
    """Interpolated modified Kneser-Ney, n-gram by n-gram."""

    def __init__(self, texts: list[list[int]], order: int, prompt: int = 1, vocab: int = VOCAB):
        self.order, self.vocab = order, vocab
        self.counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order + 1)]
        before: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        for text in texts:
            for end in range(prompt, len(text)):
                for n in range(1, min(order, end + 1) + 1):
                    gram, start = tuple(text[end - n + 1 : end + 1]), end - n + 1
                    if n == order or start == 0:
                        self.counts[n][gram] += 1
                    else:
                        before[gram].add(text[start - 1])
        for gram, ids in before.items():
            self.counts[len(gram)][gram] += len(ids)
        self.off = [(0.0, *discounts(np.array(list(c.values())))) for c in self.counts]

    def probability(self, context: tuple[int, ...], word: int) -> float:
        n = len(context) + 1
        lower = 1 / self.vocab if n == 1 else self.probability(context[1:], word)
        following = {g: c for g, c in self.counts[n].items() if g[:-1] == context}
        if not following:
            return lower
        total = sum(following.values())
        count = following.get((*context, word), 0)
        left = sum(self.off[n][min(c, 3)] for c in following.values())
        return (count - self.off[n][min(count, 3)]) / total + left / total * lower


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("prompt", [1, 2])
def test_it_is_the_definition(order: int, prompt: int) -> None:
    train, new = corpus(150), corpus(23, seed=1)
    model = NGram(order, VOCAB).fit(*flat(train, prompt))
    found = model.log_probs(*flat(new, prompt))
    definition = Definition(train, order, prompt)
    want = [
        math.log(definition.probability(tuple(text[max(0, end - order + 1) : end]), text[end]))
        for text in new
        for end in range(prompt, len(text))
    ]
    np.testing.assert_allclose(found, want, rtol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_sum_to_one(order: int) -> None:
    model = NGram(order, VOCAB).fit(*flat(corpus(60)))
    for context in ([0], [0, 3], [0, 2, 5], [0, 6, 6, 6, 6], [0, 4, 2, 3]):
        tokens, starts, _ = flat([[*context, word] for word in range(VOCAB)])
        last = np.zeros(len(tokens), bool)
        last[starts[1:] - 1] = True
        assert np.exp(model.log_probs(tokens, starts, last)).sum() == pytest.approx(1, abs=1e-12)


def test_discounts_are_chen_and_goodmans() -> None:
    counts = np.repeat([0, 1, 2, 3, 4, 9], [50, 100, 40, 20, 12, 3])
    y = 100 / 180
    assert discounts(counts) == pytest.approx((1 - 2 * y * 0.4, 2 - 3 * y * 0.5, 3 - 4 * y * 0.6))
    assert discounts(np.array([1, 1, 2])) == (0.5, 1.0, 1.5)
    assert discounts(np.repeat([1, 2, 3, 4], [1, 1, 9, 1])) == (0.5, 1.0, 1.5)  # else below zero


def test_a_context_helps_and_a_frequent_word_after_one_only_is_no_guess_elsewhere() -> None:
    train, new = corpus(800), corpus(200, seed=1)
    loss = {n: -NGram(n, VOCAB).fit(*flat(train)).log_probs(*flat(new)).mean() for n in (1, 2, 3)}
    assert loss[3] < loss[2] - 0.05 < loss[1] - 0.1
    texts = [[0, 2, 3, 1]] * 40 + [[0, a, 4, 1] for a in (2, 4, 5, 6) for _ in range(5)]
    model = NGram(2, VOCAB).fit(*flat(texts))
    unknown = model.log_probs(*flat([[0, 1, 3], [0, 1, 4]], prompt=2))
    assert unknown[1] > unknown[0]  # 3 is more frequent, but comes after 2 only


@pytest.mark.parametrize("prompt", [0, 1])
def test_texts_do_not_run_into_each_other(prompt: int) -> None:
    model = NGram(3, VOCAB).fit(*flat(corpus(100), prompt))
    new = [text[: len(text) - 1 + prompt] for text in corpus(9, seed=2)]  # some are cut
    alone = np.concatenate([model.log_probs(*flat([text], prompt)) for text in new])
    np.testing.assert_array_equal(model.log_probs(*flat(new, prompt)), alone)


def test_one_long_text_and_short_ones() -> None:
    model = NGram(9, VOCAB).fit(*flat([[0, 1], [0, 2, 1]]))
    found = model.log_probs(*flat([[0, 1], [0, 2, 1], [0, 2, 3, 4, 5, 6, 1]]))
    assert np.isfinite(found).all()
    assert len(found) == 9


def test_errors_name_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"order \(0\)"):
        NGram(0, 5)
    with pytest.raises(ValueError, match=r"vocab_size \(0\)"):
        NGram(2, 0)
    with pytest.raises(ValueError, match="call fit"):
        NGram(2, 5).log_probs(*flat([[0, 1]]))
    with pytest.raises(ValueError, match="none of the 2 ids"):
        NGram(2, 5).fit(*flat([[0, 1]], prompt=2))
    with pytest.raises(ValueError, match=r"ids from 0 to 5 .* of 5 ids"):
        NGram(2, 5).fit(*flat([[0, 5]]))
    with pytest.raises(ValueError, match=r"ids from -1 to 1 .* of 5 ids"):
        NGram(2, 5).fit(*flat([[0, 1]])).log_probs(*flat([[-1, 1]]))
