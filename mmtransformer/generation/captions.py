"""How captions are searched for: the settings, and captions as texts, from a batch of pictures.

Letters: b pictures, r languages, n = b * r rows, gh gw rows and columns of patches.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtransformer.captioners.base import CaptionBatch, Captioner
from mmtransformer.generation.logits_processors import Generated
from mmtransformer.generation.loop import generate, stream
from mmtransformer.generation.prompts import Prompts, with_prompts
from mmtransformer.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Decoding:
    """How captions are searched for; saved with a model. Names and effects are those of `generate`.

    Args:
        num_beams: Beams; 1 = greedy, or sampling.
        max_new_tokens: Most tokens of a caption, its end included.
        min_new_tokens: No end before so many tokens.
        length_penalty: A beam's log-probability is divided by its length to this power; above 0 favours longer ones.
        length_offset: o in that length, (o + tokens) / (o + 1); 5 is Google's formula, see `generate`.
        repetition_penalty: Above 1, tokens that were used get less likely.
        no_repeat_ngram: No n-gram of this length comes twice; 0 = they may.
        do_sample: Draw tokens instead of taking the likeliest.
        temperature: Divides the scores before drawing.
        top_k: Draw from the k likeliest only.
        top_p: Draw from the fewest tokens that hold this share of probability.
        seed: Seed of the drawing.
        num_beam_groups: Groups of beams that avoid each other's words (diverse beam search).
        diversity_penalty: How much they avoid them.
        image_guidance: Above 1, what the picture makes likelier than a blank one counts for more; takes twice the work.
        must_contain: Words that a caption must contain; needs beams.
        mark_images: Let the prompt show where the picture stands, by the tokenizer's image token: for a model that
            was trained so, on interleaved documents.
    """

    num_beams: int = 3
    max_new_tokens: int = 60
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    length_offset: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    image_guidance: float = 1.0
    must_contain: tuple[str, ...] = ()
    mark_images: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "must_contain", tuple(self.must_contain))  # JSON has no tuples


@dataclass(frozen=True)
class CaptionResult:
    """One caption of a picture.

    Attributes:
        text: The caption.
        language: Its language, or None if the model knows none.
        tokens: Its ids, without prompt and end.
        log_prob: Natural log of its probability, the end included.
        token_log_probs: That of each token.
        words: Its words, each with the places in `tokens` of its pieces.
        finished: Whether the model ended it; False = cut at `max_new_tokens`.
    """

    text: str
    language: str | None
    tokens: list[int]
    log_prob: float
    token_log_probs: list[float]
    words: list[tuple[str, list[int]]]
    finished: bool


def write_captions(
    captioner: Captioner,
    tokenizer: Tokenizer,
    batch: CaptionBatch,
    languages: Sequence[str | None] = (None,),
    *,
    num_captions: int = 1,
    decoding: Decoding | None = None,
    prompts: Prompts | None = None,
) -> list[list[list[CaptionResult]]]:
    """Captions the pictures of a batch, in each language; every picture is encoded once.

    Args:
        captioner: The model.
        tokenizer: Its tokenizer.
        batch: Pictures; their texts are not looked at.
        languages: The languages; None where the tokenizer has none.
        num_captions: Captions a picture and language.
        decoding: How to search.
        prompts: Makes the prompts, with examples for instance; None makes plain ones.

    Returns:
        For each picture, for each language, its captions, best first.
    """
    d = decoding or Decoding()
    if prompts is None:
        batch = with_prompts(batch, tokenizer, languages, mark=d.mark_images)
    else:
        batch = prompts(batch, languages)
    room = captioner.max_len - batch.tokens.shape[1]
    generator = torch.Generator(batch.tokens.device).manual_seed(d.seed) if d.do_sample else None
    rows = generate(
        captioner,
        batch,
        eos_id=tokenizer.eos_id,
        max_new_tokens=min(d.max_new_tokens, room),
        min_new_tokens=d.min_new_tokens,
        num_beams=d.num_beams if d.do_sample or d.num_beams >= num_captions else num_captions,
        num_return_sequences=num_captions,
        do_sample=d.do_sample,
        temperature=d.temperature,
        top_k=d.top_k,
        top_p=d.top_p,
        repetition_penalty=d.repetition_penalty,
        no_repeat_ngram=d.no_repeat_ngram,
        length_penalty=d.length_penalty,
        length_offset=d.length_offset,
        num_beam_groups=d.num_beam_groups,
        diversity_penalty=d.diversity_penalty,
        required=[spellings(tokenizer, word) for word in d.must_contain],
        image_guidance=d.image_guidance,
        generator=generator,
    )
    results = [
        [_result(said, tokenizer, languages[i % len(languages)]) for said in row]
        for i, row in enumerate(rows)
    ]
    return [results[i : i + len(languages)] for i in range(0, len(results), len(languages))]


def stream_caption(
    captioner: Captioner,
    tokenizer: Tokenizer,
    batch: CaptionBatch,
    language: str | None = None,
    *,
    decoding: Decoding | None = None,
    prompts: Prompts | None = None,
) -> Iterator[str]:
    """Yields one picture's caption piece by piece, as it is written: greedily, or drawn.

    A character whose bytes are spread over several tokens comes whole, with the last of them.

    Args:
        captioner: The model.
        tokenizer: Its tokenizer.
        batch: One picture.
        language: The language; None where the tokenizer has none.
        decoding: How to search; its beams are left aside.
        prompts: Makes the prompt; None makes a plain one.
    """
    d = decoding or Decoding()
    if prompts is None:
        batch = with_prompts(batch, tokenizer, [language], mark=d.mark_images)
    else:
        batch = prompts(batch, [language])
    tokens = stream(
        captioner,
        batch,
        eos_id=tokenizer.eos_id,
        max_new_tokens=min(d.max_new_tokens, captioner.max_len - batch.tokens.shape[1]),
        min_new_tokens=d.min_new_tokens,
        do_sample=d.do_sample,
        temperature=d.temperature,
        top_k=d.top_k,
        top_p=d.top_p,
        repetition_penalty=d.repetition_penalty,
        no_repeat_ngram=d.no_repeat_ngram,
        image_guidance=d.image_guidance,
        generator=torch.Generator(batch.tokens.device).manual_seed(d.seed) if d.do_sample else None,
    )
    ids: list[int] = []
    shown = 0
    for (token,) in tokens:
        ids += [token] if token is not None and token < tokenizer.vocab_size else []
        text = tokenizer.decode(ids)
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)


def spellings(tokenizer: Tokenizer, word: str) -> list[list[int]]:
    """The ways to spell a word in tokens, at the beginning of a text and inside it.

    Raises:
        ValueError: If there is nothing to spell.
    """
    if not word.strip():
        raise ValueError("must_contain has an empty word")
    both = [tokenizer.encode(word.strip()), tokenizer.encode(f" {word.strip()}")]
    return both[:1] if both[0] == both[1] else both


def _result(said: Generated, tokenizer: Tokenizer, language: str | None) -> CaptionResult:
    # A model may score more ids than its tokenizer has (a small corpus gives fewer); those say nothing.
    known = [
        (t, p) for t, p in zip(said.tokens, said.token_log_probs, strict=True) if t < tokenizer.vocab_size
    ]
    tokens = [token for token, _ in known]
    return CaptionResult(
        text=tokenizer.decode(tokens),
        language=language,
        tokens=tokens,
        log_prob=said.log_prob,
        token_log_probs=[log_prob for _, log_prob in known],
        words=tokenizer.words(tokens),
        finished=said.finished,
    )


def heatmap_of(
    captioner: Captioner,
    tokenizer: Tokenizer,
    batch: CaptionBatch,
    said: CaptionResult,
    prompts: Prompts | None = None,
    *,
    mark: bool = False,
) -> Tensor:
    """Where the model looked while it wrote each word, (words gh gw), for a batch of one picture.

    The position that predicts a token is the one that looks for it; a word takes the mean of its tokens.

    Args:
        captioner: The model.
        tokenizer: Its tokenizer.
        batch: The picture.
        said: What the model said of it.
        prompts: What made the prompt it was said after, if not plain ones.
        mark: Whether the plain prompt marks the picture.
    """
    if prompts is None:
        prompt = with_prompts(batch, tokenizer, [said.language], mark=mark)
    else:
        prompt = prompts(batch, [said.language])
    tokens = torch.cat([prompt.tokens, prompt.tokens.new_tensor([said.tokens])], 1)
    attention_mask = torch.ones_like(tokens, dtype=torch.bool)
    image_index = prompt.image_index
    if image_index is not None:
        image_index = torch.cat([image_index, image_index[:, -1:].expand(-1, len(said.tokens))], 1)
    whole = dataclasses.replace(
        prompt,
        tokens=tokens,
        attention_mask=attention_mask,
        loss_mask=~attention_mask,
        image_index=image_index,
    )
    look = captioner.attention_map(whole)[0, :, -1]
    first = prompt.tokens.shape[1] - 1
    if not said.words:
        return look.new_zeros(0, *look.shape[1:]).cpu()
    return torch.stack([look[[first + p for p in places]].mean(0) for _, places in said.words]).float().cpu()
