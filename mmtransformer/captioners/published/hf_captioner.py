"""HFCaptioner: any image-text-to-text model of transformers behind the methods of a captioner.

Shapes: n rows of text, one a sample.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from PIL.Image import Image
from torch import Tensor, nn

from mmtransformer.backbones.base import repeat_rows
from mmtransformer.batch import CaptionBatch
from mmtransformer.captioners.base import Captioner

_VISION = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder", "vision_backbone",
           "image_tower", "video_tower", "vqmodel", "vision_embed_tokens", "encoder")  # fmt: skip
_TEXT = ("language_model", "text_model", "decoder", "lm_head", "embed_tokens", "layers")
_CONNECTORS = ("projector", "connector", "merger", "image_to_text", "resampler", "abstractor", "aligner")
_NO_LENGTH = 2048


@dataclass
class HFBatch(CaptionBatch):
    """Pictures as they are, and what transformers' processor makes of them and their prompts.

    Attributes:
        images: the b samples' pictures.
        given: what the model reads, by the names that it has there.
        beside: the names of those that have something for each token of the rows.
    """

    images: tuple[Image, ...] = ()
    given: dict[str, Tensor] = field(default_factory=dict)
    beside: tuple[str, ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The batch with its tensors on another device."""
        given = {name: x.to(device, non_blocking=non_blocking) for name, x in self.given.items()}
        return replace(super().to(device, non_blocking), given=given)

    def pin_memory(self) -> Self:
        """The batch with its tensors in page-locked memory."""
        return replace(super().pin_memory(), given={name: x.pin_memory() for name, x in self.given.items()})


class HFState:
    """What decoding remembers: what transformers' own `generate` hands from step to step.

    Args:
        model: the model that writes, which may be a part of the whole.
        tokens: (n q) so far.
        kept: arguments of the next step: cache, masks, positions.
    """

    def __init__(self, model: Any, tokens: Tensor, kept: dict[str, Any]) -> None:
        self.model, self.tokens, self.kept = model, tokens, kept

    def reorder(self, rows: Tensor) -> None:
        """Keeps the given rows, in their order."""
        n = len(self.tokens)
        self.tokens = self.tokens[rows]
        for name, value in self.kept.items():
            if name == "position_ids" and isinstance(value, Tensor) and value.ndim == 3:  # (axes n q)
                self.kept[name] = value.index_select(1, rows)
            elif (reorder := getattr(value, "reorder_cache", None)) is not None:
                reorder(rows)
            else:
                self.kept[name] = _reordered(value, rows, n)


def _reordered(value: Any, rows: Tensor, n: int) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(0, rows) if value.ndim and len(value) == n else value
    if isinstance(value, dict):  # transformers' outputs are dicts too
        for key, inner in list(value.items()):
            value[key] = _reordered(inner, rows, n)
    return value


