"""Which of some sizes a picture fits into best (LLaVA-NeXT): where it keeps most of its pixels, and wastes least."""

from collections.abc import Iterable


def best_pinpoint(size: tuple[int, int], pinpoints: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) that leaves a picture most pixels when its shape is kept, of those the least; else the first.

    Args:
        size: (height, width) of the picture, px.
        pinpoints: the sizes to choose from.
    """

    def quality(pinpoint: tuple[int, int]) -> tuple[int, int]:
        fit = min(pinpoint[1] / size[1], pinpoint[0] / size[0])
        kept = min(int(size[1] * fit) * int(size[0] * fit), size[0] * size[1])
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=quality)
