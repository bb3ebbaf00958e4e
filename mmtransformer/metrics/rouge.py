"""ROUGE-L, as the official COCO caption evaluation counts it.

Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004. The COCO version takes the best
precision and the best recall over the references, also when they come from different ones, and beta = 1.2.
"""

from collections.abc import Sequence

_BETA2 = 1.2**2


def rouge_l(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Score one caption by its longest common subsequence with the references.

    A caption without words counts as one empty word, as in the official tool, so it matches a reference
    without words.

    Args:
        candidate: The words of the caption.
        references: The words of each reference, one reference at least.

    Returns:
        The F measure, 0 to 1.
    """
    candidate = candidate or ("",)
    precision = recall = 0.0
    for reference in references:
        reference = reference or ("",)
        common = longest_common(candidate, reference)
        precision = max(precision, common / len(candidate))
        recall = max(recall, common / len(reference))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + _BETA2) * precision * recall / (recall + _BETA2 * precision)


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    One bit a word of ``a``, one integer operation a word of ``b`` (Hyyro, "Bit-parallel LCS-length
    computation revisited", 2004).
    """
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | (1 << i)
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        match = row & where.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(a) - row.bit_count()
