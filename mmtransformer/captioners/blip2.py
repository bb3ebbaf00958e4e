"""Blip2: a Q-Former's queries stand in front of the text of a language model (BLIP-2, arXiv:2301.12597, section 3.3).

Shapes: n rows of text, r of each of the b samples, side by side; m rows of queries (b, or n where instructions make
them differ), e width of the decoder's embeddings, gh gw rows and columns of patches.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.backbones.base import Decoder, State
from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.attribution import mean_weights, on_patches, through_latents
from mmtransformer.captioners.base import INSTRUCTION, NATIVE, Captioner
from mmtransformer.captioners.decoder_prefix import forward_with_prefix, in_image_order, prefill_with_prefix
from mmtransformer.captioners.encoder_prefix import (
    SourceReader,
    forward_with_source_prefix,
    prefill_with_source_prefix,
    prompt_of,
    put_back,
)
from mmtransformer.connectors.qformer import QFormer
from mmtransformer.layers.linear import Linear
from mmtransformer.layers.modes import evaluation_mode, freeze
from mmtransformer.layers.record import record_attention


@dataclass
class InstructBatch(CaptionBatch):
    """Images and texts, with what the Q-Former reads of each row in its own vocabulary.

    Attributes:
        instruction: (n t) long, padded on the right; None = the row's prompt, in the decoder's vocabulary.
        instruction_attention_mask: (n t) bool, True = a real token; None = all are.
    """

    instruction: Tensor | None = None
    instruction_attention_mask: Tensor | None = None


class Blip2(Captioner):
    """A vision encoder, a Q-Former and a language model: queries, projected, then prompt and caption.

    Args:
        vision: the vision encoder; its `forward_features` gives the visual tokens.
        qformer: gathers them; without a text stream, or with one where `instruct` is set.
        decoder: a causal language model, ours or any of transformers', which reads queries, prompt and caption; or an
            encoder-decoder (ours, or a T5), whose encoder reads queries and prompt, its decoder a begin token and the
            caption.
        instruct: whether the prompt goes into the Q-Former too (InstructBLIP, arXiv:2305.06500, section 2.3).
        freeze_vision: see `Captioner`.
        train_vision_norm: see `Captioner`.
        freeze_decoder: whether the language model is taken out of training.

    Raises:
        ValueError: if the parts do not fit.
    """

    unsupported_fields = NATIVE

    def __init__(
        self,
        vision: ViT,
        qformer: QFormer,
        decoder: Decoder | SourceReader,
        *,
        instruct: bool = False,
        freeze_vision: bool = True,
        train_vision_norm: bool = False,
        freeze_decoder: bool = True,
    ) -> None:
        super().__init__(vision, freeze_vision=freeze_vision, train_vision_norm=train_vision_norm)
        if not isinstance(qformer, QFormer):
            raise ValueError(f"qformer must be a QFormer, not a {type(qformer).__name__}")
        if qformer.visual_dim != vision.dim:
            raise ValueError(
                f"the Q-Former's visual_dim ({qformer.visual_dim}) must be the vision encoder's dim ({vision.dim})"
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
        self.qformer, self.instruct, self.freeze_decoder = qformer, instruct, freeze_decoder
        self.decoder = freeze(decoder) if freeze_decoder else decoder
        if train_vision_norm:  # Of a vision encoder kept in bfloat16, too, it learns in the format of what else learns.
            vision.norm.to(qformer.query_tokens.dtype)
        if instruct:
            self.unsupported_fields = tuple(name for name in self.unsupported_fields if name not in INSTRUCTION)
            qformer.freeze_last_text()
        width = decoder.dim if isinstance(decoder, SourceReader) else decoder.embedding_weights[0].shape[1]
        self.proj = Linear(qformer.dim, width)
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    @property
    def max_len(self) -> int:
        """Most text tokens of a row beside one image, prompt included; queries are not counted."""
        behind = 0 if isinstance(self.decoder, SourceReader) else self.qformer.num_queries
        return self.decoder.max_len - behind

    def prefix_embeds(self, batch: CaptionBatch) -> Tensor:
        """What stands in front of the text: the queries of each image, projected, (m i l e)."""
        visual_tokens = self.visual_tokens(batch).to(self.proj.weight.dtype)
        b, i = visual_tokens.shape[:2]
        x = rearrange(visual_tokens, "b i p d -> (b i) p d")
        mask = None
        if batch.patch_grids is not None and (real := self.visual_mask(batch, x.shape[1])) is not None:
            mask = real.flatten(0, 1)
        if not self.instruct:
            return rearrange(self.proj(self.qformer(x, visual_mask=mask)), "(b i) l e -> b i l e", i=i)
        rows = [rearrange(t, "(b r) q -> b 1 r q", b=b).expand(-1, i, -1, -1) for t in _instruction(batch)]
        flat = (rearrange(t, "b i r q -> (b i r) q") for t in rows)
        queries = self.qformer(x, *flat, visual_mask=mask)
        return rearrange(self.proj(queries), "(b i r) l e -> (b r) i l e", b=b, i=i)

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states of right-padded rows: (n q d)."""
        if isinstance(self.decoder, SourceReader):
            return forward_with_source_prefix(self.decoder, self.prefix_embeds(batch), batch)
        return forward_with_prefix(self.decoder, self.prefix_embeds(batch), batch)

    def prefill(self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40) -> tuple[Tensor, State]:
        """Computes the queries once and reads the left-padded prompts; see `Captioner.prefill`."""
        seq2seq, prefix_embeds = isinstance(self.decoder, SourceReader), self.prefix_embeds(batch)
        prefill: Any = prefill_with_source_prefix if seq2seq else prefill_with_prefix
        return prefill(self.decoder, prefix_embeds, batch, expand_size=expand_size, max_new_tokens=max_new_tokens)

    def decode_step(self, tokens: Tensor, state: Any) -> Tensor:
        """Adds a token to each row: (n) -> logits of the next (n vocab)."""
        return self.decoder.decode_step(tokens, state)

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """Where each text token looks in the images, through the queries: (n q i gh gw).

        Its attention to the queries, the mean of all heads and layers, times what each query holds of the patches
        (`QFormer.attention_map`). The queries have looked before there is any text: they tell what is described from
        the rest, but hardly one word's object from another's.

        Raises:
            ValueError: if the decoder's attention cannot be recorded, as that of a hub model.
        """
        seq2seq = isinstance(self.decoder, SourceReader)
        kind = ".cross_attn" if seq2seq else ".attn"
        with (
            evaluation_mode(self),
            record_attention(self.decoder, keep=lambda name: name.endswith(kind)) as reads,
            record_attention(self.qformer) as sees,
        ):
            self.hidden_states(batch)
        (b, i), l = batch.visual.shape[:2], self.qformer.num_queries
        to_queries = mean_weights(reads.values())[..., : i * l]
        to_queries = put_back(to_queries, batch) if seq2seq else to_queries[:, i * l :]
        to_queries = rearrange(in_image_order(to_queries, batch), "n q i l -> n i q l")
        to_patches = rearrange(self.qformer.attention_map(sees), "(b i r) l p -> (b r) i l p", b=b, i=i)
        weights = rearrange(through_latents(to_queries, to_patches), "n i q p -> n q i p")
        return on_patches(weights, self.grid(batch), self.vision.num_prefix_tokens, batch.patch_grids)


