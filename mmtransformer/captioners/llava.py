"""Llava: an image's tokens, projected, stand in the text where its placeholders stand (LLaVA, arXiv:2310.03744).

LLaVA 1.5, LLaVA-NeXT, LLaVA-OneVision, Idefics3 and SmolVLM are this with other towers, projectors and tiles.

Shapes: n rows of text, r of each of the b samples, side by side; l tokens of an image (or of a tile, which is an image
here), k tokens of all images of a sample, e width of the decoder's embeddings, gh gw rows and columns of patches.
"""

from dataclasses import replace

import torch
from einops import repeat
from torch import Tensor, nn

from mmtransformer.backbones.base import Decoder, DecoderState, repeat_rows
from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.attribution import mean_weights
from mmtransformer.captioners.base import Captioner
from mmtransformer.captioners.tiles import Size, TileConfig
from mmtransformer.connectors.projector import LinearProjector, MLPProjector
from mmtransformer.layers.modes import evaluation_mode, freeze
from mmtransformer.layers.record import record_attention


class Llava(Captioner):
    """A vision encoder, a projector and a language model: an image's tokens replace its placeholders in the text.

    A row of text holds `image_token_id` once for every token of its images, in their order. Text and images are read
    causally, and count as one row for `max_len`.

    Args:
        vision: the vision encoder.
        projector: brings its tokens to the width of the decoder's embeddings.
        decoder: a causal language model, ours or any of transformers'.
        image_token_id: the id that placeholders have.
        vision_feature_layers: the blocks whose tokens are read, side by side, as `ViT.tokens_after` counts them, and
            before the last norm: LLaVA-1.5 reads the last but one. None = the tokens after the last norm (Idefics3).
        keep_prefix_tokens: whether class and register tokens are read too.
        tiles: how pictures are cut into tiles, which `TiledBatch` names; by default each image stands for itself.
        freeze_vision: see `Captioner`.
        freeze_decoder: whether the language model is taken out of training.

    Raises:
        ValueError: if the parts do not fit.
    """

    def __init__(
        self,
        vision: ViT,
        projector: MLPProjector | LinearProjector,
        decoder: Decoder,
        image_token_id: int,
        *,
        vision_feature_layers: tuple[int, ...] | None = (-2,),
        keep_prefix_tokens: bool = False,
        tiles: TileConfig = TileConfig(),
        freeze_vision: bool = True,
        freeze_decoder: bool = True,
    ) -> None:
        super().__init__(vision, freeze_vision=freeze_vision)
        if not isinstance(projector, MLPProjector | LinearProjector):
            kind = type(projector).__name__
            raise ValueError(f"projector must be an MLPProjector or a LinearProjector, not a {kind}")
        layers = None if vision_feature_layers is None else tuple(vision_feature_layers)
        width, read = decoder.embedding_weights[0].shape[1], vision.dim * len(layers or (-1,))
        if (projector.visual_dim, projector.dim) != (read, width):
            raise ValueError(
                f"the projector goes from {projector.visual_dim} to {projector.dim}, but the vision encoder's tokens "
                f"have {read} channels and the decoder's embeddings {width}"
            )
        if any(not -vision.depth <= layer < vision.depth for layer in layers or ()):
            raise ValueError(f"tokens behind blocks {layers} are to be read, but there are {vision.depth}")
        if any(side % projector.pixel_shuffle for side in vision.grid_size):
            s, (gh, gw) = projector.pixel_shuffle, vision.grid_size
            raise ValueError(f"squares of {s} x {s} patches do not tile a grid of {gh} x {gw}")
        if not 0 <= image_token_id < decoder.vocab_size:
            raise ValueError(f"image_token_id ({image_token_id}) is not one of the decoder's {decoder.vocab_size} ids")
        if keep_prefix_tokens and (projector.pixel_shuffle > 1 or tiles.pinpoints) and vision.num_prefix_tokens:
            raise ValueError(
                "class and register tokens have no place in squares of patches or in tiles: keep_prefix_tokens must be "
                "False"
            )
        self.projector, self.decoder = projector, freeze(decoder) if freeze_decoder else decoder
        self.image_token_id, self.tiles, self.freeze_decoder = image_token_id, tiles, freeze_decoder
        self.vision_feature_layers, self.keep_prefix_tokens = layers, keep_prefix_tokens
        self.newline = nn.Parameter(torch.randn(width) * width**-0.5) if tiles.pinpoints else None
        if tiles.pinpoints:
            self.unsupported_fields = tuple(name for name in self.unsupported_fields if name != "image_sizes")
        if layers is not None:  # What stands behind the last of them gets no gradient.
            last = max(layer % vision.depth for layer in layers)
            for part in (vision.norm, vision.pool_norm, *vision.blocks[last + 1 :]):
                part.requires_grad_(False)

    def _features(self, pixels: Tensor) -> Tensor:
        """What is read of the vision encoder's tokens: (n c height width) -> (n p d)."""
        if self.vision_feature_layers is None:
            x = super()._features(pixels)
        else:
            x = torch.cat(self.vision.tokens_after(pixels, list(self.vision_feature_layers)), dim=-1)
        return x if self.keep_prefix_tokens else x[:, self.vision.num_prefix_tokens :]

    def image_embeds(self, batch: CaptionBatch) -> list[Tensor]:
        """What takes the place of each sample's placeholders, in their order: b of (k e).

        Raises:
            ValueError: if the batch does not say how large its pictures are, where they are cut into tiles.
        """
        visual, real = batch.visual, batch.image_mask
        flat = visual.flatten(0, 1) if real is None else visual[real]
        counts = [visual.shape[1]] * len(visual) if real is None else real.sum(1).tolist()
        field = "pixels" if batch.visual_tokens is None else "visual_tokens"
        tokens = self.visual_tokens(replace(batch, **{field: flat[:, None]}))[:, 0]
        images = self.projector(tokens, self.grid(batch)).split(counts)
        if self.newline is None:
            return [x.flatten(0, 1) for x in images]
        found = []
        for x, pictures in zip(images, self.image_tiles(batch), strict=True):
            parts = x.split([1 + rows * columns for _, (rows, columns) in pictures])
            grid = self.token_grid(batch)
            joined = (self.tiles.join(part, *p, grid, self.newline) for part, p in zip(parts, pictures, strict=True))
            found.append(torch.cat(list(joined)))
        return found

    def image_tiles(self, batch: CaptionBatch) -> list[list[tuple[Size, Size]]]:
        """Each sample's pictures: their sizes, px, and their rows and columns of tiles.

        Raises:
            ValueError: if the batch does not say, or has other numbers of tiles.
        """
        sizes: Tensor | None = getattr(batch, "image_sizes", None)
        if sizes is None:
            raise ValueError("pictures that are cut into tiles need a TiledBatch with their image_sizes")
        tile = self.vision.image_size if batch.pixels is None else (batch.pixels.shape[3], batch.pixels.shape[4])
        found = []
        for sample in sizes.tolist():
            real = [(height, width) for height, width in sample if height]
            found.append([(size, self.tiles.tiles(size, tile, len(real))) for size in real])
        wanted = [sum(1 + rows * columns for _, (rows, columns) in sample) for sample in found]
        given = [batch.visual.shape[1]] * len(found) if batch.image_mask is None else batch.image_mask.sum(1).tolist()
        if wanted != given:
            raise ValueError(f"samples have {given} tiles, and pictures of these sizes {wanted}")
        return found

    def token_grid(self, batch: CaptionBatch) -> Size:
        """Rows and columns of the tokens of an image."""
        gh, gw = self.grid(batch)
        return gh // self.projector.pixel_shuffle, gw // self.projector.pixel_shuffle

    def inputs_embeds(self, batch: CaptionBatch) -> Tensor:
        """Embeddings of the text, with the images' tokens at their placeholders: (n q e).

        Raises:
            ValueError: if (on a CPU) a row has another number of placeholders than its images have tokens.
        """
        x, images = self.decoder.embed_tokens(batch.tokens), self.image_embeds(batch)
        place, each = batch.tokens == self.image_token_id, len(batch.tokens) // len(images)
        rows = [image for image in images for _ in range(each)]
        if place.device.type == "cpu" and not torch.compiler.is_compiling():
            for i, (row, count) in enumerate(zip(rows, place.sum(1).tolist(), strict=True)):
                if len(row) != count:
                    raise ValueError(
                        f"row {i} has {count} placeholders (id {self.image_token_id}), but its images {len(row)} tokens"
                    )
        return x.masked_scatter(place[..., None], torch.cat(rows).to(x.dtype))

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states (n q d); rows are padded on the right, so the causal mask alone hides their padding."""
        x = self.inputs_embeds(batch)
        positions = self.decoder.position_ids(x)
        return self.decoder.forward_embeds(self.decoder.add_positions(x, positions), positions)

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, DecoderState]:
        """Encodes the images once and reads the left-padded prompts; see `Captioner.prefill`."""
        x = self.inputs_embeds(batch)
        attention_mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
        state = self.decoder.new_state(x.shape[1] + max_new_tokens)
        positions = self.decoder.position_ids(x, attention_mask, state=state)
        hidden = self.decoder.forward_embeds(
            self.decoder.add_positions(x, positions), positions, attention_mask=attention_mask, state=state
        )
        return repeat_rows(self.decoder.head(hidden[:, -1]), state, expand_size)

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """The text's attention to the images' tokens, the mean of all heads and layers: (n q i gh gw).

        Of a picture that is cut into tiles, all of them are brought onto the grid of its whole view: i are pictures.

        Raises:
            ValueError: if the decoder's attention cannot be recorded, as that of a hub model.
        """
        with evaluation_mode(self), record_attention(self.decoder, keep=lambda name: name.endswith(".attn")) as record:
            self.hidden_states(batch)
        weights, place = mean_weights(record.values()), batch.tokens == self.image_token_id
        (rows, columns), pictures = self.token_grid(batch), None
        if self.newline is None:
            shape = batch.visual.shape[:2]
            real = weights.new_ones(shape, dtype=torch.bool) if batch.image_mask is None else batch.image_mask
        else:
            real, pictures = batch.image_sizes.any(-1), self.image_tiles(batch)  # type: ignore[attr-defined]
        maps = weights.new_zeros(*weights.shape[:2], real.shape[1], rows, columns)
        for i, (seen, at) in enumerate(zip(weights, place, strict=True)):
            sample, seen = i * len(real) // len(weights), seen[:, at]
            if pictures is None:
                found = seen.unflatten(1, (int(real[sample].sum()), -1))[..., -rows * columns :]
                found = found.unflatten(2, (rows, columns))
            else:
                lengths = [self.tiles.num_tokens(*p, (rows, columns)) for p in pictures[sample]]
                parts = zip(seen.split(lengths, 1), pictures[sample], strict=True)
                found = torch.stack([self.tiles.on_grid(x, *p, (rows, columns)) for x, p in parts], 1)
            maps[i, :, real[sample]] = found
        s = self.projector.pixel_shuffle
        return repeat(maps / s**2, "n q i gh gw -> n q i (gh s1) (gw s2)", s1=s, s2=s)
