"""The randomness of the data: a hash of what is asked for, so that it can be asked for again at any time.

Nothing in the data draws from a global random generator and nothing remembers where a generator stood.
"""

import numpy as np
import torch

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
_AT_ONCE = 1 << 15


def hash64(*words: int | np.ndarray) -> np.ndarray:
    """Hash integers, or arrays of them, into uniform 64-bit words: the one source of randomness of the data.

    SplitMix64 (Steele, Lea and Flood 2014) in a sponge: one round a word. It is defined by arithmetic, so a seed gives
    the same run with any version of numpy or torch.

    Args:
        words: Integers or integer arrays that broadcast together; their order matters.

    Returns:
        An array of `uint64` of the broadcast shape.
    """
    state = np.array(0, np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            bits = np.asarray(word & _WORD if isinstance(word, int) else word).astype(np.uint64)
            z = (state ^ bits) + np.uint64(_GOLDEN)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = z ^ (z >> np.uint64(31))
    return state


def hash64_range(count: int, *words: int) -> np.ndarray:
    """`hash64(*words, i)` of all i below a count, (count): in pieces that fit the cache, 10 times as fast."""
    found = np.empty(count, np.uint64)
    for at in range(0, count, _AT_ONCE):
        found[at : at + _AT_ONCE] = hash64(*words, np.arange(at, min(at + _AT_ONCE, count)))
    return found


def generator(*words: int) -> torch.Generator:
    """Make the random generator of one sample.

    Args:
        words: What the sample is: seed, epoch, index.

    Returns:
        A CPU generator of its own; the global one is untouched.
    """
    return torch.Generator().manual_seed(int(hash64(*words)) >> 1)  # manual_seed takes 63 bits
