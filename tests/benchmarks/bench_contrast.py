"""A contrastive step: ViT-Ti/16 and a text tower of 4 blocks, 64 pairs, beside open_clip's, or else transformers'.

python tests/benchmarks/bench_contrast.py [--threads N] [--pairs N] [--only NAME]

The weights are the same. Captions are of 8 to 24 tokens, as people write them; open_clip's tokenizer fills each up to
the 77 places of its tower, which reads them all, so the peer's texts are of 77 tokens. In the last line ours are too.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from harness import compare, start
from torch import Tensor, nn

from mmtransformer import CLIP, CaptionBatch, TextTower, ViT, ViTOutputConfig, ViTPatchConfig
from mmtransformer.backbones.vit_blocks import ViTBlockConfig
from mmtransformer.weights import save_clip
from mmtransformer.weights.dual_encoders.open_clip import clip_to_open_clip

BATCH, PLACES, VOCAB = 64, 77, 49408


def model() -> CLIP:
    patches, block = ViTPatchConfig(bias=False, pre_norm=True), ViTBlockConfig("gelu", 1e-5)
    vit = ViT.preset("tiny", patches=patches, block=block, output=ViTOutputConfig("pooled"))
    return CLIP(vit, TextTower(VOCAB, 256, 4, 4, max_len=PLACES), embed_dim=256)


def open_clip_peer(ours: CLIP) -> tuple[nn.Module, Callable[[Any, Tensor, Tensor], Tensor]]:
    """open_clip's model with our weights, and its loss."""
    from open_clip.loss import ClipLoss  # pyright: ignore[reportMissingImports]
    from open_clip.model import CLIP as Theirs  # pyright: ignore[reportMissingImports]
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg  # pyright: ignore[reportMissingImports]

    config, tensors = clip_to_open_clip(ours)
    theirs = Theirs(config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"]))
    theirs.load_state_dict(tensors)
    loss = ClipLoss()
    return theirs, lambda m, pixels, tokens: loss(*m(pixels, tokens))


def transformers_peer(ours: CLIP) -> tuple[nn.Module, Callable[[Any, Tensor, Tensor], Tensor]]:
    from transformers import CLIPModel

    with tempfile.TemporaryDirectory() as folder:
        save_clip(ours, folder)
        theirs = CLIPModel.from_pretrained(folder)
    theirs.text_model.eos_token_id = VOCAB - 1
    return theirs.train(), lambda m, pixels, tokens: m(input_ids=tokens, pixel_values=pixels, return_loss=True).loss


def step(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], float]:
    """Forward, loss, backward and update; the optimizer is the same for both sides."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> float:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = loss()
        found.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(found.detach())

    return run


def main() -> None:
    args = start(__doc__ or "")
    has_open_clip = importlib.util.find_spec("open_clip") is not None
    print(f"the peer is {'open_clip' if has_open_clip else 'transformers'}")
    lengths = torch.randint(8, 25, (BATCH,))
    mask = torch.arange(PLACES) < lengths[:, None]
    tokens = torch.randint(1, VOCAB - 2, (BATCH, PLACES)).masked_fill(~mask, 0)
    tokens[:, 0], tokens[torch.arange(BATCH), lengths - 1] = VOCAB - 2, VOCAB - 1
    pixels, longest = torch.randn(BATCH, 3, 224, 224), int(lengths.max())
    targets = mask.clone()
    targets[:, 0] = False

    def line(name: str, dtype: torch.dtype, width: int, target: float | None) -> None:
        if args.only not in name:
            return
        ours = model()
        theirs, their_loss = (open_clip_peer if has_open_clip else transformers_peer)(ours)
        batch = CaptionBatch(tokens[:, :width], mask[:, :width], targets[:, :width], pixels)
        mine = step(ours.train(), lambda: ours(batch).loss, dtype)
        peer = step(theirs, lambda: their_loss(theirs, pixels, tokens), dtype)
        a, b = mine(), peer()
        assert abs(a - b) < (1e-4 if dtype == torch.float32 else 0.1), f"the losses differ: {a} and {b}"
        compare(name, mine, peer, target=target, pairs=args.pairs, unit=(BATCH, "pairs"))

    line("step bf16", torch.bfloat16, longest, 1.2)
    line("step fp32", torch.float32, longest, 1.2)
    line("step bf16, our texts of 77 too", torch.bfloat16, PLACES, None)


if __name__ == "__main__":
    main()
