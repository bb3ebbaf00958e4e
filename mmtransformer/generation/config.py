"""GenerationConfig: how texts are searched for, spelled and checked here alone."""

import copy
import dataclasses
import functools
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Self

from mmtransformer.layers.config import known_fields

MOST_BEAMS = 4096  # a setting out of a file must not take all memory
NOT_HERE = ("stop_words", "bad_words", "stop_words_ids", "bad_words_ids", "stop_strings")
"""Settings of other libraries that look like `force_words` and say the opposite."""
ELSEWHERE = {
    "max_length": "max_new_tokens", "min_length": "min_new_tokens", "beams": "num_beams", "lang": "language",
    "generation_config": "generation",
} | dict.fromkeys(NOT_HERE, "")  # fmt: skip
"""What other libraries call a setting -> its name here, or in the call that it is given to."""


@functools.partial(known_fields, elsewhere=ELSEWHERE)
@dataclass(frozen=True)
class GenerationConfig:
    """How texts are searched for; names and effects are those of transformers' `generate`. Saved with a model.

    Args:
        max_new_tokens: Most new tokens of a text, its end included.
        min_new_tokens: No end before so many tokens.
        num_beams: Beams; 1 = greedy, or sampling.
        num_return_sequences: Texts a prompt: samples, or the best of the beams.
        num_beam_groups: Groups that the beams are divided into, each avoiding the words of those before it (diverse
            beam search, arXiv:1610.02424).
        diversity_penalty: How much they avoid them.
        length_penalty: A beam's log-probability is divided by its length to this power; above 0 favours longer texts.
        length_offset: o in that length, (o + tokens) / (o + 1); 5 is Google's formula (arXiv:1609.08144, equation 14),
            which "Attention Is All You Need" used with `length_penalty=0.6`.
        do_sample: Draw tokens instead of taking the likeliest.
        temperature: Divides the logits before drawing.
        top_k: Draw from the k likeliest only.
        top_p: Draw from the fewest tokens that hold this share of probability (nucleus, arXiv:1904.09751).
        seed: Seed of the drawing.
        repetition_penalty: Above 1, tokens of prompt and text get less likely (CTRL, arXiv:1909.05858).
        no_repeat_ngram_size: No n-gram of this length comes twice; 0 = they may.
        guidance_scale: Above 1, what the picture makes likelier than a blank one does counts for more
            (arXiv:2207.12598); it takes twice the work. Reported log-probabilities are then the guided ones.
        force_words: Words that a text must contain; needs beams, and a tokenizer (`generate` takes their ids).
        add_image_tokens: Let the prompt show where the picture stands, by the tokenizer's image token: for a model that
            was trained so, on interleaved documents.

    Raises:
        ValueError: for numbers that make no sense, alone or together; names the setting.
    """

    max_new_tokens: int = 40
    min_new_tokens: int = 0
    num_beams: int = 1
    num_return_sequences: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    length_offset: float = 0.0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    guidance_scale: float = 1.0
    force_words: tuple[str, ...] = ()
    add_image_tokens: bool = False
    _asked: ClassVar[frozenset[str]] = frozenset()  # settings that `limited` must not cut

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check_setting(name, value)
        object.__setattr__(self, "force_words", tuple(self.force_words))  # JSON has no tuples
        beams, groups, texts = self.num_beams, self.num_beam_groups, self.num_return_sequences
        if beams > MOST_BEAMS:
            raise ValueError(f"num_beams ({beams:,}) can be {MOST_BEAMS:,} at most")
        if beams > 1 and self.do_sample:
            raise ValueError(f"beam search (num_beams={beams}) does not draw: do_sample needs num_beams=1")
        if beams > 1 and texts > beams:
            raise ValueError(f"num_return_sequences ({texts}) cannot exceed num_beams ({beams})")
        if beams == 1 and texts > 1 and not self.do_sample:
            raise ValueError(
                f"greedy search gives one text, not num_return_sequences ({texts}): use do_sample or num_beams"
            )
        if beams % groups:
            raise ValueError(f"num_beams ({beams}) must be a multiple of num_beam_groups ({groups})")
        if self.diversity_penalty and groups == 1:
            raise ValueError(f"diversity_penalty ({self.diversity_penalty}) needs num_beam_groups above 1")
        for name, none in (("temperature", 1.0), ("top_k", None), ("top_p", None)):
            if getattr(self, name) != none and not self.do_sample:
                raise ValueError(f"{name} changes how tokens are drawn, and none are: it needs do_sample")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) cannot exceed max_new_tokens ({self.max_new_tokens})"
            )
        if self.force_words and (beams == 1 or groups > 1):
            raise ValueError(f"force_words need beams in one group: num_beams is {beams}, num_beam_groups {groups}")

    def updated(self, **changes: Any) -> Self:
        """These settings with some changed; settings of the beams that are not named follow those that are.

        There are as many beams as texts are asked for, a multiple of the groups, and at least 5 for `force_words`;
        where tokens are drawn there are none.

        Raises:
            ValueError: as the constructor.
        """
        if not changes:
            return self
        for name, value in changes.items():
            _check_setting(name, value)
        if "max_new_tokens" in changes:
            changes = {"min_new_tokens": min(self.min_new_tokens, changes["max_new_tokens"])} | changes
        if changes.get("do_sample"):
            changes = {"num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0} | changes
        elif "num_beams" not in changes and not self.do_sample:
            texts = changes.get("num_return_sequences", self.num_return_sequences)
            groups = changes.get("num_beam_groups", self.num_beam_groups)
            beams = max(self.num_beams, texts, 5 if changes.get("force_words") else 1)
            changes["num_beams"] = -(-beams // groups) * groups
        for name in ("length_penalty", "length_offset"):
            if name in changes and changes.get("num_beams", self.num_beams) == 1:
                raise ValueError(f"{name} weighs beams of different lengths, and there are none: it needs num_beams")
        return self.changed(**changes).asked(*changes, *self._asked)

    def changed(self, **changes: Any) -> Self:
        """These settings with some changed and no others, but how tokens are drawn where none are any more.

        Raises:
            ValueError: as the constructor.
        """
        if changes.get("do_sample") is False:
            changes = {"temperature": 1.0, "top_k": None, "top_p": None} | changes
        return dataclasses.replace(self, **changes)

    def asked(self, *names: str) -> Self:
        """These settings, of which a call asks for some by name: `limited` does not cut those."""
        found = copy.copy(self)
        object.__setattr__(found, "_asked", frozenset(names))
        return found

    def limited(self, most: int) -> Self:
        """These settings with no more than `most` new tokens, and one at least; `generate` refuses what was asked for.

        Raises:
            ValueError: if more tokens were asked for at least.
        """
        most = max(most, 1)
        if "min_new_tokens" in self._asked and self.min_new_tokens > most:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) does not fit: behind this prompt the model reads {most} new "
                "tokens at most"
            )
        if self.max_new_tokens <= most or "max_new_tokens" in self._asked:
            return self
        found = copy.copy(self)
        object.__setattr__(found, "min_new_tokens", min(self.min_new_tokens, most))
        object.__setattr__(found, "max_new_tokens", most)  # What was checked fits with fewer, too.
        return found

    def one_at_a_time(self) -> Self:
        """These settings for one text, written token by token: what takes several beams is left aside."""
        return self.changed(
            num_beams=1, num_return_sequences=1, num_beam_groups=1, diversity_penalty=0.0, force_words=()
        ).asked(*self._asked)

    def streamed(self, **changes: Any) -> Self:
        """These settings with some changed, for one text that is shown while it is written; their beams are left aside.

        Raises:
            ValueError: if there are words that it must contain, or the changes ask for beams or several texts.
        """
        if self.force_words or changes.get("force_words"):
            raise ValueError("force_words need beams, and a caption that is streamed has none")
        found = self.one_at_a_time().updated(**changes)
        if found.num_beams > 1 or found.num_return_sequences > 1:
            raise ValueError("a caption that is streamed is one, without beams: leave num_beams and their like out")
        return found


