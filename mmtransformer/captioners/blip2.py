"""Blip2: a Q-Former's queries stand in front of the text of a language model (BLIP-2, arXiv:2301.12597, section 3.3).

Letters: b samples, i pictures of a sample, p visual tokens of a picture, l queries of a picture, n rows of text
(b divides n), q text tokens, d width of a token, e width of the decoder's embeddings, m rows of queries (b, or n where
instructions make them differ), gh gw rows and columns of patches.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.backbones.base import Decoder, DecoderState
from mmtransformer.backbones.seq2seq import TransformerState
from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.base import CaptionBatch, Captioner, freeze
from mmtransformer.captioners.soft_prompt import forward_with_prefix, prefill_with_prefix, refuse_documents
from mmtransformer.captioners.soft_source import (
    SourceReader,
    forward_with_source_prefix,
    prefill_with_source_prefix,
    prompt_of,
    put_back,
)
from mmtransformer.connectors.qformer import QFormer
from mmtransformer.layers.record import record_attention


@dataclass
class InstructBatch(CaptionBatch):
    """Pictures and texts, with what the Q-Former reads of each row in its own vocabulary.

    Attributes:
        instruction: (n t) long, padded on the right; None = the row's prompt, in the decoder's vocabulary.
        instruction_attention_mask: (n t) bool, True = a real token; None = all are.
    """

    instruction: Tensor | None = None
    instruction_attention_mask: Tensor | None = None


class Blip2(Captioner):
    """A vision tower, a Q-Former and a language model: queries, projected, then prompt and caption.

    Args:
        vision: the vision tower; its `forward_features` gives the visual tokens.
        qformer: gathers them; without a text stream, or with one where `instruct` is set.
        decoder: a causal language model, ours or any of transformers', which reads queries, prompt and caption; or an
            encoder-decoder (ours, or a T5), whose encoder reads queries and prompt, its decoder a begin token and the
            caption.
        instruct: whether the prompt goes into the Q-Former too (InstructBLIP, arXiv:2305.06500, section 2.3).
        freeze_vision: whether the tower is taken out of training (its features can then be cached).
        train_norm: whether the last norm of a frozen tower learns, as in BLIP-2's own code; `encode` then gives, and a
            cache keeps, the tokens before it.
        freeze_decoder: whether the language model is taken out of training.

    Raises:
        ValueError: if the parts do not fit.
    """

    def __init__(
        self,
        vision: ViT,
        qformer: QFormer,
        decoder: Decoder | SourceReader,
        *,
        instruct: bool = False,
        freeze_vision: bool = True,
        train_norm: bool = False,
        freeze_decoder: bool = True,
    ) -> None:
        super().__init__()
        if qformer.visual_dim != vision.dim:
            raise ValueError(
                f"the Q-Former's visual_dim ({qformer.visual_dim}) must be the vision tower's dim ({vision.dim})"
            )
        if qformer.num_queries >= decoder.max_len and not isinstance(decoder, SourceReader):
            raise ValueError(
                f"the decoder's {decoder.max_len} positions leave no room for text after {qformer.num_queries} queries"
            )
        if instruct != (qformer.vocab_size is not None):
            raise ValueError(
                "instruct=True needs a Q-Former with a text stream (vocab_size)"
                if instruct
                else "without instruct nothing reads the Q-Former's text stream: give qformer.without_text()"
            )
        if train_norm and not freeze_vision:
            raise ValueError("train_norm is for a frozen tower: in one that learns, its norm learns anyway")
        self.vision, self.qformer, self.decoder, self.instruct = vision, qformer, decoder, instruct
        self.freeze_vision, self.train_norm, self.freeze_decoder = freeze_vision, train_norm, freeze_decoder
        width = decoder.dim if isinstance(decoder, SourceReader) else decoder.embedding_weights[0].shape[1]
        self.proj = nn.Linear(qformer.dim, width)
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)
        if freeze_vision:
            freeze(vision)
            vision.norm.requires_grad_(train_norm)
            if train_norm:  # Of a tower kept in bfloat16, too, it learns in the format of what else learns.
                vision.norm.to(qformer.query_tokens.dtype)
        if freeze_decoder:
            freeze(decoder)

    def train(self, mode: bool = True) -> Self:
        """As every captioner's; a frozen tower stays in evaluation mode though its last norm may learn."""
        super().train(mode)
        if self.freeze_vision:
            self.vision.eval()
        return self

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the head scores."""
        return self.decoder.vocab_size

    @property
    def max_len(self) -> int:
        """Most text tokens of a row beside one picture, prompt included; queries are not counted."""
        behind = 0 if isinstance(self.decoder, SourceReader) else self.qformer.num_queries
        return self.decoder.max_len - behind

    def encode(self, pixels: Tensor) -> Tensor:
        """The vision tower's tokens, before its last norm if that learns: (b i 3 height width) -> (b i p d)."""
        b, flat = pixels.shape[0], rearrange(pixels, "b i c h w -> (b i) c h w")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
            if self.train_norm:
                features = self.vision.forward_intermediates(flat, [-1])[0]
            else:
                features = self.vision.forward_features(flat)
        return rearrange(features, "(b i) p d -> b i p d", b=b)

    def prefix_embeds(self, batch: CaptionBatch) -> Tensor:
        """What stands in front of the text: the queries of all pictures of a sample, projected, (m (i l) e)."""
        refuse_documents(batch, "Blip2")
        visual_tokens = self.visual_tokens(batch).to(self.proj.weight.dtype)
        b, i = visual_tokens.shape[:2]
        x = rearrange(visual_tokens, "b i p d -> (b i) p d")
        x = self.vision.norm(x) if self.train_norm else x
        if not self.instruct:
            return rearrange(self.proj(self.qformer(x)), "(b i) l e -> b (i l) e", i=i)
        tokens, attention_mask = _instruction(batch)
        rows = [
            rearrange(t, "(b r) q -> b 1 r q", b=b).expand(-1, i, -1, -1) for t in (tokens, attention_mask)
        ]
        queries = self.qformer(x, *(rearrange(t, "b i r q -> (b i r) q") for t in rows))
        return rearrange(self.proj(queries), "(b i r) l e -> (b r) (i l) e", b=b, i=i)

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states of right-padded rows: (n q d)."""
        if isinstance(self.decoder, SourceReader):
            return forward_with_source_prefix(self.decoder, self.prefix_embeds(batch), batch)
        return forward_with_prefix(self.decoder, self.prefix_embeds(batch), batch)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits: (... d) -> (... vocab)."""
        return self.decoder.head(hidden)

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, DecoderState | TransformerState]:
        """Computes the queries once and reads the left-padded prompts; see `Captioner.prefill`."""
        prefix_embeds = self.prefix_embeds(batch)
        if isinstance(self.decoder, SourceReader):
            return prefill_with_source_prefix(
                self.decoder, prefix_embeds, batch, expand_size=expand_size, max_new_tokens=max_new_tokens
            )
        return prefill_with_prefix(
            self.decoder, prefix_embeds, batch, expand_size=expand_size, max_new_tokens=max_new_tokens
        )

    def decode_step(self, tokens: Tensor, state: Any) -> Tensor:
        """Adds a token to each row: (n) -> logits of the next (n vocab)."""
        return self.decoder.decode_step(tokens, state)

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """Where each text token looks in the pictures, through the queries: (n q i gh gw).

        Its attention to the queries, the mean of all heads and layers, times what each query holds of the patches
        (`QFormer.held`). The queries have looked before there is any text: they tell what is described from the rest,
        but hardly one word's object from another's.

        Raises:
            ValueError: if the decoder's attention cannot be recorded, as that of a hub model.
        """
        training, l = self.training, self.qformer.num_queries
        kind = ".cross_attn" if isinstance(self.decoder, SourceReader) else ".attn"
        self.eval()
        try:
            with (
                record_attention(self.decoder, keep=lambda name: name.endswith(kind)) as reads,
                record_attention(self.qformer) as sees,
            ):
                self.hidden_states(batch)
        finally:
            self.train(training)
        visual = batch.visual
        b, i = visual.shape[:2]
        grid = self.vision.grid if batch.pixels is None else self.vision.grid_size(*batch.pixels.shape[3:])
        to_queries = torch.stack([w.mean(1) for w in reads.values()]).mean(0)[..., : i * l]
        if isinstance(self.decoder, SourceReader):
            to_queries = put_back(to_queries, batch)
        else:
            to_queries = to_queries[:, i * l :]
        to_patches = rearrange(self.qformer.attention_map(sees), "(b i r) l p -> (b r) i l p", b=b, i=i)
        to_patches = to_patches[..., self.vision.num_prefix_tokens :]
        to_patches = to_patches.repeat_interleave(len(to_queries) // len(to_patches), 0)
        to_queries = rearrange(to_queries, "n q (i l) -> n q i l", i=i)
        weights = torch.einsum("nqil,nilp->nqip", to_queries, to_patches)
        return rearrange(weights, "n q i (gh gw) -> n q i gh gw", gh=grid[0])


def from_stage1(
    folder: str | Path,
    decoder: Decoder | SourceReader,
    *,
    vision: ViT | None = None,
    freeze_vision: bool = True,
    freeze_decoder: bool = True,
) -> Blip2:
    """Stage 2 from what stage 1 left: its vision tower and its Q-Former, whose text stream is dropped.

    Args:
        folder: the run's folder of stage 1 (`ImageText`), or the model's in it.
        decoder: the language model that is to be spoken to.
        vision: another vision tower of the same width; None = that of stage 1.
        freeze_vision: whether the tower is taken out of training (its features can then be cached).
        freeze_decoder: whether the language model is taken out of training.

    Raises:
        ValueError: if the folder has no such model, or the vision tower is of another width.
    """
    inside = Path(folder) / "model"
    stage1 = Captioner.from_pretrained(inside if inside.is_dir() else folder)
    qformer = getattr(stage1, "qformer", None)
    if not isinstance(qformer, QFormer):
        raise ValueError(
            f"{folder} holds a {type(stage1).__name__}, which has no Q-Former: give a run of stage 1"
        )
    if vision is not None and vision.dim != qformer.visual_dim:
        raise ValueError(
            f"the Q-Former of {folder} reads visual tokens {qformer.visual_dim} wide, but the vision tower given makes "
            f"them {vision.dim} wide"
        )
    model = Blip2(
        stage1.vision if vision is None else vision,
        qformer.without_text(),
        decoder,
        freeze_vision=freeze_vision,
        train_norm=freeze_vision and bool(getattr(stage1, "train_norm", False)),
        freeze_decoder=freeze_decoder,
    )
    return model.train()


def _instruction(batch: CaptionBatch) -> tuple[Tensor, Tensor]:
    """What the Q-Former reads of each row, padded on the right: (n t) ids, and which are real."""
    if isinstance(batch, InstructBatch) and batch.instruction is not None:
        tokens, attention_mask = batch.instruction, batch.instruction_attention_mask
        return tokens, torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask
    return prompt_of(batch)
