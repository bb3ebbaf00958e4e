"""The peer of the captioner: transformers' VisionEncoderDecoder, and our captioner with its very weights."""

import torch
import transformers
from torch import Tensor, nn

from mmtransformer import CaptionBatch, LinearConnector, VisionEncoderDecoder, ViT, ViTBlockConfig
from mmtransformer.weights import from_transformers

VOCAB, IMAGE_TOKENS = 50257, 197


def make_peer(depth: int = 12) -> nn.Module:
    """ViT-Ti/16 and a GPT-2-small-shaped decoder with cross-attention, random weights, no dropout."""
    vision = transformers.ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
    text = transformers.GPT2Config(n_layer=depth, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id = config.pad_token_id = text.bos_token_id
    return transformers.VisionEncoderDecoderModel(config)


def make_ours(peer: nn.Module, *, folded: bool = False) -> VisionEncoderDecoder:
    """Our captioner with the peer's weights.

    Args:
        peer: from `make_peer`.
        folded: multiply the peer's projection into the keys' and values' weights, so that cross-attention reads the
            tower's own 192-wide tokens, as our captioners do; else the projection stays a layer, as the peer has it.
    """
    projection: Tensor = peer.enc_to_dec_proj.weight.data
    decoder = from_transformers(peer.decoder)
    vision = vision_of(peer.encoder)
    if not folded:
        connector = LinearConnector(projection.shape[1], projection.shape[0])
        connector.proj.load_state_dict(peer.enc_to_dec_proj.state_dict())
        return VisionEncoderDecoder(vision, decoder, connector=connector)
    for block in decoder.blocks:
        for layer in (block.cross_attn.k_proj, block.cross_attn.v_proj):
            layer.bias.data += layer.weight.data @ peer.enc_to_dec_proj.bias.data
            layer.weight = nn.Parameter(layer.weight.data @ projection)
            layer.in_features = projection.shape[1]
    decoder.context_dim = projection.shape[1]
    return VisionEncoderDecoder(vision, decoder)


def vision_of(encoder: nn.Module) -> ViT:
    """Our ViT with the weights of transformers' ViTModel."""
    vit = ViT(dim=192, num_heads=3, block=ViTBlockConfig(norm_eps=encoder.config.layer_norm_eps))
    theirs, ours = encoder.state_dict(), {}
    cls, positions = theirs["embeddings.cls_token"], theirs["embeddings.position_embeddings"]
    ours["prefix_tokens"], ours["pos_embed"] = cls + positions[:, :1], positions[:, 1:]
    patches = "embeddings.patch_embeddings.projection"
    ours["patch_embed.proj.weight"] = theirs[f"{patches}.weight"].flatten(1)
    ours["patch_embed.proj.bias"] = theirs[f"{patches}.bias"]
    names = {"layernorm_before": "norm1", "layernorm_after": "norm2", "attention": "attn", "o_proj": "out_proj"}
    for name, tensor in theirs.items():
        if name.startswith("layers."):
            for their_word, our_word in names.items():
                name = name.replace(their_word, our_word)
            ours[name.replace("layers.", "blocks.")] = tensor
        elif name.startswith("layernorm."):
            ours[name.replace("layernorm", "norm")] = tensor
    vit.load_state_dict(ours)
    return vit


def caption_batch(rows: int = 8, shortest: int = 9, longest: int = 21) -> CaptionBatch:
    """Random pictures and captions of random lengths, padded to the longest: begin, words, end."""
    lengths = torch.linspace(shortest, longest, rows).round().long()
    tokens = torch.randint(0, VOCAB - 1, (rows, longest))
    tokens[:, 0] = VOCAB - 1
    attention_mask = torch.arange(longest) < lengths[:, None]
    tokens[~attention_mask] = VOCAB - 1
    loss_mask = attention_mask.clone()
    loss_mask[:, 0] = False
    return CaptionBatch(tokens, attention_mask, loss_mask, pixels=torch.randn(rows, 1, 3, 224, 224))
