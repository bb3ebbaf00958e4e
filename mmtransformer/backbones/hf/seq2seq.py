"""HFSeq2Seq: an encoder-decoder of transformers (T5, Flan-T5, mT5) behind our `Transformer`'s methods (extra: hf).

Shapes: n rows of sources (n divides b), k source tokens, p embeddings in front of them.
"""

from typing import Any, Self

from torch import Tensor, nn

from mmtransformer.backbones.base import DecoderState
from mmtransformer.backbones.hf.decoder import HFCache
from mmtransformer.backbones.seq2seq import EncodedSource, TransformerState, join_prefix
from mmtransformer.batch.base import vocabulary_error
from mmtransformer.serialization.pretrained import Pretrained

_FAMILIES = ("t5", "mt5", "umt5")
_LENGTH = 2048  # T5's positions are relative: they name no length.


class HFSeq2Seq(Pretrained, nn.Module):
    """An encoder-decoder of transformers, as a language model of captioners.

    Args:
        config: what the model's config.json says, `model_type` included; weights are random until they are loaded.
        max_len: most tokens of a target.

    Raises:
        ValueError: if transformers is missing, or the family is not T5's.
    """

    def __init__(self, config: dict[str, Any], *, max_len: int = _LENGTH) -> None:
        super().__init__()
        try:
            from transformers import AutoConfig, AutoModelForSeq2SeqLM
        except ImportError as error:
            raise ValueError("HFSeq2Seq needs transformers: pip install transformers") from error
        family = config.get("model_type", "")
        if family not in _FAMILIES:
            raise ValueError(f'HFSeq2Seq holds {", ".join(_FAMILIES)}, not "{family}"')
        settings = {name: value for name, value in config.items() if name != "model_type"}
        self._adopt(AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **settings)).eval(), max_len)

    @classmethod
    def from_model(cls, model: nn.Module, *, max_len: int = _LENGTH) -> Self:
        """A language model around one that transformers has built; it is taken over, not copied.

        Raises:
            ValueError: if the family is not T5's.
        """
        config: Any = model.config
        if config.model_type not in _FAMILIES:
            raise ValueError(f'HFSeq2Seq holds {", ".join(_FAMILIES)}, not "{config.model_type}"')
        found = cls.__new__(cls)
        nn.Module.__init__(found)
        found._adopt(model, max_len)
        return found

    def _adopt(self, model: Any, max_len: int) -> None:
        self.model, self.config, self.max_len = model, model.config.to_dict(), max_len
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        self.dim: int = model.config.d_model
        self.training = model.training

    def encode(
        self,
        tokens: Tensor,
        *,
        attention_mask: Tensor | None = None,
        prefix_embeds: Tensor | None = None,
        prefix_attention_mask: Tensor | None = None,
    ) -> EncodedSource:
        """Reads sources (n k) long behind embeddings (n p d); see `Transformer.encode`.

        Positions are relative, so that what stands in front takes its place as tokens do.

        Returns:
            The encoder's tokens (n (p k) d), with their padding.
        """
        try:
            x = self.model.get_input_embeddings()(tokens)
        except IndexError as error:
            raise vocabulary_error(tokens, self.vocab_size) from error
        if prefix_embeds is not None:
            x, attention_mask = join_prefix(prefix_embeds, prefix_attention_mask, x, attention_mask)
        mask = None if attention_mask is None else attention_mask.long()
        return EncodedSource(
            self.model.get_encoder()(inputs_embeds=x, attention_mask=mask).last_hidden_state, attention_mask
        )

    def project(self, source: EncodedSource) -> EncodedSource:
        """The source as it is: transformers' cache projects it with the first token of a target, once."""
        return source

    def decode(self, tokens: Tensor, source: EncodedSource, *, state: DecoderState | None = None) -> Tensor:
        """Hidden states (b q d) of right-padded target tokens (b q) long; see `Transformer.decode`."""
        (context, attention_mask), b = source, len(tokens)
        if b % len(context):
            raise ValueError(f"rows of targets ({b}) must be a multiple of sources ({len(context)})")
        assert isinstance(context, Tensor)
        if attention_mask is not None:
            attention_mask = attention_mask.repeat_interleave(b // len(attention_mask), 0).long()
        try:
            return self.model.get_decoder()(
                input_ids=tokens,
                encoder_hidden_states=context.repeat_interleave(b // len(context), 0),
                encoder_attention_mask=attention_mask,
                past_key_values=None if state is None else state.caches[0].cache,  # pyright: ignore[reportAttributeAccessIssue]
                use_cache=state is not None,
            ).last_hidden_state
        except IndexError as error:
            raise vocabulary_error(tokens, self.vocab_size) from error

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the next target token: (... d) -> (... vocab_size)."""
        scaled = self.dim**-0.5 if self.model.config.scale_decoder_outputs else 1.0
        return self.model.lm_head(hidden * scaled)

    def new_state(self, max_len: int) -> DecoderState:
        """An empty state for decoding up to `max_len` tokens.

        Raises:
            ValueError: if that is more than this model's.
        """
        if max_len > self.max_len:
            raise ValueError(f"{max_len} tokens were asked for, but this model writes {self.max_len} at most")
        from transformers import DynamicCache, EncoderDecoderCache

        own, cross = (DynamicCache(config=self.model.config) for _ in range(2))
        return DecoderState(1, max_len, caches=[HFCache(EncoderDecoderCache(own, cross))])

    def decode_step(self, tokens: Tensor, state: TransformerState) -> Tensor:
        """Adds a token to each row: (b) -> logits of the next (b vocab_size)."""
        return self.head(self.decode(tokens[:, None], state.source, state=state.decoder)[:, 0])