_INF = math.inf
_WHOLE = {
    **dict.fromkeys(("max_new_tokens", "num_beams", "num_return_sequences", "num_beam_groups", "top_k"), (1, _INF)),
    **dict.fromkeys(("min_new_tokens", "no_repeat_ngram_size", "seed"), (0, _INF)),
}
# Beyond these, scores in float32 are no numbers any more, or all alike.
_REAL = {
    "diversity_penalty": (0.0, 1e3),
    "length_penalty": (-10.0, 10.0),
    "length_offset": (0.0, 1e6),
    "temperature": (1e-6, 1e6),
    "top_p": (1e-6, 1.0),
    "repetition_penalty": (1e-3, 1e3),
    "guidance_scale": (0.0, 1e3),
}
_OPTIONAL = ("top_k", "top_p")


def _check_setting(name: str, value: Any) -> None:
    """Refuses a value of another kind than a setting's, or out of its range.

    Raises:
        ValueError: naming the setting.
    """
    if name == "force_words":
        if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
            raise ValueError(f"force_words must be a list of words, not {value!r:.80}")
        if not all(word.strip() for word in value):
            raise ValueError(f"force_words {list(value)} has an empty word")
    elif name in ("do_sample", "add_image_tokens") and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {value!r:.80}")
    if (name not in _WHOLE and name not in _REAL) or (value is None and name in _OPTIONAL):
        return
    kind, what = (Integral, "whole") if name in _WHOLE else (Real, "finite")
    least, most = _WHOLE.get(name) or _REAL[name]
    number: Any = value
    if not isinstance(value, kind) or isinstance(value, bool) or number != number or number in (_INF, -_INF):
        raise ValueError(f"{name} must be a {what} number, not {value!r:.80}")
    if name == "top_p" and not 0 < number <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {number}")
    if number <= 0 < least and name in _REAL:
        hint = "; for the likeliest token use do_sample=False" if name == "temperature" else ""
        raise ValueError(f"{name} must be above 0, not {number}{hint}")
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most}"
        raise ValueError(f"{name} must be {bound}, not {number}")
