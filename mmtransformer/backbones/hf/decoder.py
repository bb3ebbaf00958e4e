"""HFDecoder: any causal language model of transformers behind the methods of our own decoders (extra: hf).

Nothing of the model is edited: `before_block` runs in forward pre-hooks on the list of its layers, which live for one
pass. So its weights keep their names, and without a hook it is the model, bit for bit.

Shapes: e width of an embedding, n rows of its table.
"""

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mmtransformer.backbones.base import Decoder, DecoderState
from mmtransformer.batch.base import vocabulary_error
from mmtransformer.layers.linear import linear
from mmtransformer.layers.masks import Mask
from mmtransformer.layers.modes import evaluation_mode
from mmtransformer.serialization.pretrained import CONFIG, Pretrained, read_json
from mmtransformer.serialization.untrusted import built_from, said
from mmtransformer.serialization.weight_files import shapes_in

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
_NO_LENGTH = 2048  # Models without a table of positions (ALiBi) name no length.


class HFCache:
    """A cache of transformers, as `DecoderState` wants it."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    @property
    def length(self) -> int:
        """Tokens so far."""
        return int(self.cache.get_seq_length())

    def reorder(self, rows: Tensor) -> None:
        """Keeps the given rows (b) long, in their order."""
        if self.length:
            self.cache.reorder_cache(rows)


class HFDecoder(Pretrained, Decoder):
    """A causal language model of transformers that `TextDecoder` cannot be: GPT-NeoX, BLOOM, Phi, Gemma, Falcon ...

    Args:
        config: what the model's config.json says, `model_type` included; weights are random until they are loaded.
        max_len: most tokens of a row; None = as the config says, or 2048 where it says nothing.

    Raises:
        ValueError: if transformers is missing, does not know the family, or its model is not built as this class needs.
    """

    def __init__(self, config: dict[str, Any], *, max_len: int | None = None) -> None:
        super().__init__()
        transformers = _transformers()
        _refuse_strangers(config, "the config")
        settings = {name: value for name, value in config.items() if name not in ("model_type", "auto_map")}
        try:
            built = transformers.AutoConfig.for_model(config.get("model_type", ""), **settings)
            model = transformers.AutoModelForCausalLM.from_config(built, trust_remote_code=False)
        except Exception as error:  # a config that makes no sense brings out almost any
            raise ValueError(
                f"transformers {transformers.__version__} cannot build a language model of the family "
                f'"{config.get("model_type")}": {said(error)}'
            ) from error
        self._adopt(model.eval(), max_len)

    @classmethod
    def from_model(cls, model: nn.Module, *, max_len: int | None = None) -> Self:
        """A decoder around a model that transformers has built; the model is taken over, not copied.

        Raises:
            ValueError: if the model is not built as this class needs.
        """
        decoder = cls.__new__(cls)
        nn.Module.__init__(decoder)
        decoder._adopt(model, max_len)
        return decoder

    @classmethod
    def from_folder(cls, folder: str | Path, *, max_len: int | None = None, reason: str = "") -> Self:
        """A model from a hub-style folder: safetensors only, every tensor used, none missing, no code from outside.

        Args:
            folder: config.json with model.safetensors or shards.
            max_len: as in the constructor.
            reason: why `TextDecoder` did not take it, for the error where transformers is missing.

        Raises:
            ValueError: if transformers is missing, or weights and model do not fit in every name and shape.
        """
        transformers = _transformers(reason)
        _refuse_strangers(read_json(Path(folder) / CONFIG), str(folder))
        if (other := Path(folder) / "adapter_config.json").exists():
            raise ValueError(f"{other}: an adapter of a model that is elsewhere; merge it into its model first")
        try:
            with built_from(shapes_in(Path(folder)), str(folder)):
                model, report = transformers.AutoModelForCausalLM.from_pretrained(
                    str(folder),
                    trust_remote_code=False,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                    dtype=torch.float32,
                )
        except Exception as error:
            raise ValueError(f"{folder}: transformers cannot load it: {said(error)}") from error
        faults = {name: sorted(map(str, found)) for name, found in report.items() if found}
        if faults:
            told = "; ".join(f"{name}: {', '.join(found[:5])} ({len(found)} in all)" for name, found in faults.items())
            raise ValueError(f"{folder} does not fit transformers' {type(model).__name__}; {told}")
        return cls.from_model(model.eval(), max_len=max_len)

    def _adopt(self, model: Any, max_len: int | None) -> None:
        name = type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False) or model.get_output_embeddings() is None:
            raise ValueError(f"transformers' {name} is not a causal language model with a head")
        self.model = model
        self.config: dict[str, Any] = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
        text: Any = model.config.get_text_config()
        lengths = [getattr(text, n) for n in _LENGTHS if isinstance(getattr(text, n, None), int)]
        self.max_len = max_len or (lengths[0] if lengths else _NO_LENGTH)
        self.vocab_size = model.get_input_embeddings().num_embeddings
        self.dim = text.hidden_size
        layers = self.layers
        self.depth = len(layers)
        if self.depth != text.num_hidden_layers:
            raise ValueError(
                f"transformers' {name} has {text.num_hidden_layers} layers by its config, but its largest list of "
                f"equal modules has {self.depth} of {type(layers[0]).__name__}"
            )
        self.takes_masks, self.training = True, model.training
        if not self.embedding_weights[0].is_meta:
            self._try()

    @torch.no_grad()
    def _try(self) -> None:
        """Passes of two tokens: the hook must run before every layer in turn, and our head must be the model's."""
        opened: list[int] = []
        tokens = torch.tensor([[0, 1]], device=self.embedding_weights[0].device)
        with evaluation_mode(self.model):
            want = self.model(input_ids=tokens, use_cache=False).logits
            found = self.head(self.forward(tokens, before_block=lambda i, x: opened.append(i) or x))
            self.takes_masks = self._isolates(tokens)
        name = type(self.model).__name__
        if opened != list(range(self.depth)):
            raise ValueError(f"transformers' {name} runs its {self.depth} layers in another order: {opened}")
        if not torch.equal(found, want):
            raise ValueError(
                f"the logits of transformers' {name} are not its head's of its last hidden states: off by "
                f"{(found - want).abs().max().item():.3g}"
            )

    def _isolates(self, tokens: Tensor) -> bool:
        """Whether a mask that lets each token see itself alone does so."""
        self.takes_masks = True
        alone = torch.eye(2, dtype=torch.bool, device=tokens.device)[None]
        try:
            both = self.forward(tokens, mask=alone)[0, 1], self.forward(tokens[:, [1, 1]], mask=alone)[0, 1]
            return torch.allclose(*both, rtol=1e-3, atol=1e-5)
        except (ValueError, RuntimeError, IndexError):
            return False

    @property
    def layers(self) -> nn.ModuleList:
        """The model's blocks: the list of modules of one class that holds the most parameters."""
        lists = [
            found
            for found in self.model.modules()
            if isinstance(found, nn.ModuleList) and len({type(layer) for layer in found}) == 1
        ]
        if not lists:
            raise ValueError(f"transformers' {type(self.model).__name__} has no list of equal layers")
        return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))

    @property
    def embedding_weights(self) -> tuple[Tensor, Tensor]:
        """The weights of the embedding and of the head, each (vocab_size e): the same tensor where they are tied."""
        return self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight

    @property
    def embedding_scale(self) -> float:
        """What some embeddings do to their rows (Gemma 3)."""
        return float(getattr(self.model.get_input_embeddings(), "embed_scale", 1.0))

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """The embeddings of tokens (b q), as the model's table gives them: (b q e)."""
        try:
            return self.model.get_input_embeddings()(tokens)
        except IndexError as error:
            raise vocabulary_error(tokens, self.vocab_size) from error

    def add_positions(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """The embeddings as they are: the model adds or turns its positions itself, in `forward_embeds`."""
        return x

    def forward_embeds(
        self,
        x: Tensor,
        position_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        mask: Mask | None = None,
        state: DecoderState | None = None,
        before_block: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """As `forward`, from embeddings (b q e): for captioners with other tokens in front.

        Raises:
            ValueError: for a mask that is not a tensor (b q k).
        """
        rows, count = x.shape[:2]
        base = self.model.base_model
        if base is self.model:  # Llama 4's is called as that of its whole, multimodal model.
            layers = self.layers
            base = next(m for m in self.model.modules() if any(child is layers for child in m.children()))
        given: dict[str, Any] = {"use_cache": state is not None}
        if state is not None:
            state.advance(rows, position_ids, attention_mask)
            attention_mask = state.attention_mask
            given["past_key_values"] = state.caches[0].cache  # pyright: ignore[reportAttributeAccessIssue]
        if "position_ids" in inspect.signature(base.forward).parameters:
            given["position_ids"] = position_ids.expand(rows, count)
        total = count if state is None else state.length
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise ValueError(f"an HFDecoder takes masks as bool tensors (b q k) only, not {mask!r:.50}")
            if not self.takes_masks:
                raise ValueError(
                    f"transformers' {type(self.model).__name__} ignores masks (b q k), or cannot take them"
                )
            window = getattr(self.model.config.get_text_config(), "sliding_window", None)
            if window and total > window:
                raise ValueError(
                    f"rows of {total} tokens with a mask are longer than the window of {window} in layers of "
                    f"transformers' {type(self.model).__name__}, which a mask would undo"
                )
            hidden = ~mask.expand(rows, count, total)[:, None]
            # Added to the scores, as some families do themselves; a bool would be added there as 0 and 1.
            given["attention_mask"] = x.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(x.dtype).min)
        else:
            given["attention_mask"] = None if attention_mask is None else attention_mask.long()
        with ExitStack() as hooks:
            if before_block is not None:
                for i, layer in enumerate(self.layers):
                    hook = partial(_run_hook, i, before_block)
                    hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            try:
                return base(inputs_embeds=x, **given).last_hidden_state
            except RuntimeError as error:
                if "input_ids" not in str(error):
                    raise
                raise ValueError(
                    f"the {self.model.config.model_type} family reads token ids in every layer, not embeddings alone, "
                    "so nothing but words can stand in its text: take another language model behind images"
                ) from error

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the next token: (... d) -> (... vocab_size)."""
        return self._finish(self.model.get_output_embeddings()(hidden))

    def logits(self, hidden: Tensor, table: Tensor) -> Tensor:
        """Logits of other tokens, whose rows of the head are given: (... d), (n e) -> (... n)."""
        return self._finish(linear(hidden, table))

    def _finish(self, logits: Tensor) -> Tensor:
        """What some families do to their head's result (Cohere, Granite, Gemma 2)."""
        config = self.model.config.get_text_config()
        if scale := getattr(config, "logit_scale", None):
            logits = logits * scale
        if scale := getattr(config, "logits_scaling", None):
            logits = logits / scale
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def new_state(self, max_len: int | None = None) -> DecoderState:
        """An empty state for decoding up to `max_len` tokens.

        Raises:
            ValueError: if the model has fewer positions, or keeps a state instead of a cache.
        """
        from transformers import DynamicCache

        own = vars(sys.modules[type(self.model).__module__]).values()
        if special := [
            x.__name__ for x in own if isinstance(x, type) and issubclass(x, DynamicCache) and x is not DynamicCache
        ]:
            raise ValueError(
                f"the {self.model.config.model_type} family keeps a cache of its own ({special[0]}), which HFDecoder "
                "cannot hold: it runs without one only"
            )
        cache, max_len = DynamicCache(config=self.model.config), super().new_state(max_len).max_len
        try:
            cache.get_seq_length()
        except ValueError as error:
            raise ValueError(
                f"the {self.model.config.model_type} family keeps a state instead of a cache, which HFDecoder cannot "
                "hold: it runs without one only"
            ) from error
        return DecoderState(self.depth, max_len, caches=[HFCache(cache)])


def _refuse_strangers(config: Any, where: str) -> None:
    """Kernels by the name of a hub's repository are code from outside: transformers would fetch and run it."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if str(key).endswith("_implementation") and "/" in str(value):
            raise ValueError(f"{where}: {key} is {value!r:.80}, code from outside; no such code is run")
        _refuse_strangers(value, where)


def _run_hook(
    i: int, before_block: Callable[[int, Tensor], Tensor], layer: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (before_block(i, args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": before_block(i, kwargs["hidden_states"])}


def _transformers(reason: str = "") -> Any:
    try:
        import transformers
    except ImportError as error:
        why = f"{reason}. " if reason else ""
        raise ValueError(f"{why}This needs transformers: pip install transformers") from error
    return transformers
