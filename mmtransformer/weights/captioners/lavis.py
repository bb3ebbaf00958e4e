"""LAVIS's BLIP-2 and InstructBLIP, of both stages -> `Blip2QFormer` and `Blip2`, and back.

Its files are pickles, which this library does not open: `torch.load(path, weights_only=True)["model"]` gives the
tensors without running what a file may bring along.
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.patches import ViTPatchConfig
from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.blip2 import Blip2
from mmtransformer.captioners.blip2_qformer import Blip2QFormer
from mmtransformer.connectors.qformer import QFormer
from mmtransformer.serialization.pretrained import load_strictly
from mmtransformer.serialization.untrusted import built_from
from mmtransformer.weights.captioners.parts.qformer import LAVIS, qformer_keys
from mmtransformer.weights.shared.folders import read_state, write_folder
from mmtransformer.weights.shared.keys import export, fill, nested, part
from mmtransformer.weights.shared.vit import fill_vit, vit_tensors

_PROJECTIONS = ("opt_proj", "llm_proj", "t5_proj")
_COPIES = ("Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias")
_TOWERS = ("vision.", "decoder.")
_PATCHES = "visual_encoder.patch_embed.proj.weight"
_WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
_POSITIONS = "Qformer.bert.embeddings.position_embeddings.weight"


_TOWER = {  # A bias of keys has no name there: it shifts all scores of a query alike, so nothing changes without.
    "visual_encoder.patch_embed.proj": "patch_embed.proj",
    "visual_encoder.blocks.*.norm[1,2]": "blocks.*.norm[1,2]",
    "visual_encoder.blocks.*.attn.qkv.weight": "blocks.*.attn.[q,k,v]_proj.weight",
    "visual_encoder.blocks.*.attn.[q,v]_bias": "blocks.*.attn.[q,v]_proj.bias",
    "visual_encoder.blocks.*.attn.proj": "blocks.*.attn.out_proj",
    "visual_encoder.blocks.*.mlp.fc[1,2]": "blocks.*.mlp.fc[1,2]",
    "ln_vision": "norm",
}
_TOKEN, _TABLE = "visual_encoder.cls_token", "visual_encoder.pos_embed"
_KEYS = nested(qformer_keys(LAVIS), target="qformer.") | {
    "vision_proj": "vision_proj",
    "text_proj": "text_proj",
    "itm_head": "itm_head",
    "Qformer.cls.predictions.transform.[dense,LayerNorm]": "head_[dense,norm]",
    "Qformer.cls.predictions.bias": "head_bias",
}


def vision_from_lavis(
    state: dict[str, Tensor], *, num_heads: int | None = None, context: str = "the state dict"
) -> ViT:
    """LAVIS's EVA-ViT with its `ln_vision` as a `ViT`.

    LAVIS computes `ln_vision` with eps 1e-5, `ViT` all norms with 1e-6, as transformers does with the same weights.

    Args:
        state: LAVIS's tensors; only "visual_encoder. ..." and "ln_vision. ..." are read.
        num_heads: heads; None = dim / 88, as in EVA-ViT-g.
        context: what the tensors come from, for errors.

    Raises:
        ValueError: if the tower is missing, or is another one.
    """
    state = {name: t for name, t in state.items() if name.startswith(("visual_encoder.", "ln_vision."))}
    for name in ("patch_embed.proj.weight", "cls_token", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if f"visual_encoder.{name}" not in state:
            raise ValueError(f"{context} has no tensor visual_encoder.{name}: give the vision tower beside it")
    dim, channels, patch, _ = state[_PATCHES].shape
    side = math.isqrt(state[_TABLE].shape[1] - 1)
    vit = ViT(
        side * patch,
        patch,
        dim,
        _depth(state, r"visual_encoder\.blocks\.(\d+)\."),
        dim // 88 if num_heads is None else num_heads,
        mlp_dim=state["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        patches=ViTPatchConfig(channels),
    )
    keyless = {f"blocks.{i}.attn.k_proj.bias": torch.zeros(dim) for i in range(vit.depth)}
    return fill_vit(vit, _TOWER, state, context, positions=_TABLE, prefix=[_TOKEN], extra=keyless)


def _depth(state: dict[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1)


def _qformer_from(state: dict[str, Tensor], num_heads: int | None, context: str) -> QFormer:
    """An unfilled Q-Former of the shapes of LAVIS's tensors."""
    fc1, key = "intermediate_query.dense.weight", "crossattention.self.key.weight"
    for name in ("query_tokens", f"{LAVIS.layers}.0.{fc1}", f"{LAVIS.layers}.0.{key}"):
        if name not in state:
            raise ValueError(f"{context} has no tensor {name}, so it is not a BLIP-2 of LAVIS")
    _, queries, dim = state["query_tokens"].shape
    depth = _depth(state, LAVIS.layers.replace(".", r"\.") + r"\.(\d+)\.")
    crossing = [i for i in range(depth) if f"{LAVIS.layers}.{i}.{key}" in state]
    words, positions = state.get(_WORDS), state.get(_POSITIONS)
    return QFormer(
        queries,
        dim,
        depth,
        dim // 64 if num_heads is None else num_heads,
        state[f"{LAVIS.layers}.0.{key}"].shape[1],
        cross_attention_frequency=crossing[1] if len(crossing) > 1 else depth,
        mlp_dim=state[f"{LAVIS.layers}.0.{fc1}"].shape[0],
        vocab_size=None if words is None else words.shape[0],
        max_len=512 if positions is None else positions.shape[0],
    )


