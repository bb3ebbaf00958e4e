"""Flamingo: gated attention to pictures inside a frozen language model, pictures anywhere in the text.

Letters: b samples, i pictures of a sample, p visual tokens of a picture, l latents of a picture, n rows of text (b
divides n), m rows while decoding (beams; n divides m), q text tokens, k latents of all pictures, d width of a token,
h heads, gh gw rows and columns of patches.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mmtransformer.backbones.base import Decoder, DecoderState, kept_rows
from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.base import CaptionBatch, Captioner, freeze
from mmtransformer.captioners.image_attention_mask import (
    VisibleImages,
    check_visible_images,
    image_attention_mask,
)
from mmtransformer.connectors.resampler import PerceiverResampler
from mmtransformer.layers.attention import Attention, KeyValue, cast_once
from mmtransformer.layers.blocks import MLP, GatedCrossAttentionBlock, SwiGLU, make_norm
from mmtransformer.layers.config import Activation, Norm
from mmtransformer.layers.record import record_attention

Door = Callable[[int, Tensor], Tensor]


class FlamingoState:
    """The decoder's caches; each gated block's keys and values of the pictures, shared by the rows of a sample.

    Args:
        decoder: the decoder's state.
        context: a pair a gated block; None = there is no picture.
        mask: (m 1 k), which latents new tokens see; None = all.
    """

    def __init__(self, decoder: DecoderState, context: list[KeyValue] | None, mask: Tensor | None) -> None:
        self.decoder, self.context = decoder, context
        self.mask = None if mask is None else mask.clone(memory_format=torch.contiguous_format)

    def reorder(self, rows: Tensor) -> None:
        """Reorders what belongs to rows of text; the pictures' keys and values stay where they are."""
        self.decoder.reorder(rows)
        if self.mask is not None:
            self.mask = kept_rows(self.mask, rows)


