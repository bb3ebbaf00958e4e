"""The peer of Flamingo: transformers' Idefics layers before those of a frozen GPT-2; and our bridge with its weights.

The layers are put in as OpenFlamingo does it: they run before the language model's own, and read latents and mask that
are parked on them. A word is generated with the language model's cache, while the layers project the latents' keys and
values again, as they must: their cache "is not implemented".
"""

import torch
import transformers
from torch import Tensor, nn
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from mmtransformer import Flamingo, GatedBlockConfig, PerceiverResampler, ViT
from mmtransformer.weights import from_transformers
from mmtransformer.weights.captioners.idefics import GATED, RESAMPLER
from mmtransformer.weights.shared.keys import fill

VISUAL, PATCHES, LATENTS, DEPTH, HEADS, HEAD_DIM = 768, 197, 64, 2, 16, 96


class PeerFlamingo(nn.Module):
    """GPT-2 small, frozen; a gated layer before each of its 12, and a resampler of 2 layers, both trained."""

    def __init__(self) -> None:
        super().__init__()
        perceiver = {"resampler_n_latents": LATENTS, "resampler_depth": DEPTH, "resampler_n_heads": HEADS}
        config = transformers.IdeficsConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, vision_config={"embed_dim": VISUAL},
            perceiver_config=perceiver | {"resampler_head_dim": HEAD_DIM},
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        text = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        self.lm = transformers.GPT2LMHeadModel(text).eval().requires_grad_(False)
        self.resampler = IdeficsPerceiverResampler(config, VISUAL, DEPTH, HEADS, HEAD_DIM, LATENTS)
        self.gated = nn.ModuleList(IdeficsGatedCrossAttentionLayer(config, layer_idx=i) for i in range(12))
        for layer in self.gated:  # Open, as after some training; shut gates give the towers below no gradient.
            layer.alpha_cross_attn.data.fill_(0.5)
            layer.alpha_dense.data.fill_(0.1)
        self.latents = torch.empty(0)
        for block, layer in zip(self.lm.transformer.h, self.gated, strict=True):
            block.register_forward_pre_hook(lambda _, args, layer=layer: (self.see(layer, args[0]), *args[1:]))

    def see(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What a gated layer adds; all tokens see all latents of their row."""
        open_ = x.new_zeros(len(x), 1, x.shape[1], self.latents.shape[1])
        gate = x.new_ones(x.shape[:2])
        return layer(x, image_hidden_states=self.latents, image_attention_mask=open_, cross_attention_gate=gate)

    def forward(self, tokens: Tensor, visual_tokens: Tensor) -> Tensor:
        """Logits of tokens (b q) that see their picture's visual tokens (b p d)."""
        self.latents = self.resampler(visual_tokens)
        return self.lm(tokens, use_cache=False).logits

    @torch.inference_mode()
    def generate(self, tokens: Tensor, visual_tokens: Tensor, new: int, beams: int) -> Tensor:
        """New ids, by transformers' generate; the resampler runs once."""
        self.latents = self.resampler(visual_tokens).repeat_interleave(beams, 0)
        out = self.lm.generate(
            tokens, max_new_tokens=new, min_new_tokens=new, num_beams=beams, do_sample=False, pad_token_id=0
        )
        return out[:, tokens.shape[1] :]


def ours_of(peer: PeerFlamingo) -> Flamingo:
    """Our Flamingo with the peer's very weights; its vision tower is never run."""
    resampler = PerceiverResampler(VISUAL, DEPTH, HEADS, HEAD_DIM, LATENTS, activation="relu")
    fill(resampler, RESAMPLER, peer.resampler.state_dict(), "the peer")
    model = Flamingo(
        ViT(16, 16, VISUAL, 1, 12),
        from_transformers(peer.lm),
        connector=resampler,
        gated=GatedBlockConfig(
            num_heads=12, activation="swiglu", mlp_dim=3072, norm="rms", norm_eps=1e-6, mlp_without_image=True
        ),
    )
    for ours, theirs in zip(model.gated_blocks, peer.gated, strict=True):
        fill(ours, GATED, theirs.state_dict(), "the peer")
    return model