class HFCaptioner(Captioner):
    """A model of transformers that reads pictures and writes text, where no captioner here holds its family.

    Pixels, prompts and every step of decoding are transformers' own; the search, batches, scores and training are those
    of this library. It has no heat maps.

    Args:
        model: the model; it is taken over, not copied.

    Raises:
        ValueError: if it is no model that writes text.
    """

    def __init__(self, model: Any) -> None:
        nn.Module.__init__(self)
        if not callable(getattr(model, "generate", None)) or model.get_input_embeddings() is None:
            raise ValueError(f"transformers' {type(model).__name__} writes no text")
        self.model: Any = model
        self.freeze_vision = self.train_vision_norm = False
        config = model.config
        self.seq2seq = bool(config.is_encoder_decoder)
        text: Any = config.get_text_config(decoder=True)
        length = getattr(text, "max_position_embeddings", None)
        self._max_len = length if isinstance(length, int) and length > 0 else _NO_LENGTH
        self._reads = set(inspect.signature(model.forward).parameters)

    @property
    def vision(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The vision encoder."""
        return self._named(_VISION) or nn.Module()

    @property
    def decoder(self) -> nn.Module:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The language model."""
        names = ("language_model", "decoder") if self.seq2seq else _TEXT[:2]
        return self._named(names) or self.model.get_decoder()

    def _named(self, names: tuple[str, ...]) -> nn.Module | None:
        parts = dict(self.model.named_modules())
        return next((part for name in names for path, part in parts.items() if path.split(".")[-1] == name), None)

    def part_of(self, name: str) -> str:
        """The part that a parameter belongs to: "vision", "connector" or "decoder"; see `weights.adapters.part_of`."""
        words = name.split(".")
        if any(key in word for word in words for key in _CONNECTORS):
            return "connector"
        if any(word in _VISION[:-1] for word in words) or words[1] == _VISION[-1]:
            return "vision"
        return "decoder" if any(word in _TEXT for word in words) else "connector"

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the head scores."""
        head = self.model.get_output_embeddings()
        return (self.model.get_input_embeddings() if head is None else head).weight.shape[0]

    @property
    def max_len(self) -> int:
        """Most tokens of a row, prompt and image included."""
        return self._max_len

    def head(self, hidden: Tensor) -> Tensor:
        """Logits, which `hidden_states` has already."""
        return hidden

    def _given(self, batch: CaptionBatch) -> dict[str, Tensor]:
        given: dict[str, Tensor] = getattr(batch, "given", {})
        if not given:
            raise ValueError("an HFCaptioner reads what its processor makes of pictures and prompts: an HFBatch")
        return {name: x for name, x in given.items() if name in self._reads}

    def hidden_states(self, batch: CaptionBatch) -> Tensor:
        """The logits (n q v) of right-padded rows.

        Raises:
            ValueError: if there are several rows a sample.
        """
        given, (n, q) = self._given(batch), batch.tokens.shape
        if (b := len(batch.visual)) != n:
            raise ValueError(f"{n} rows of {b} pictures: an HFCaptioner reads one a picture (captions_per_image: 1)")
        real = batch.attention_mask.long()
        if self.seq2seq:
            with self._telling():
                return self.model(**given, decoder_input_ids=batch.tokens, decoder_attention_mask=real).logits
        for name in ("input_ids", "attention_mask"):
            given.pop(name, None)
        for name in given.keys() & {*getattr(batch, "beside", ())}:
            given[name] = given[name][:, :q]
        with self._telling():
            return self.model(input_ids=batch.tokens, attention_mask=real, use_cache=False, **given).logits

    def prefill(self, batch: CaptionBatch, *, expand_size: int = 1, max_new_tokens: int = 40) -> tuple[Tensor, HFState]:
        """Reads pictures and prompts once, as transformers' `generate` prepares them; see `Captioner.prefill`."""
        with self._telling():
            model, tokens, config, kept = self.model.generate(
                **self._given(batch), custom_generate=_prepared, max_new_tokens=max_new_tokens, num_beams=1,
                do_sample=False, use_cache=True, return_dict_in_generate=False, num_return_sequences=1, min_length=0,
            )  # fmt: skip
            logits = self._step(state := HFState(model, tokens, kept), model._prefill(tokens, config, kept))
        return repeat_rows(logits, state, expand_size)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """What transformers raises of inputs that do not fit, in one line.

        Raises:
            ValueError: instead of it.
        """
        try:
            yield
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and type(error) is not RuntimeError:  # memory, devices
                raise
            told = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ValueError(
                f"transformers' {type(self.model).__name__} cannot read what its processor makes of picture and "
                f"prompt: {told}; try the family's own prompt, and the processor's files of the model's own repository"
            ) from error

    def decode_step(self, tokens: Tensor, state: HFState) -> Tensor:
        """Adds a token to each row: (n) -> logits of the next (n v)."""
        state.tokens = torch.cat((state.tokens, tokens[:, None]), dim=1)
        given = state.model.prepare_inputs_for_generation(state.tokens, next_sequence_length=1, **state.kept)
        return self._step(state, state.model(**given, return_dict=True))

    @staticmethod
    def _step(state: HFState, outputs: Any) -> Tensor:
        model = state.model
        state.kept = model._update_model_kwargs_for_generation(
            outputs, state.kept, is_encoder_decoder=model.config.is_encoder_decoder
        )
        return outputs.logits[:, -1].float()

    @property
    def heatmap_error(self) -> str:
        """Always: transformers' models do not record where they look."""
        return f"there are no heat maps of a {type(self.model).__name__}, which runs in transformers"

    def attention_map(self, batch: CaptionBatch) -> Tensor:
        """None.

        Raises:
            ValueError: always; see `heatmap_error`.
        """
        raise ValueError(self.heatmap_error)

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for what is frozen."""
        nn.Module.train(self, mode)
        for part in self.model.modules():
            own = list(part.parameters())
            if own and not any(p.requires_grad for p in own):
                part.eval()
        return self


def _prepared(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kept: Any
) -> tuple[Any, Tensor, Any, dict[str, Any]]:
    """In the place of a search: what `generate` has made ready for one."""
    return model, input_ids, generation_config, kept