class Flamingo(Captioner):
    """Gated cross-attention blocks before some blocks of a language model (Flamingo, arXiv:2204.14198).

    At first its logits are the language model's, bit for bit, whatever the pictures. The model itself is neither
    edited nor hooked: everything goes through its `before_block` door.

    Args:
        vision: the vision tower.
        decoder: the language model.
        resampler: visual tokens to latents; None = the gated blocks read all visual tokens.
        cross_every: a gated block stands before the last of every so many blocks, as in OpenFlamingo.
        cross_layers: numbers of the blocks that have one before them, in the place of `cross_every`.
        num_heads: heads of the gated attention.
        head_dim: width of one head.
        mlp: activation of the gated MLPs, or "swiglu" (Idefics).
        mlp_dim: their hidden width; None = 4 times the decoder's.
        norm: "layer" or "rms" (Idefics).
        norm_eps: of the gated blocks' norms.
        qk_norm: norm of each head's queries and keys in the gated attention.
        per_channel: gates a channel instead of a branch.
        mlp_without_image: whether the gated MLPs also work on tokens that see no picture, as in OpenFlamingo, Idefics;
            False keeps the language model as it was wherever there is no picture to see.
        visible_images: which pictures a token sees; see `image_attention_mask`.
        patches_only: leave out the vision tower's class token and registers, as OpenFlamingo does.
        dropout: share of the gated branches' results dropped in training.
        freeze_vision: whether the tower is taken out of training (its features can then be cached).
        freeze_decoder: the same for the language model; of an `ExtendedVocabulary` the new tokens still learn.

    Raises:
        ValueError: if the parts do not fit, or there is no such block.
    """

    def __init__(
        self,
        vision: ViT,
        decoder: Decoder,
        *,
        resampler: PerceiverResampler | None = None,
        cross_every: int = 1,
        cross_layers: Sequence[int] | None = None,
        num_heads: int = 8,
        head_dim: int = 64,
        mlp: Activation | Literal["swiglu"] = "gelu",
        mlp_dim: int | None = None,
        norm: Norm = "layer",
        norm_eps: float = 1e-5,
        qk_norm: Literal["rms", "layer"] | None = None,
        per_channel: bool = False,
        mlp_without_image: bool = False,
        visible_images: VisibleImages = "last",
        patches_only: bool = False,
        dropout: float = 0.0,
        freeze_vision: bool = True,
        freeze_decoder: bool = True,
    ) -> None:
        super().__init__()
        if resampler is not None and resampler.dim != vision.dim:
            raise ValueError(
                f"the resampler's dim ({resampler.dim}) must be the vision tower's ({vision.dim})"
            )
        if getattr(decoder, "cross_dim", None) is not None:
            raise ValueError("Flamingo's decoder is a language model: one without cross-attention of its own")
        layers = range(cross_every - 1, decoder.depth, max(cross_every, 1))
        layers = list(layers if cross_layers is None else cross_layers)
        if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= decoder.depth:
            asked = f"cross_every={cross_every}" if cross_layers is None else f"cross_layers={layers}"
            raise ValueError(
                f"{asked} names no ascending list of the decoder's {decoder.depth} blocks (0 to {decoder.depth - 1})"
            )
        self.vision, self.decoder, self.resampler = vision, decoder, resampler
        self.cross_every, self.cross_layers = cross_every, layers
        self.num_heads, self.head_dim, self.qk_norm = num_heads, head_dim, qk_norm
        self.mlp_dim = mlp_dim = 4 * decoder.dim if mlp_dim is None else mlp_dim
        self.mlp, self.norm, self.norm_eps = mlp, norm, norm_eps
        self.per_channel, self.mlp_without_image, self.dropout = per_channel, mlp_without_image, dropout
        self.visible_images: VisibleImages = check_visible_images(visible_images)
        self.patches_only = patches_only
        self.freeze_vision, self.freeze_decoder = freeze_vision, freeze_decoder

        width = decoder.dim
        self.gated_blocks = nn.ModuleList(
            GatedCrossAttentionBlock(
                width,
                Attention(
                    width,
                    num_heads,
                    head_dim=head_dim,
                    context_dim=vision.dim,
                    bias=False,
                    qk_norm=qk_norm,
                    norm_eps=norm_eps,
                ),
                SwiGLU(width, mlp_dim)
                if mlp == "swiglu"
                else MLP(width, mlp_dim, activation=mlp, bias=False),
                partial(make_norm, norm, width, norm_eps),
                per_channel=per_channel,
                mlp_without_image=mlp_without_image,
                dropout=dropout,
            )
            for _ in layers
        )
        if freeze_vision:
            freeze(vision)
        if freeze_decoder:
            freeze(decoder)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the head scores."""
        return self.decoder.vocab_size

    @property
    def max_len(self) -> int:
        """Most text tokens of a row, prompt included."""
        return self.decoder.max_len

    def encode(self, pixels: Tensor) -> Tensor:
        """The vision tower's tokens: (b i 3 height width) -> (b i p d)."""
        b, i = pixels.shape[:2]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
            features = self.vision.forward_features(rearrange(pixels, "b i c h w -> (b i) c h w"))
        return rearrange(features, "(b i) p d -> b i p d", b=b, i=i)

    def latents(self, batch: CaptionBatch) -> Tensor:
        """What the gated blocks read: (b i l d). Pictures that are padding are not computed; theirs are 0."""
        if batch.image_mask is None or (self.resampler is not None and self.resampler.max_images):
            return self._resample(self.visual_tokens(batch))
        b, i = batch.image_mask.shape
        real = batch.image_mask.flatten().nonzero()[:, 0]
        few = {
            name: visual.flatten(0, 1)[real][:, None]
            for name, visual in (("pixels", batch.pixels), ("visual_tokens", batch.visual_tokens))
            if visual is not None
        }
        found = self._resample(self.visual_tokens(replace(batch, **few)))[:, 0]
        latents = found.new_zeros(b * i, *found.shape[1:]).index_copy(0, real, found)
        return rearrange(latents, "(b i) l d -> b i l d", b=b)

    @property
    def _skipped(self) -> int:
        return self.vision.num_prefix_tokens if self.patches_only else 0

    def _resample(self, visual_tokens: Tensor) -> Tensor:
        visual_tokens = visual_tokens[..., self._skipped :, :].to(next(self.gated_blocks.parameters()).dtype)
        return visual_tokens if self.resampler is None else self.resampler(visual_tokens)

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states (n q d); rows are padded on the right, and may hold several documents."""
        context, mask = self._read(batch)
        door = self._door(context, mask)
        return self.decoder(batch.tokens, document_ids=batch.document_ids, before_block=door)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits: (... d) -> (... vocab)."""
        return self.decoder.head(hidden)

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, FlamingoState]:
        """Encodes the pictures once and reads the left-padded prompts; see `Captioner.prefill`."""
        if batch.document_ids is not None:
            raise ValueError("a prompt is one document a row, but segments were given")
        n, q = batch.tokens.shape
        latents, mask = self._read(batch)
        context = None if latents is None else [layer.project_kv(latents) for layer in self._layers]
        decoder = self.decoder.new_state(q + max_new_tokens)
        attention_mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
        hidden = self.decoder(
            batch.tokens,
            attention_mask=attention_mask,
            state=decoder,
            before_block=self._door(context, mask),
        )
        logits = self.head(hidden[:, -1])
        if context is not None and mask is not None:
            context, mask = self._seen_from_now_on(context, mask[:, -1:], batch)
        state = FlamingoState(decoder, context, mask)
        if expand_size > 1:
            rows = torch.arange(n, device=logits.device).repeat_interleave(expand_size)
            state.reorder(rows)
            logits = logits.index_select(0, rows)
        return logits, state

    def decode_step(self, tokens: Tensor, state: FlamingoState) -> Tensor:
        """Adds a token to each row: (m) -> logits of the next (m vocab)."""
        door = self._door(state.context, state.mask)
        return self.head(self.decoder(tokens[:, None], state=state.decoder, before_block=door)[:, 0])

    @property
    def _layers(self) -> list[Attention]:
        return [block.attn for block in self.gated_blocks]  # pyright: ignore[reportReturnType]

    def _read(self, batch: CaptionBatch) -> tuple[Tensor | None, Tensor | None]:
        """Latents (b k d) and who sees which (n q k); no latents where nobody sees any, no mask where all see all."""
        seen = image_attention_mask(batch, self.visible_images)
        blind = self.visible_images == "none" or not batch.visual.shape[1]
        if blind or (batch.image_mask is not None and not bool(batch.image_mask.any())):
            return None, None
        latents = self.latents(batch)
        if seen is not None:
            seen = repeat(seen, "n q i -> n q (i l)", l=latents.shape[2])
        return cast_once(rearrange(latents, "b i l d -> b (i l) d")), seen

    def _door(self, context: Tensor | Sequence[KeyValue] | None, mask: Tensor | None) -> Door:
        """What runs before each of the decoder's blocks."""
        sees = None if mask is None else mask.any(-1)
        place = {layer: number for number, layer in enumerate(self.cross_layers)}
        learns = next(self.gated_blocks.parameters()).dtype

        def before_block(i: int, x: Tensor) -> Tensor:
            if i not in place:
                return x
            read = context if context is None or isinstance(context, Tensor) else context[place[i]]
            # A frozen language model may be kept in bfloat16: the gated blocks keep the format they learn in.
            return self.gated_blocks[place[i]](x.to(learns), read, mask=mask, sees=sees).to(x.dtype)

        return before_block

    def _seen_from_now_on(
        self, context: list[KeyValue], mask: Tensor, batch: CaptionBatch
    ) -> tuple[list[KeyValue], Tensor | None]:
        """What new tokens see: of several pictures, only the one that is the last from now on, where that is so."""
        (n, _), (b, i) = batch.tokens.shape, batch.visual.shape[:2]
        if self.visible_images == "last" and n == b and i > 1:
            seen = rearrange(mask, "n 1 (i l) -> n i l", i=i)
            last, rows = seen[..., 0].long().argmax(1), torch.arange(n, device=mask.device)
            mask = rearrange(seen[rows, last], "n l -> n 1 l")
            apart = [
                [rearrange(x, "n g (i l) c -> n i g l c", i=i)[rows, last] for x in kv] for kv in context
            ]
            context = [KeyValue(k, v) for k, v in apart]
        return context, None if bool(mask.all()) else mask

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """Where each text token looks in the pictures, through the latents: (n q i gh gw).

        The gated layers' weights on the latents, a mean of heads and of layers by how far their gates are open; times
        what each latent has gathered of the patches, followed through the resampler's layers as in attention rollout
        (arXiv:2005.00928).
        """
        training = self.training
        self.eval()
        try:
            visual_tokens = self.visual_tokens(batch)
            seen = replace(batch, pixels=None, visual_tokens=visual_tokens, image_mask=batch.image_mask)
            with record_attention(self.gated_blocks) as words:
                self.hidden_states(seen)
            patches = self._patches_of_latents(visual_tokens)
        finally:
            self.train(training)
        (n, q), (b, i) = batch.tokens.shape, visual_tokens.shape[:2]
        grid = self.vision.grid if batch.pixels is None else self.vision.grid_size(*batch.pixels.shape[3:])
        if not words:
            return torch.zeros(n, q, i, *grid, device=batch.tokens.device)
        opened = torch.stack([block.attn_gate.tanh().abs().mean() for block in self.gated_blocks])  # pyright: ignore
        share = torch.ones_like(opened) if not bool(opened.any()) else opened
        layers = torch.stack([weights.mean(1) for weights in words.values()])
        mean = torch.einsum("j, j n q k -> n q k", (share / share.sum()).float(), layers)
        mean = rearrange(mean, "(b r) q (i l) -> b i (r q) l", b=b, i=i)
        found = rearrange(mean @ patches, "b i (r q) p -> (b r) q i p", q=q)
        found = found[..., self.vision.num_prefix_tokens - self._skipped :]
        return rearrange(found, "n q i (gh gw) -> n q i gh gw", gh=grid[0])

    def _patches_of_latents(self, visual_tokens: Tensor) -> Tensor:
        """What each latent holds of each visual token, at most 1 in sum: (b i l p)."""
        b, i, p = visual_tokens.shape[0], visual_tokens.shape[1], visual_tokens.shape[2] - self._skipped
        if self.resampler is None:
            return torch.eye(p, device=visual_tokens.device).expand(b, i, p, p)
        with record_attention(self.resampler) as record:
            self._resample(visual_tokens)
        held = torch.zeros(b * i, self.resampler.num_latents, p, device=visual_tokens.device)
        for weights in record.values():
            on_patches, on_latents = weights.mean(1).split((p, self.resampler.num_latents), dim=-1)
            held = (held + on_patches + on_latents @ held) / 2  # Half of a latent is what it was before.
        return rearrange(held, "(b i) l p -> b i l p", b=b)
