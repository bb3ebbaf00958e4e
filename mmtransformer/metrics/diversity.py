"""How varied a set of captions is: a model that says one thing of every picture shows here."""

from collections import Counter
from collections.abc import Sequence

from mmtransformer.metrics.bleu import ngrams


def distinct(captions: Sequence[Sequence[str]], n: int) -> float:
    """Return the share of different n-grams among all n-grams of the captions (0 if there are none).

    Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", NAACL 2016. It
    falls with the number of captions, so compare sets of one size.
    """
    grams = [gram for words in captions for gram in ngrams(words, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated(captions: Sequence[Sequence[str]]) -> float:
    """Return the share of captions that also stand under another picture, word for word."""
    times = Counter(tuple(words) for words in captions)
    return sum(count for count in times.values() if count > 1) / len(captions) if captions else 0.0


def diversity(captions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Describe a set of captions, one a picture.

    Args:
        captions: The words of each caption.

    Returns:
        ``distinct_1`` and ``distinct_2`` (shares), ``repeated`` (share of captions that also stand under
        another picture), ``vocabulary`` (number of different words) and ``mean_length`` (words a caption).
    """
    words = [word for caption in captions for word in caption]
    return {
        "distinct_1": distinct(captions, 1),
        "distinct_2": distinct(captions, 2),
        "repeated": repeated(captions),
        "vocabulary": float(len(set(words))),
        "mean_length": len(words) / len(captions) if captions else 0.0,
    }
