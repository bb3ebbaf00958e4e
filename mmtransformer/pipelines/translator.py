"""Translator: texts in, translations out, and everything that belongs to a saved model in one folder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch

from mmtransformer.backbones.seq2seq import Transformer
from mmtransformer.batch import Seq2SeqBatch
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.generation.loop import generate
from mmtransformer.layers.modes import evaluation_mode
from mmtransformer.layers.record import record_attention
from mmtransformer.layers.weight_prepacking import for_inference
from mmtransformer.pipelines.base import (
    GENERATION,
    Pipeline,
    check_vocabulary,
    fast_autocast,
    in_batches,
    pick_device,
    read_generation,
    refuse_public,
    texts_of,
    write_card,
    write_json,
)
from mmtransformer.serialization.pretrained import find_folder
from mmtransformer.text.tokenizer import Tokenizer

PAPER = GenerationConfig(num_beams=4, max_new_tokens=60, length_penalty=0.6, length_offset=5.0)
"""How the 2017 Transformer translated."""


class Translator(Pipeline[Transformer]):
    """Translates texts with a trained encoder-decoder.

    Args:
        model: The model.
        tokenizer: Its tokenizer; its languages are those that the model writes.
        generation: How translations are searched for; the paper's 4 beams unless told.
        device: Where to compute; a GPU if there is one.

    Raises:
        ValueError: If the tokenizer has more tokens than the model.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        generation: GenerationConfig = PAPER,
        device: torch.device | str | None = None,
    ) -> None:
        check_vocabulary(tokenizer, model.vocab_size)
        self.device = pick_device(device)
        self.model = model.to(self.device).eval()
        self.tokenizer, self.generation = tokenizer, generation

    @torch.inference_mode()
    def __call__(self, texts: str | Sequence[str], language: str, *, batch_size: int = 64, **changes: Any) -> list[str]:
        """Translates texts; those of similar length are read together.

        Args:
            texts: A text, or many.
            language: The language to write, such as "ko".
            batch_size: Texts at once.
            changes: Settings of the search in place of the model's own, such as `num_beams=1` (as
                `GenerationConfig.updated`).

        Returns:
            The translations, in the order of the texts.

        Raises:
            ValueError: If the model does not know the language, or a text is longer than it reads.
        """
        texts = texts_of(texts)
        prompt = self.tokenizer.prompt(language)
        sources = [self.tokenizer.encode_source(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(sources[i]))
        found = [""] * len(texts)
        generation = self.generation.updated(**changes).limited(self.model.max_len - len(prompt))
        ends, size = self.tokenizer.eos_ids, self.tokenizer.vocab_size
        for chosen in in_batches(order, batch_size):
            batch = self._batch([sources[i] for i in chosen], prompt)
            with fast_autocast(self.device):
                rows = generate(self.model, batch, generation, eos_id=ends, num_tokens=size)
            for i, (best, *_) in zip(chosen, rows, strict=True):
                found[i] = self.tokenizer.decode(best.tokens)
        return found

    def _batch(self, sources: list[list[int]], prompt: list[int]) -> Seq2SeqBatch:
        source, source_attention_mask = self.tokenizer.pad(sources)
        tokens = torch.tensor([prompt] * len(sources))
        every = torch.ones_like(tokens, dtype=torch.bool)
        return Seq2SeqBatch(source, source_attention_mask, tokens, every, ~every).to(self.device)

    @torch.no_grad()
    def attention_map(self, text: str, translation: str, language: str) -> tuple[list[str], list[str], torch.Tensor]:
        """Where the decoder looked in the text while it wrote each token of a translation.

        Args:
            text: The source.
            translation: What was written, or what might have been.
            language: Its language.

        Returns:
            The translation's pieces (q, the last is the end), the source's pieces (k, the last is the end), and the
            weights of each decoder block and head: (blocks heads q k).
        """
        prompt, said = self.tokenizer.prompt(language), self.tokenizer.encode(translation)
        source = self.tokenizer.encode_source(text)
        tokens = torch.tensor([[*prompt, *said]], device=self.device)
        with evaluation_mode(self.model), record_attention(self.model.decoder, keep="cross_attn") as record:
            self.model.decode(tokens, self.model.encode(torch.tensor([source], device=self.device)))
        weights = torch.stack([x[0, :, len(prompt) - 1 :] for x in record.values()]).float().cpu()
        pieces = self.tokenizer.pieces
        return pieces([*said, self.tokenizer.eos_id]), pieces(source), weights

    def save_pretrained(self, folder: str | Path, *, card: str = "") -> None:
        """Writes model, tokenizer, generation settings and a model card.

        Args:
            folder: Where to; made if it is not there.
            card: Text for the model card, below its heading: how it was trained, its scores.
        """
        folder, known = Path(folder), self.tokenizer.languages
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / GENERATION, dataclasses.asdict(self.generation))
        write_card(
            folder,
            self.model,
            task="translation",
            about=f"A Transformer of mmtransformer that translates texts in {self.tokenizer.vocab_size} tokens",
            usage="from mmtransformer import Translator\n\n"
            'translator = Translator.from_pretrained("FOLDER")  # this folder\n'
            f'print(translator("a text", "{known[-1] if known else "ko"}")[0])',
            languages=known,
            note=card,
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, device: torch.device | str | None = None) -> Self:
        """Loads what `save_pretrained` wrote, from a folder or from the hub; nothing is ever unpickled.

        On a CPU its linear weights are prepacked (`weight_prepacking.for_inference`).

        Raises:
            ValueError: If a part is missing or damaged, or the parts do not fit; names the file.
        """
        folder = find_folder(name_or_path, look=refuse_public)
        model = Transformer.from_pretrained(folder)
        generation = read_generation(folder / GENERATION, PAPER)
        found = cls(model, Tokenizer.from_pretrained(folder), generation=generation, device=device)
        for_inference(found.model)
        return found
