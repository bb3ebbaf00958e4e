"""Blip2QFormer: what BLIP-2's first stage trains (arXiv:2301.12597, section 3.2): a Q-Former between image and text.

One model with three heads on shared work: which text belongs to which image (contrastive), whether this text belongs
to this image (matching), and what to say of an image (generation), which makes it a captioner of its own.

Shapes: n rows of text, r of each of the b samples, side by side; e width of an embedding.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.backbones.base import DecoderState, repeat_rows
from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import CaptionBatch, ModelOutput, SumAndCount
from mmtransformer.captioners.attribution import mean_weights, on_patches, through_latents
from mmtransformer.captioners.base import Captioner, check_rows
from mmtransformer.connectors.qformer import QFormer, Visual
from mmtransformer.connectors.qformer_block import QFormerBlock
from mmtransformer.layers import masks
from mmtransformer.layers.cache import KeyValue
from mmtransformer.layers.linear import Linear, linear
from mmtransformer.layers.modes import evaluation_mode
from mmtransformer.layers.record import record_attention
from mmtransformer.losses.contrastive import compare, contrastive_loss, image_ids, itg_loss, itm_loss, refuse_empty
from mmtransformer.losses.distributed import all_gather_rows, world_size
from mmtransformer.losses.hard_negatives import HardPairs, hard_pairs

TERMS: tuple[str, ...] = ("itc", "itm", "itg", "itm_accuracy")
"""The terms of stage 1's `ModelOutput`: the three losses, and the share of matching's pairs that were told right."""


class Blip2QFormer(Captioner):
    """A vision encoder and a Q-Former with its text stream, for contrastive, matching and generation losses.

    Args:
        vision: the vision encoder; its `forward_features` gives the visual tokens.
        qformer: the Q-Former, built with a vocabulary.
        embed_dim: width e in which images and texts are compared.
        cls_token_id: the id that stands in place of a text's first one where the text is compared or matched (BERT's
            [CLS]; the first one, [DEC] in BLIP-2, then opens a generated text only); None = the first one does both.
        freeze_vision: see `Captioner`.
        train_vision_norm: see `Captioner`.
        init_temperature: the learned temperature of the contrastive loss at the start.

    Raises:
        ValueError: if the parts do not fit.
    """

    def __init__(
        self,
        vision: ViT,
        qformer: QFormer,
        *,
        embed_dim: int = 256,
        cls_token_id: int | None = None,
        freeze_vision: bool = False,
        train_vision_norm: bool = False,
        init_temperature: float = 0.07,
    ) -> None:
        super().__init__(vision, freeze_vision=freeze_vision, train_vision_norm=train_vision_norm)
        if qformer.vocab_size is None or qformer.tok_embed is None:
            raise ValueError("stage 1 needs a Q-Former with a text stream: build it with vocab_size")
        if qformer.visual_dim != vision.dim:
            raise ValueError(
                f"the Q-Former's visual_dim ({qformer.visual_dim}) must be the vision encoder's dim ({vision.dim})"
            )
        if cls_token_id is not None and not 0 <= cls_token_id < qformer.vocab_size:
            raise ValueError(f"cls_token_id ({cls_token_id}) must be one of the Q-Former's {qformer.vocab_size} ids")
        if init_temperature <= 0:
            raise ValueError(f"init_temperature ({init_temperature}) must be above 0")
        self.unsupported_fields = (*self.unsupported_fields, "image_mask")
        self.qformer, self.embed_dim, self.cls_token_id = qformer, embed_dim, cls_token_id
        self.init_temperature = init_temperature
        dim = qformer.dim
        self.vision_proj = Linear(dim, embed_dim)
        self.text_proj = Linear(dim, embed_dim)
        self.itm_head = Linear(dim, 2)
        # Its logarithm is learned: a step of any size leaves it above 0.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(init_temperature)))
        self.head_dense = Linear(dim, dim)
        self.head_norm = nn.LayerNorm(dim, eps=1e-12)
        self.head_bias = nn.Parameter(torch.zeros(qformer.vocab_size))
        for layer in (self.vision_proj, self.text_proj, self.itm_head, self.head_dense):
            nn.init.normal_(layer.weight, std=dim**-0.5)  # As `QFormer.init_weights`.
            nn.init.zeros_(layer.bias)
        if train_vision_norm:  # Of a vision encoder kept in bfloat16, too, it learns in the format of what else learns.
            vision.norm.to(qformer.query_tokens.dtype)

    # ------------------------------------------------------------------------------------------ the three heads

    @property
    def temperature(self) -> Tensor:
        """What similarities are divided by."""
        return self.log_temperature.exp()

    def project_queries(self, queries: Tensor) -> Tensor:
        """Queries after the image (n l d) -> (n l e), L2-normed: what texts are compared with."""
        return F.normalize(self.vision_proj(queries), dim=-1)

    def encode_text(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Texts (n q), padded on the right -> (n e), L2-normed.

        Raises:
            ValueError: if a text has no token at all.
        """
        refuse_empty(attention_mask)
        hidden = self.qformer.encode_text(self.with_cls_token(tokens), attention_mask)
        return F.normalize(self.text_proj(hidden[:, 0]), dim=-1)

    def match(self, visual: Visual, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Whether texts (n q) belong to the images beside them: (n 2), no and yes.

        Args:
            visual: of b images, b dividing n: visual tokens (b p d), or the Q-Former's `project_visual` of them.
            tokens: (n q) long, padded on the right.
            attention_mask: (n q) bool.
        """
        queries = self.qformer(visual, self.with_cls_token(tokens), attention_mask)
        return self.itm_head(queries.mean(1))  # The mean of all queries' logits.

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the next token, (... d) -> (... vocab): BERT's head on the tied embedding."""
        assert self.qformer.tok_embed is not None
        x = self.head_norm(F.gelu(self.head_dense(hidden)))
        return linear(x, self.qformer.tok_embed.weight, self.head_bias)

    def with_cls_token(self, tokens: Tensor) -> Tensor:
        """Texts (n q) as they are compared and matched."""
        if self.cls_token_id is None:
            return tokens
        return torch.cat((torch.full_like(tokens[:, :1], self.cls_token_id), tokens[:, 1:]), dim=1)

    # ------------------------------------------------------------------------------------------------- training

    def forward(
        self,
        batch: CaptionBatch,
        *,
        label_smoothing: float = 0.0,
        return_logits: bool = False,
        itc_smoothing: float = 0.0,
        num_match_texts: int | None = None,
        gather_grad: bool = True,
        seed: int = 0,
    ) -> ModelOutput:
        """The sum of the three losses of a batch, as BLIP-2 weighs them; each is a mean over the global batch.

        The images are projected once for all passes, and the query pass is shared by contrast and generation. Images
        of one name are the same one, in all processes; those without a predicted token take no part.

        Args:
            batch: images and right-padded texts.
            label_smoothing: of the generation loss; BLIP-2's 0.1.
            return_logits: whether to give generation's logits of every token.
            itc_smoothing: label smoothing of the contrastive loss; BLIP-2's 0.1.
            num_match_texts: how many of an image's r texts are matched, the first ones; None = all. Matching is most
                of a step's work.
            gather_grad: whether contrastive gradients reach the processes that candidates came from.
            seed: of the negatives that are drawn; they depend on it and on the names, not on how the batch is cut.

        Returns:
            The loss, with a count of 1, and the `TERMS`.

        Raises:
            ValueError: if a text is empty, or the texts cannot be shared out; or as `Captioner.forward`.
        """
        check_rows(self, batch)
        visual_tokens = self.context(batch)
        b, n = visual_tokens.shape[0], batch.tokens.shape[0]
        if not n:
            raise ValueError(f"{n} texts cannot be shared out among {b} images")
        r = n // b if num_match_texts is None else num_match_texts
        if not 1 <= r <= n // b:
            raise ValueError(f"num_match_texts ({r}) must be from 1 to the {n // b} texts of an image")
        visual = self.qformer.project_visual(visual_tokens)
        seen = self.qformer.encode_queries(visual)

        similarity = compare(
            self.project_queries(seen.queries),
            self.encode_text(batch.tokens, batch.attention_mask),
            image_ids(batch.names, batch.loss_mask),
            gather_grad=gather_grad,
        )
        itc = contrastive_loss(similarity, self.temperature, label_smoothing=itc_smoothing)

        pairs = hard_pairs(similarity, self.temperature, texts=r, seed=seed)
        logits, match, is_real = self._matches(batch, visual_tokens, visual, pairs)
        itm = itm_loss(logits, match, is_real)
        right = ((logits.detach().argmax(1) == match.long()) & is_real).sum() / is_real.sum().clamp(min=1)

        read = batch.truncate(batch.tokens.shape[1] - (not return_logits))  # The last token predicts nothing.
        hidden = self.qformer.encode_text(read.tokens, read.attention_mask, seen)
        itg = itg_loss(hidden, batch.tokens, batch.loss_mask, self.head, label_smoothing=label_smoothing)

        total = itc + itm + itg
        terms = dict(zip(TERMS, (itc.detach(), itm.detach(), itg.detach(), right), strict=True))
        one = torch.ones((), dtype=torch.long, device=total.device)
        return ModelOutput(SumAndCount(total, one), self.head(hidden) if return_logits else None, terms)

    def _matches(
        self, batch: CaptionBatch, visual_tokens: Tensor, visual: list[KeyValue], pairs: HardPairs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Matching of r texts an image (m = b r): logits (3m 2), whether they match, and whether they count.

        True pairs, each text with a hard other image, and each image with a hard other text.
        """
        tokens, attention_mask = batch.tokens, batch.attention_mask
        if world_size() == 1:
            other_images = [kv.select(pairs.images) for kv in visual]
            other_tokens, other_attention_mask = tokens[pairs.texts], attention_mask[pairs.texts]
        else:
            other_images = self.qformer.project_visual(all_gather_rows(visual_tokens)[pairs.images])
            longest = int(all_gather_rows(torch.tensor([tokens.shape[1]], device=tokens.device)).max())
            more = (0, longest - tokens.shape[1])
            tokens, attention_mask = F.pad(tokens, more), F.pad(attention_mask, more)
            other_tokens, other_attention_mask = (
                all_gather_rows(tokens)[pairs.texts],
                all_gather_rows(attention_mask.long()).bool()[pairs.texts],
            )
        tokens, attention_mask = tokens[pairs.rows], attention_mask[pairs.rows]

        def beside(own: Tensor, other: Tensor) -> Tensor:
            """An image's own texts, then as many others, so that they share its keys: (m q) twice -> (2m q)."""
            own, other = (x.unflatten(0, (len(visual_tokens), -1)) for x in (own, other))
            return torch.stack((own, other), dim=1).flatten(0, 2)

        logits = torch.cat(
            (
                self.match(visual, beside(tokens, other_tokens), beside(attention_mask, other_attention_mask)),
                self.match(other_images, tokens, attention_mask),
            )
        )
        real = pairs.real
        yes, no = torch.ones_like(real), torch.zeros_like(real)
        match = torch.cat((beside(yes, no), no))
        is_real = torch.cat((beside(real, real & pairs.has_text), real & pairs.has_image))
        return logits, match, is_real

    # ---------------------------------------------------------------------------------------------- a captioner

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the head scores."""
        return len(self.head_bias)

    @property
    def max_len(self) -> int:
        """Most text tokens of a row."""
        return self.qformer.max_len

    def context(self, batch: CaptionBatch) -> Tensor:
        """All visual tokens of a sample's images in a row: (b (i p) d)."""
        visual_tokens = self.visual_tokens(batch).to(self.vision_proj.weight.dtype)
        return rearrange(visual_tokens, "b i p d -> b (i p) d")

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states (n q d) of generation."""
        return self.qformer.encode_text(
            batch.tokens, batch.attention_mask, self.qformer.encode_queries(self.context(batch))
        )

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, DecoderState]:
        """Runs the query pass once and reads the left-padded prompts; see `Captioner.prefill`."""
        (n, q), l = batch.tokens.shape, self.qformer.num_queries
        if (length := q + max_new_tokens) > self.max_len:
            raise ValueError(f"{length} tokens were asked for, but this Q-Former has {self.max_len} positions")
        seen = self.qformer.encode_queries(self.context(batch))
        state = DecoderState(self.qformer.depth, l + length)
        for cache, memory in zip(state.caches, seen.memory, strict=True):
            # The first block's is one row for all images: it has not read them yet.
            rows = torch.arange(len(memory.k), device=memory.k.device).repeat_interleave(n // len(memory.k))
            cache.append(memory.select(rows))  # pyright: ignore[reportAttributeAccessIssue]  # A KVCache.
        state.length, state.next_positions = l, batch.tokens.new_zeros(n)
        return repeat_rows(self._append(batch.tokens, batch.attention_mask, state), state, expand_size)

    def decode_step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """Adds a token to each row: (n) -> logits of the next (n vocab)."""
        return self._append(tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.bool), state)

    def _append(self, tokens: Tensor, attention_mask: Tensor, state: DecoderState) -> Tensor:
        """Reads more tokens (n q): the logits after the last of them (n vocab)."""
        qformer, past, (n, q) = self.qformer, state.length, tokens.shape
        assert qformer.tok_embed is not None
        assert qformer.pos_embed is not None
        assert state.next_positions is not None
        positions = (state.next_positions[:, None] + attention_mask.long().cumsum(1) - 1).clamp(min=0)
        state.advance(n, positions, attention_mask)
        assert state.attention_mask is not None
        mask = state.attention_mask[:, None]
        if q > 1:
            mask = mask & masks.dense(masks.causal(past), 1, q, past + q, tokens.device)
        x = qformer.drop(qformer.norm(qformer.tok_embed(tokens) + qformer.pos_embed(positions)))
        for block, cache in zip(qformer.blocks, state.caches, strict=True):
            assert isinstance(block, QFormerBlock)
            kv = cache.append(block.attn.project_kv(x))  # pyright: ignore[reportAttributeAccessIssue]  # A KVCache.
            x = block.finish_text(block.attend(x, kv, mask))
        return self.head(x[:, -1])

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """Where each token looks, (n q i gh gw): its attention to the queries, the mean of heads and layers, times what
        they hold of the patches (`QFormer.attention_map`).
        """
        with evaluation_mode(self):
            with record_attention(self.qformer) as sees:
                seen = self.qformer.encode_queries(self.context(batch))
            with record_attention(self.qformer, keep=lambda name: name.endswith(".attn")) as reads:
                self.qformer.encode_text(batch.tokens, batch.attention_mask, seen)
        to_queries = mean_weights(reads.values())[..., : self.qformer.num_queries]
        weights = through_latents(to_queries, self.qformer.attention_map(sees))
        weights = rearrange(weights, "n q (i p) -> n q i p", i=batch.visual.shape[1])
        return on_patches(weights, self.grid(batch), self.vision.num_prefix_tokens)
