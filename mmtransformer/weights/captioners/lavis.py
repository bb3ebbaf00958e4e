"""LAVIS's BLIP-2 and InstructBLIP, of both stages -> `ImageText` and `Blip2`, and back.

Its files are pickles, which this library does not open: `torch.load(path, weights_only=True)["model"]` gives the
tensors without running what a file may bring along.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

from mmtransformer.backbones.base import Decoder
from mmtransformer.backbones.vit import ViT
from mmtransformer.captioners.blip2 import Blip2
from mmtransformer.captioners.image_text import ImageText
from mmtransformer.connectors.qformer import QFormer
from mmtransformer.serialization.pretrained import load_strictly
from mmtransformer.weights.captioners.qformer import LAVIS, qformer_table, under
from mmtransformer.weights.shared.keys import Row, convert, convert_back, layer

_PROJECTIONS = ("opt_proj", "llm_proj", "t5_proj")
_COPIES = ("Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias")
_BUFFERS = ("Qformer.bert.embeddings.position_ids",)
_PATCHES = "visual_encoder.patch_embed.proj.weight"
_WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
_POSITIONS = "Qformer.bert.embeddings.position_embeddings.weight"


def _vision_table(depth: int) -> list[Row]:
    """The tower's rows; query and value biases are handled beside it, for a key bias is not kept there."""
    rows = layer("visual_encoder.patch_embed.proj", "patch_embed.proj")
    for i in range(depth):
        theirs, ours = f"visual_encoder.blocks.{i}", f"blocks.{i}"
        rows += layer(f"{theirs}.norm1", f"{ours}.norm1") + layer(f"{theirs}.norm2", f"{ours}.norm2")
        rows += layer(f"{theirs}.attn.qkv", *(f"{ours}.attn.{name}_proj" for name in "qkv"), bias=False)
        rows += [Row(f"{theirs}.attn.{name}_bias", (f"{ours}.attn.{name}_proj.bias",)) for name in "qv"]
        rows += layer(f"{theirs}.attn.proj", f"{ours}.attn.out_proj")
        rows += layer(f"{theirs}.mlp.fc1", f"{ours}.mlp.fc1") + layer(f"{theirs}.mlp.fc2", f"{ours}.mlp.fc2")
    return rows + layer("ln_vision", "norm")


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
            raise ValueError(
                f"{context} has no tensor visual_encoder.{name}: give the vision tower beside it"
            )
    dim, channels, patch, _ = state[_PATCHES].shape
    token, positions = state.pop("visual_encoder.cls_token"), state.pop("visual_encoder.pos_embed")
    side = math.isqrt(positions.shape[1] - 1)
    vit = ViT(
        side * patch,
        patch,
        dim,
        _depth(state, r"visual_encoder\.blocks\.(\d+)\."),
        dim // 88 if num_heads is None else num_heads,
        mlp_dim=state["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        in_channels=channels,
    )
    flat = state | {
        "visual_encoder.patch_embed.proj.weight": state["visual_encoder.patch_embed.proj.weight"].flatten(1)
    }
    ours = convert(_vision_table(vit.depth), flat, context)
    ours |= {"prefix_tokens": token + positions[:, :1], "pos_embed": positions[:, 1:]}
    ours |= {f"blocks.{i}.attn.k_proj.bias": torch.zeros(dim) for i in range(vit.depth)}
    load_strictly(vit, ours, context)
    return vit.eval()


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
        cross_every=crossing[1] if len(crossing) > 1 else depth,
        mlp_dim=state[f"{LAVIS.layers}.0.{fc1}"].shape[0],
        vocab_size=None if words is None else words.shape[0],
        max_len=512 if positions is None else positions.shape[0],
    )


