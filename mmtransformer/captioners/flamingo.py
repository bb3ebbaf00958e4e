"""Flamingo: gated attention to images inside a frozen language model, images anywhere in the text.

Shapes: n rows of text, r of each of the b samples, side by side; l latents of an image, k latents of all images of a
sample, gh gw rows and columns of patches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mmtransformer.backbones.base import Decoder, DecoderState, repeat_rows, select_rows
from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.attribution import latents_rollout, on_patches, through_latents
from mmtransformer.captioners.base import INSTRUCTION, Captioner
from mmtransformer.captioners.image_attention_mask import VisibleImages, check_visible_images, image_attention_mask
from mmtransformer.connectors.base import Connector, check_connector, heatmap_error
from mmtransformer.connectors.resampler import PerceiverResampler
from mmtransformer.layers.attention import Attention
from mmtransformer.layers.blocks import MLP, GatedCrossAttentionBlock, SwiGLU, make_norm
from mmtransformer.layers.cache import KeyValue
from mmtransformer.layers.config import Activation, Norm, known_fields
from mmtransformer.layers.kernels import autocast_input
from mmtransformer.layers.modes import evaluation_mode, freeze
from mmtransformer.layers.record import record_attention


@known_fields
@dataclass(frozen=True)
class GatedBlockConfig:
    """Flamingo's gated blocks; OpenFlamingo's by default.

    Args:
        num_heads: heads of the gated attention.
        head_dim: width of one head.
        qk_norm: norm of each head's queries and keys.
        activation: of the gated MLPs, or "swiglu" (Idefics).
        mlp_dim: their hidden width; None = 4 times the decoder's.
        norm: "layer" or "rms" (Idefics).
        norm_eps: of the norms.
        per_channel: gates a channel instead of a branch.
        mlp_without_image: whether the gated MLPs also work on tokens that see no image, as in OpenFlamingo, Idefics;
            False keeps the language model as it was wherever there is no image to see.
        dropout: share of the gated branches' results dropped in training.
    """

    num_heads: int = 8
    head_dim: int = 64
    qk_norm: Literal["rms", "layer"] | None = None
    activation: Activation | Literal["swiglu"] = "gelu"
    mlp_dim: int | None = None
    norm: Norm = "layer"
    norm_eps: float = 1e-5
    per_channel: bool = False
    mlp_without_image: bool = False
    dropout: float = 0.0

    def build(self, dim: int, context_dim: int) -> GatedCrossAttentionBlock:
        """A block between tokens of width `dim` and latents of width `context_dim`."""
        mlp_dim = 4 * dim if self.mlp_dim is None else self.mlp_dim
        attn = Attention(
            dim,
            self.num_heads,
            head_dim=self.head_dim,
            context_dim=context_dim,
            bias=False,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
        )
        return GatedCrossAttentionBlock(
            dim,
            attn,
            SwiGLU(dim, mlp_dim)
            if self.activation == "swiglu"
            else MLP(dim, mlp_dim, activation=self.activation, bias=False),
            partial(make_norm, self.norm, dim, self.norm_eps),
            per_channel=self.per_channel,
            mlp_without_image=self.mlp_without_image,
            dropout=self.dropout,
        )


class FlamingoState:
    """What decoding remembers: the language model's caches, and what the gated blocks read.

    Args:
        decoder: the caches.
        context: keys and values of the latents for each gated block, shared by a sample's rows; None = there is no
            image.
        mask: (n k) bool, which latents new text tokens see; None = all.
    """

    def __init__(self, decoder: DecoderState, context: list[KeyValue] | None, mask: Tensor | None) -> None:
        self.decoder, self.context = decoder, context
        # Rows share memory in a broadcast mask, and could not be reordered in place.
        self.mask = None if mask is None else mask.clone(memory_format=torch.contiguous_format)

    def reorder(self, rows: Tensor) -> None:
        """Reorders what belongs to rows of text; the latents' keys and values stay where they are."""
        self.decoder.reorder(rows)
        if self.mask is not None:
            self.mask = select_rows(self.mask, rows)