def blip2_qformer_from_lavis(
    state: dict[str, Tensor],
    *,
    vision: ViT | None = None,
    num_heads: int | None = None,
    cls_token_id: int | None = 101,
    context: str = "the state dict",
) -> Blip2QFormer:
    """A stage-1 model of LAVIS as a `Blip2QFormer`, with its head for generation and its temperature.

    Args:
        state: its tensors by name (what its file has under "model").
        vision: the tower, where the file keeps none (LAVIS drops frozen ones); its last norm becomes `ln_vision`.
        num_heads: the Q-Former's heads; None = dim / 64.
        cls_token_id: the id of [CLS]; 101 in bert-base-uncased. [DEC], with which a generated text begins, is its
            own id.
        context: what the tensors come from, for errors.

    Raises:
        ValueError: naming what is missing, left over or of another shape.
    """
    state, vision = _split_vision(state, vision, context)
    qformer = _qformer_from(state, num_heads, context)
    for name in ("vision_proj.weight", "temp"):
        if name not in state:
            raise ValueError(f"{context} has no tensor {name}, so it is not a stage-1 model of LAVIS")
    dim = state["vision_proj.weight"].shape[0]
    model = Blip2QFormer(
        vision, qformer, embed_dim=dim, cls_token_id=cls_token_id, freeze_vision=True, train_vision_norm=True
    )
    for copy, name in zip(_COPIES, (_WORDS, "Qformer.cls.predictions.bias"), strict=True):
        if copy in state and not torch.equal(state[copy], state[name]):
            raise ValueError(f"{context}: {copy} differs from {name}, to which Blip2QFormer ties it")
    temperature = {"log_temperature": state.pop("temp").reshape(()).float().log()}
    fill(model, _KEYS, state, context, ignored=_COPIES, kept=_TOWERS, extra=temperature)
    return model.eval()


def blip2_from_lavis(
    state: dict[str, Tensor],
    decoder: Decoder,
    *,
    vision: ViT | None = None,
    num_heads: int | None = None,
    context: str = "the state dict",
) -> Blip2:
    """A stage-2 model of LAVIS (OPT, or Vicuna with instructions) as a `Blip2`.

    Args:
        state: its tensors by name (what its file has under "model"); they do not hold the language model.
        decoder: the language model.
        vision: the tower, where the file keeps none (LAVIS drops frozen ones); its last norm becomes `ln_vision`.
        num_heads: the Q-Former's heads; None = dim / 64.
        context: what the tensors come from, for errors.

    Raises:
        ValueError: naming what is missing, left over or of another shape.
    """
    state, vision = _split_vision(state, vision, context)
    qformer = _qformer_from(state, num_heads, context)
    found = [name for name in _PROJECTIONS if f"{name}.weight" in state]
    if len(found) != 1:
        raise ValueError(f"{context} has {len(found)} of {', '.join(_PROJECTIONS)}: a stage-2 model of LAVIS has one")
    model = Blip2(vision, qformer, decoder, instruct=qformer.vocab_size is not None, train_vision_norm=True)
    fill(model, _KEYS | {found[0]: "proj"}, state, context, kept=_TOWERS)
    return model.eval()