def image_text_from_lavis(
    state: dict[str, Tensor],
    *,
    vision: ViT | None = None,
    num_heads: int | None = None,
    class_id: int | None = 101,
    context: str = "the state dict",
) -> ImageText:
    """A stage-1 model of LAVIS as an `ImageText`, with its head for generation and its temperature.

    Args:
        state: its tensors by name (what its file has under "model").
        vision: the tower, where the file keeps none (LAVIS drops frozen ones); its last norm becomes `ln_vision`.
        num_heads: the Q-Former's heads; None = dim / 64.
        class_id: the id of [CLS]; 101 in bert-base-uncased. [DEC], with which a generated text begins, is its own id.
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
    model = ImageText(vision, qformer, embed_dim=dim, class_id=class_id, freeze_vision=True, train_norm=True)
    for copy, name in zip(_COPIES, (_WORDS, "Qformer.cls.predictions.bias"), strict=True):
        if copy in state and not torch.equal(state[copy], state[name]):
            raise ValueError(f"{context}: {copy} differs from {name}, to which ImageText ties it")
    temperature = state.pop("temp").reshape(())
    ours = convert(_stage1_table(model), state, context, ignored=_COPIES + _BUFFERS)
    ours |= {"log_temperature": temperature.float().log()}
    load_strictly(model, ours | {f"vision.{name}": t for name, t in vision.state_dict().items()}, context)
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
        raise ValueError(
            f"{context} has {len(found)} of {', '.join(_PROJECTIONS)}: a stage-2 model of LAVIS has one"
        )
    model = Blip2(vision, qformer, decoder, instruct=qformer.vocab_size is not None, train_norm=True)
    ours = convert(_stage2_table(model, found[0]), state, context, ignored=_BUFFERS)
    towers = {"vision": vision, "decoder": decoder}
    for tower, module in towers.items():
        ours |= {f"{tower}.{name}": tensor for name, tensor in module.state_dict().items()}
    load_strictly(model, ours, context)
    return model.eval()


def _split_vision(
    state: dict[str, Tensor], vision: ViT | None, context: str
) -> tuple[dict[str, Tensor], ViT]:
    rest = {name: t for name, t in state.items() if not name.startswith(("visual_encoder.", "ln_vision."))}
    if vision is None:
        return rest, vision_from_lavis(state, context=context)
    if any(name.startswith("visual_encoder.") for name in state):
        raise ValueError(f"{context} has a vision tower (visual_encoder), and another one was given")
    norm = {name.removeprefix("ln_vision."): t for name, t in state.items() if name.startswith("ln_vision.")}
    load_strictly(vision.norm, norm, f"{context}, ln_vision")
    return rest, vision


def _stage1_table(model: ImageText) -> list[Row]:
    rows = under("qformer", qformer_table(model.qformer, LAVIS))
    rows += (
        layer("vision_proj", "vision_proj") + layer("text_proj", "text_proj") + layer("itm_head", "itm_head")
    )
    rows += layer("Qformer.cls.predictions.transform.dense", "head_dense")
    rows += layer("Qformer.cls.predictions.transform.LayerNorm", "head_norm")
    return rows + [Row("Qformer.cls.predictions.bias", ("head_bias",))]


def _stage2_table(model: Blip2, projection: str) -> list[Row]:
    return under("qformer", qformer_table(model.qformer, LAVIS)) + layer(projection, "proj")


def to_lavis(model: ImageText | Blip2, *, projection: str | None = None) -> dict[str, Tensor]:
    """The tensors of a model by LAVIS's names, the vision tower's among them, the language model's not.

    A key bias of the vision tower has no name there: it shifts all scores of a query alike, so nothing changes without.

    Args:
        model: of stage 1 or stage 2.
        projection: LAVIS's name of a `Blip2`'s projection; None = "llm_proj" where it is instructed, else "opt_proj".

    Raises:
        ValueError: if the vision tower has parts that LAVIS's has not.
    """
    own: dict[str, Any] = dict(model.state_dict())
    vision = {name.removeprefix("vision."): t for name, t in own.items() if name.startswith("vision.")}
    token, positions = vision.pop("prefix_tokens", None), vision.pop("pos_embed")
    table = _vision_table(model.vision.depth)
    known = {name for row in table for name in row.target}
    extra = [name for name in vision if name not in known and not name.endswith("k_proj.bias")]
    if extra or token is None or token.shape[1] != 1 or model.vision.activation != "gelu":
        raise ValueError(
            f"LAVIS's EVA-ViT has one class token, gelu and no {', '.join(extra[:3]) or 'registers'}; this tower has "
            f"{model.vision.num_prefix_tokens} prefix tokens and {model.vision.activation}"
        )
    theirs = convert_back(table, vision)
    side = model.vision.patch_size
    theirs |= {
        _PATCHES: theirs[_PATCHES].unflatten(1, (-1, side, side)),
        "visual_encoder.cls_token": token,
        "visual_encoder.pos_embed": torch.cat((torch.zeros_like(token), positions), dim=1),
    }
    if isinstance(model, Blip2):
        name = projection or ("llm_proj" if model.instruct else "opt_proj")
        return theirs | convert_back(_stage2_table(model, name), own)
    theirs |= convert_back(_stage1_table(model), own) | {"temp": own["log_temperature"].exp()}
    return theirs | dict(zip(_COPIES, (theirs[_WORDS], theirs["Qformer.cls.predictions.bias"]), strict=True))