class Flamingo(Captioner):
    """Gated cross-attention blocks before some blocks of a language model (Flamingo, arXiv:2204.14198).

    At first its logits are the language model's, bit for bit, whatever the images. The model itself is neither
    edited nor hooked: everything goes through its hook `before_block`.

    Args:
        vision: the vision encoder.
        decoder: the language model.
        connector: visual tokens to latents, as a `PerceiverResampler`; None = the gated blocks read all visual tokens.
        cross_attn_every_n_layers: a gated block stands before the last of every so many blocks, as in OpenFlamingo.
        cross_layers: numbers of the blocks that have one before them, in the place of `cross_attn_every_n_layers`.
        gated: what the gated blocks are.
        visible_images: which images a token sees; see `image_attention_mask`.
        keep_prefix_tokens: whether class and register tokens are read too; OpenFlamingo reads patches alone.
        freeze_vision: see `Captioner`.
        freeze_decoder: the same for the language model; of an `ExtendedDecoder` the new tokens still learn.

    Raises:
        ValueError: if the parts do not fit, or there is no such block.
    """

    unsupported_fields = ("image_sizes", *INSTRUCTION)

    def __init__(
        self,
        vision: ViT,
        decoder: Decoder,
        *,
        connector: Connector | None = None,
        cross_attn_every_n_layers: int = 1,
        cross_layers: Sequence[int] | None = None,
        gated: GatedBlockConfig = GatedBlockConfig(),
        visible_images: VisibleImages = "last",
        keep_prefix_tokens: bool = True,
        freeze_vision: bool = True,
        freeze_decoder: bool = True,
    ) -> None:
        super().__init__(vision, freeze_vision=freeze_vision)
        check_connector(connector, vision.dim)
        if getattr(decoder, "context_dim", None) is not None:
            raise ValueError("Flamingo's decoder is a language model: one without cross-attention of its own")
        every = cross_attn_every_n_layers
        layers = range(every - 1, decoder.depth, max(every, 1))
        layers = list(layers if cross_layers is None else cross_layers)
        if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= decoder.depth:
            asked = f"cross_attn_every_n_layers={every}" if cross_layers is None else f"cross_layers={layers}"
            raise ValueError(
                f"{asked} names no ascending list of the decoder's {decoder.depth} blocks (0 to {decoder.depth - 1})"
            )
        self.decoder = freeze(decoder) if freeze_decoder else decoder
        self.connector, self.freeze_decoder = connector, freeze_decoder
        self.cross_attn_every_n_layers, self.cross_layers = every, layers
        self.gated, self.keep_prefix_tokens = gated, keep_prefix_tokens
        self.visible_images: VisibleImages = check_visible_images(visible_images)
        self.gated_blocks = nn.ModuleList(
            gated.build(decoder.dim, vision.dim if connector is None else connector.dim) for _ in layers
        )
        if visible_images == "none":  # What no token sees gets no gradient.
            parts = [vision, *([] if connector is None else [connector]), self.gated_blocks]
            for part in parts:
                freeze(part)
            if gated.mlp_without_image:
                for block in self.gated_blocks:
                    for part in (block.norm2, block.mlp, block.mlp_gate):
                        part.requires_grad_(True)

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states (n q d); rows are padded on the right, and may hold several documents."""
        latents, mask = self.read_images(batch)
        hook = self.before_block(latents, mask)
        return self.decoder(batch.tokens, document_ids=batch.document_ids, before_block=hook)

    def read_images(self, batch: CaptionBatch) -> tuple[Tensor | None, Tensor | None]:
        """Latents (b k d) and who sees which (n q k); no latents where nobody sees any, no mask where all see all."""
        self.check_fields(batch)
        visible = image_attention_mask(batch, self.visible_images)
        # In training images that nobody sees are read all the same: every process computes with the same weights.
        unseen = batch.image_mask is not None and not torch.is_grad_enabled() and not bool(batch.image_mask.any())
        if self.visible_images == "none" or not batch.visual.shape[1] or unseen:
            return None, None
        latents = self.latents(batch)
        (n, q), l = batch.tokens.shape, latents.shape[2]
        if visible is not None:
            visible = repeat(visible, "n q i -> n q (i l)", l=l)
        if batch.patch_grids is not None and (self.connector is None or self.connector.keeps_tokens):
            real = self.visual_mask(batch, l + self._skipped)
            assert real is not None
            real = repeat(real[..., self._skipped :], "b i l -> (b r) q (i l)", r=n // len(real), q=q)
            visible = real if visible is None else visible & real
        return autocast_input(rearrange(latents, "b i l d -> b (i l) d")), visible

    def latents(self, batch: CaptionBatch) -> Tensor:
        """What the gated blocks read: (b i l d). Images that are padding are not computed; theirs are 0."""
        if batch.image_mask is None or (self.connector is not None and self.connector.max_images):
            return self._resample(batch)
        b, i = batch.image_mask.shape
        real = batch.image_mask.flatten().nonzero()[:, 0]
        real = real if len(real) else real.new_zeros(1)
        found = self._resample(replace(batch.pick_images(real[:, None]), image_mask=None))[:, 0]
        latents = found.new_zeros(b * i, *found.shape[1:]).index_copy(0, real, found)
        return rearrange(latents, "(b i) l d -> b i l d", b=b)

    @property
    def _skipped(self) -> int:
        return 0 if self.keep_prefix_tokens else self.vision.num_prefix_tokens

    def _resample(self, batch: CaptionBatch) -> Tensor:
        visual_tokens = self.visual_tokens(batch)
        x = visual_tokens[..., self._skipped :, :].to(next(self.gated_blocks.parameters()).dtype)
        if self.connector is None:
            return x
        real = None if batch.patch_grids is None else self.visual_mask(batch, visual_tokens.shape[2])
        return self.connector.forward_with_mask(x, None if real is None else real[..., self._skipped :])[0]

    def before_block(
        self, context: Tensor | Sequence[KeyValue] | None, mask: Tensor | None
    ) -> Callable[[int, Tensor], Tensor]:
        """The hook before the decoder's blocks: runs the gated block of those that have one.

        Args:
            context: latents (b k d), or their keys and values for each gated block; None = there is no image.
            mask: (n q k) bool, which of them each token sees; None = all.
        """
        sees = None if mask is None else mask.any(-1)
        number_of = {layer: number for number, layer in enumerate(self.cross_layers)}
        dtype = next(self.gated_blocks.parameters()).dtype

        def hook(i: int, x: Tensor) -> Tensor:
            number = number_of.get(i)
            if number is None:
                return x
            read = context if context is None or isinstance(context, Tensor) else context[number]
            # A frozen language model may be kept in bfloat16: the gated blocks keep the format they learn in.
            return self.gated_blocks[number](x.to(dtype), read, mask=mask, sees=sees).to(x.dtype)

        return hook

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, FlamingoState]:
        """Encodes the images once and reads the left-padded prompts; see `Captioner.prefill`."""
        if batch.document_ids is not None:
            raise ValueError("a prompt is one document a row, but document_ids were given")
        latents, mask = self.read_images(batch)
        context = None if latents is None else [block.attn.project_kv(latents) for block in self.gated_blocks]  # pyright: ignore
        decoder = self.decoder.new_state(batch.tokens.shape[1] + max_new_tokens)
        attention_mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
        hidden = self.decoder(
            batch.tokens, attention_mask=attention_mask, state=decoder, before_block=self.before_block(context, mask)
        )
        if context is not None and mask is not None:
            context, mask = self._for_new_tokens(context, mask[:, -1], batch)
        return repeat_rows(self.head(hidden[:, -1]), FlamingoState(decoder, context, mask), expand_size)

    def decode_step(self, tokens: Tensor, state: FlamingoState) -> Tensor:
        """Adds a token to each row: (n) -> logits of the next (n vocab)."""
        hook = self.before_block(state.context, None if state.mask is None else state.mask[:, None])
        hidden = self.decoder(tokens[:, None], state=state.decoder, before_block=hook)
        return self.decoder.head(hidden[:, 0])

    def _for_new_tokens(
        self, context: list[KeyValue], mask: Tensor, batch: CaptionBatch
    ) -> tuple[list[KeyValue], Tensor | None]:
        """What new tokens see (n k): of several images only the one that is the last by now, where that is so."""
        (n, _), (b, i) = batch.tokens.shape, batch.visual.shape[:2]
        if self.visible_images == "last" and n == b and i > 1:
            visible = rearrange(mask, "n (i l) -> n i l", i=i)
            last, rows = visible[..., 0].long().argmax(1), torch.arange(n, device=mask.device)
            mask = visible[rows, last]
            context = [
                KeyValue(*(rearrange(x, "n g (i l) c -> n i g l c", i=i)[rows, last] for x in kv)) for kv in context
            ]
        return context, None if bool(mask.all()) else mask

    @property
    def heatmap_error(self) -> str | None:
        """That nobody knows what the connector's tokens have gathered, where that is so."""
        return None if isinstance(self.connector, PerceiverResampler) else heatmap_error(self.connector)

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """Where each text token looks in the images, through the latents: (n q i gh gw).

        The gated layers' weights on the latents, a mean of heads and of layers by how far their gates are open; times
        what each latent has gathered of the patches, followed through the resampler's layers as in attention rollout
        (arXiv:2005.00928).

        Raises:
            ValueError: if the connector neither is a resampler nor keeps the patches' tokens.
        """
        if self.heatmap_error:
            raise ValueError(self.heatmap_error)
        with evaluation_mode(self):
            seen = replace(batch, pixels=None, visual_tokens=self.visual_tokens(batch))
            with record_attention(self.gated_blocks) as reads:
                self.hidden_states(seen)
            to_patches = self._patches_of_latents(seen)
        q, (i, grid) = batch.tokens.shape[1], (seen.visual.shape[1], self.grid(batch))
        if not reads:
            return torch.zeros(len(batch.tokens), q, i, *grid, device=batch.tokens.device)
        gates = torch.stack([block.attn_gate.tanh().abs().mean() for block in self.gated_blocks]).float()  # pyright: ignore
        gates = gates if bool(gates.any()) else torch.ones_like(gates)
        layers = torch.stack([weights.mean(1) for weights in reads.values()])
        to_latents = torch.einsum("j, j n q k -> n q k", gates / gates.sum(), layers)
        weights = through_latents(rearrange(to_latents, "n q (i l) -> n i q l", i=i), to_patches)
        skipped = self.vision.num_prefix_tokens - self._skipped
        return on_patches(rearrange(weights, "n i q p -> n q i p"), grid, skipped, batch.patch_grids)

    def _patches_of_latents(self, batch: CaptionBatch) -> Tensor:
        """What each latent holds of each visual token, at most 1 in sum: (b i l p)."""
        b, i, p = batch.visual.shape[0], batch.visual.shape[1], batch.visual.shape[2] - self._skipped
        if not isinstance(self.connector, PerceiverResampler):  # each is a patch's
            return torch.eye(p, device=batch.visual.device).expand(b, i, p, p)
        with record_attention(self.connector) as record:
            self._resample(batch)
        return rearrange(latents_rollout(record.values(), p), "(b i) l p -> b i l p", b=b)