def blip2_from_stage1(
    folder: str | Path,
    decoder: Decoder | SourceReader,
    *,
    vision: ViT | None = None,
    freeze_vision: bool = True,
    freeze_decoder: bool = True,
) -> Blip2:
    """Stage 2 from what stage 1 left: its vision encoder and its Q-Former, whose text stream is dropped.

    Args:
        folder: the run's folder of stage 1 (`Blip2QFormer`), or the model's in it.
        decoder: the language model that is to be spoken to.
        vision: another vision encoder of the same width; None = that of stage 1.
        freeze_vision: see `Captioner`.
        freeze_decoder: see `Blip2`.

    Raises:
        ValueError: if the folder has no such model, or the vision encoder is of another width.
    """
    inside = Path(folder) / "model"
    stage1 = Captioner.from_pretrained(inside if inside.is_dir() else folder)
    qformer = getattr(stage1, "qformer", None)
    if not isinstance(qformer, QFormer):
        raise ValueError(f"{folder} holds a {type(stage1).__name__}, which has no Q-Former: give a run of stage 1")
    if vision is not None and vision.dim != qformer.visual_dim:
        raise ValueError(
            f"the Q-Former of {folder} reads visual tokens {qformer.visual_dim} wide, but the vision encoder given "
            f"makes them {vision.dim} wide"
        )
    model = Blip2(
        stage1.vision if vision is None else vision,
        qformer.without_text(),
        decoder,
        freeze_vision=freeze_vision,
        train_vision_norm=freeze_vision and bool(getattr(stage1, "train_vision_norm", False)),
        freeze_decoder=freeze_decoder,
    )
    return model.train()


def _instruction(batch: CaptionBatch) -> tuple[Tensor, Tensor]:
    """What the Q-Former reads of each row, padded on the right: (n t) ids, and which are real."""
    if isinstance(batch, InstructBatch) and batch.instruction is not None:
        tokens, attention_mask = batch.instruction, batch.instruction_attention_mask
        return tokens, torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask
    return prompt_of(batch)