def _split_vision(state: dict[str, Tensor], vision: ViT | None, context: str) -> tuple[dict[str, Tensor], ViT]:
    rest = {name: t for name, t in state.items() if not name.startswith(("visual_encoder.", "ln_vision."))}
    if vision is None:
        return rest, vision_from_lavis(state, context=context)
    if any(name.startswith("visual_encoder.") for name in state):
        raise ValueError(f"{context} has a vision tower (visual_encoder), and another one was given")
    norm = part(state, "ln_vision.")
    load_strictly(vision.norm, norm, f"{context}, ln_vision")
    return rest, vision


def to_lavis(model: Blip2QFormer | Blip2, *, projection: str | None = None) -> dict[str, Tensor]:
    """The tensors of a model by LAVIS's names, the vision tower's among them, the language model's not.

    A key bias of the vision tower has no name there, and changes nothing.

    Args:
        model: of stage 1 or stage 2.
        projection: LAVIS's name of a `Blip2`'s projection; None = "llm_proj" where it is instructed, else "opt_proj".

    Raises:
        ValueError: if the vision tower has parts that LAVIS's has not.
    """
    vision = model.vision
    if not vision.class_token or vision.num_registers or vision.block.activation != "gelu":
        raise ValueError(
            f"LAVIS's EVA-ViT has one class token and gelu; this tower has {vision.num_prefix_tokens} prefix tokens "
            f"and {vision.block.activation}"
        )
    keyless = tuple(f"blocks.{i}.attn.k_proj.bias" for i in range(vision.depth))
    tower = vit_tensors(vision, _TOWER, "LAVIS's EVA-ViT", positions=_TABLE, prefix=[_TOKEN], kept=keyless)
    if isinstance(model, Blip2):
        name = projection or ("llm_proj" if model.instruct else "opt_proj")
        return tower | export(model, _KEYS | {name: "proj"}, "LAVIS's stage 2", kept=_TOWERS)
    source = tower | export(model, _KEYS, "LAVIS's stage 1", kept=(*_TOWERS, "log_temperature"))
    copies = (source[_WORDS], source["Qformer.cls.predictions.bias"])
    return source | {"temp": model.log_temperature.detach().exp()} | dict(zip(_COPIES, copies, strict=True))


def load_lavis(
    source: str | Path,
    decoder: Decoder | None = None,
    *,
    vision: ViT | None = None,
    num_heads: int | None = None,
    cls_token_id: int | None = 101,
) -> Blip2QFormer | Blip2:
    """A model of LAVIS from a file or folder that `save_lavis` wrote, or one converted from a checkpoint.

    Args:
        source: a `.safetensors` file, a folder with `model.safetensors`, or the name of a hub's repository.
        decoder: the language model of stage 2; None = a model of stage 1.
        vision: see `blip2_qformer_from_lavis`, as all that follow.
        num_heads: the Q-Former's heads.
        cls_token_id: the id of [CLS]; stage 1.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    state, context = read_state(source)
    with built_from(state, context, filled=True):
        if decoder is None:
            return blip2_qformer_from_lavis(
                state, vision=vision, num_heads=num_heads, cls_token_id=cls_token_id, context=context
            )
        return blip2_from_lavis(state, decoder, vision=vision, num_heads=num_heads, context=context)


def save_lavis(model: Blip2QFormer | Blip2, folder: str | Path) -> None:
    """Writes a model by LAVIS's names as `model.safetensors`; `{"model": ...}` around them makes LAVIS's pickle.

    Raises:
        ValueError: as `to_lavis`, before anything is written.
    """
    write_folder(folder, {"model_type": "lavis"}, to_lavis(model))
