"""BLIP's models of image, question and text (Li et al., arXiv:2201.12086); its captioner is a `VisionEncoderDecoder`.

Shapes: n rows of text, r of each of the b samples, side by side; t tokens of a question, e width of the vectors that
are compared, gh gw rows and columns of patches.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmtransformer.backbones.base import DecoderState, repeat_rows
from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.backbones.encoder import TextEncoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.attribution import mean_weights, on_patches, through_latents
from mmtransformer.captioners.base import INSTRUCTION, Captioner
from mmtransformer.layers.cache import KeyValue
from mmtransformer.layers.linear import Linear
from mmtransformer.layers.modes import evaluation_mode
from mmtransformer.layers.record import record_attention
from mmtransformer.losses.contrastive import refuse_empty
from mmtransformer.serialization.pretrained import Pretrained


class BlipVQA(Captioner):
    """Answers: a question reads the image, and the answer's decoder reads the question (figure 5 of the paper).

    A row's question is its `instruction` (an `InstructBatch`), its text the answer.

    Args:
        vision: the vision encoder; its `forward_features` gives the visual tokens.
        question: the text encoder, whose `context_dim` is the vision encoder's dim.
        decoder: the text decoder, whose `context_dim` is the question encoder's dim.
        freeze_vision: see `Captioner`.

    Raises:
        ValueError: if the widths of the parts do not fit.
    """

    def __init__(
        self, vision: ViT, question: TextEncoder, decoder: TextDecoder, *, freeze_vision: bool = False
    ) -> None:
        super().__init__(vision, freeze_vision=freeze_vision)
        if question.context_dim != vision.dim or decoder.context_dim != question.dim:
            raise ValueError(
                f"the question encoder's context_dim ({question.context_dim}) must be the vision encoder's dim "
                f"({vision.dim}), and the decoder's ({decoder.context_dim}) the question encoder's ({question.dim})"
            )
        self.unsupported_fields = (*(name for name in self.unsupported_fields if name not in INSTRUCTION), "image_mask")
        self.question, self.decoder = question, decoder

    def read_questions(self, batch: CaptionBatch) -> tuple[Tensor, Tensor | None]:
        """The questions after they have read the images, (n t d), and which of their tokens are real; None = all.

        Raises:
            ValueError: if the batch has no questions.
        """
        tokens = getattr(batch, "instruction", None)
        if tokens is None:
            raise ValueError("a BlipVQA answers questions: the batch needs an instruction a row (an InstructBatch)")
        real = getattr(batch, "instruction_attention_mask", None)
        visual_tokens = self.visual_tokens(batch).to(self.question.tok_embed.weight.dtype)
        context = rearrange(visual_tokens, "b i p d -> b (i p) d")
        return self.question(tokens, context=context, attention_mask=real), real

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """Hidden states (n q d) of right-padded answers."""
        questions, real = self.read_questions(batch)
        return self.decoder(batch.tokens, questions, context_mask=real)

    def prefill(
        self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40
    ) -> tuple[Tensor, DecoderState]:
        """Reads images, questions and the left-padded beginnings of answers, once; see `Captioner.prefill`."""
        questions, real = self.read_questions(batch)
        state = self.decoder.new_state(batch.tokens.shape[1] + max_new_tokens)
        attention_mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
        hidden = self.decoder(batch.tokens, questions, attention_mask=attention_mask, context_mask=real, state=state)
        return repeat_rows(self.head(hidden[:, -1]), state, expand_size)

    @torch.no_grad()
    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """An answer's attention to the question's tokens times theirs to the patches, means of all: (n q i gh gw)."""
        with (
            evaluation_mode(self),
            record_attention(self.decoder, keep="cross_attn") as reads,
            record_attention(self.question, keep="cross_attn") as sees,
        ):
            self.hidden_states(batch)
        weights = through_latents(mean_weights(reads.values()), mean_weights(sees.values()))
        weights = rearrange(weights, "n q (i p) -> n q i p", i=batch.visual.shape[1])
        return on_patches(weights, self.grid(batch), self.vision.num_prefix_tokens)


class BlipITM(Pretrained, nn.Module):
    """Whether a text belongs to an image: matching, where it reads the image, and contrast, where it does not.

    Args:
        vision: the vision encoder; its `forward_features` gives the visual tokens.
        text: the text encoder, whose `context_dim` is the vision encoder's dim.
        embed_dim: width e of the vectors that are compared.

    Raises:
        ValueError: if the widths of the parts do not fit.
    """

    def __init__(self, vision: ViT, text: TextEncoder, *, embed_dim: int = 256) -> None:
        super().__init__()
        if text.context_dim != vision.dim:
            raise ValueError(
                f"the text encoder's context_dim ({text.context_dim}) must be the vision encoder's dim ({vision.dim})"
            )
        self.vision, self.text, self.embed_dim = vision, text, embed_dim
        self.itm_head = Linear(text.dim, 2)
        self.vision_proj = Linear(vision.dim, embed_dim)
        self.text_proj = Linear(text.dim, embed_dim)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """The visual tokens of images, not pooled: (b 3 height width) -> (b p d)."""
        return self.vision.forward_features(pixels)

    def match(self, visual: Tensor | list[KeyValue], tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Whether texts belong to the images beside them: logits (n 2), no and yes.

        Args:
            visual: of b images, b dividing n: visual tokens (b p d), or the text encoder's `project_context` of them.
            tokens: (n q) long, [CLS] first, padded on the right.
            attention_mask: (n q) bool, True = a real token; None = all are.
        """
        return self.itm_head(self.text(tokens, context=visual, attention_mask=attention_mask)[:, 0])

    def image_features(self, visual_tokens: Tensor) -> Tensor:
        """Visual tokens (b p d) -> (b e), of length 1: their products with texts are the similarities."""
        return F.normalize(self.vision_proj(visual_tokens[:, 0]), dim=-1)

    def encode_text(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Texts (n q), [CLS] first, padded on the right -> (n e), of length 1.

        Raises:
            ValueError: if a text has no token at all.
        """
        if attention_mask is not None:
            refuse_empty(attention_mask)
        return F.normalize(self.text_proj(self.text(tokens, attention_mask=attention_mask)[:, 0]), dim=-1)
