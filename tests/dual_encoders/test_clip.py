"""`CLIP`: its loss beside its definition and transformers', in one and in two processes, and what it refuses."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from mmtransformer import CLIP, CaptionBatch, TextEncoder, TextEncoderTower, TextTower, ViT, ViTOutputConfig
from mmtransformer.losses.contrastive import text_keys
from mmtransformer.weights import load_clip, save_clip

VISION = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 14, "patch_size": 7}  # fmt: skip
TEXT = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 19, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 11, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip


def model(loss: str = "softmax", *, hardness: float = 0.0, text: Any = None, **more: Any) -> CLIP:
    torch.manual_seed(4)
    vision = ViT(14, 7, 24, 2, 4, output=ViTOutputConfig("pooled"))
    text = text or TextTower(53, 20, 2, 2, max_len=11)
    made = CLIP(vision, text, embed_dim=13, loss=loss, hardness=hardness, **more)  # type: ignore[arg-type]
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.double()


def batch(names: tuple[str, ...] = ("a", "b", "a", "c", "d"), texts: int = 2, prompt: int = 2) -> CaptionBatch:
    """Five pictures, one of them twice, with two texts each; two have one text in common; the last is filler."""
    torch.manual_seed(5)
    b, q = len(names), 9
    tokens = torch.randint(5, 53, (b * texts, q))
    lengths = torch.randint(5, q + 1, (b * texts,))
    tokens[7], lengths[7] = tokens[2], lengths[2]  # a text of d's and one of b's
    tokens[:, 0], tokens[:, 1:prompt] = 2, 4
    attention_mask = torch.arange(q) < lengths[:, None]
    loss_mask = attention_mask & (torch.arange(q) >= prompt)
    loss_mask[-texts:] = False
    pixels = torch.randn(b, 3, 14, 14, dtype=torch.float64)
    return CaptionBatch(tokens, attention_mask, loss_mask, pixels, names=names)


def by_hand(clip: CLIP, of: CaptionBatch, hardness: float) -> float:
    """The definition, a pair at a time."""
    images = [clip.encode_image(x[None])[0] for x in of.pixels[:, 0]]  # type: ignore[index]
    rows = []
    for ids, real in zip(of.tokens.tolist(), of.loss_mask.tolist(), strict=True):
        rows.append((ids[0], *(i for i, r in zip(ids, real, strict=True) if r)))
    texts = [clip.encode_text(torch.tensor([row]))[0] for row in rows]
    each = len(rows) // len(images)
    real = [i for i in range(len(images)) if of.loss_mask[i * each : (i + 1) * each].any()]
    words = [j for j in range(len(rows)) if j // each in real]

    def fits(i: int, j: int) -> bool:
        return of.names[i] == of.names[j // each] or rows[j] in rows[i * each : (i + 1) * each]

    scale = min(float(clip.logit_scale.exp()), 100.0 if clip.loss == "softmax" else math.inf)
    bias = 0.0 if clip.logit_bias is None else float(clip.logit_bias)
    z = {(i, j): scale * float(images[i] @ texts[j]) + bias for i in real for j in words}

    def weights(pairs: list[tuple[int, int]]) -> dict[tuple[int, int], float]:
        negatives = [p for p in pairs if not fits(*p)]
        total = sum(math.exp(hardness * z[p]) for p in negatives)
        return {p: len(negatives) * math.exp(hardness * z[p]) / total if p in negatives else 1.0 for p in pairs}

    if clip.loss == "sigmoid":
        loss = 0.0
        for i in real:
            weight = weights([(i, j) for j in words])
            for j in words:
                loss += weight[i, j] * math.log1p(math.exp(-z[i, j] if fits(i, j) else z[i, j]))
        return loss / len(words)

    def one_way(asked: list[list[tuple[int, int]]]) -> float:
        total = 0.0
        for pairs in asked:
            weight = weights(pairs)
            log_z = math.log(sum(weight[p] * math.exp(z[p]) for p in pairs))
            right = [p for p in pairs if fits(*p)]
            total -= sum(z[p] - log_z for p in right) / len(right)
        return total / len(asked)

    return (one_way([[(i, j) for j in words] for i in real]) + one_way([[(i, j) for i in real] for j in words])) / 2


@pytest.mark.parametrize("hardness", [0.0, 0.7])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@torch.no_grad()
def test_the_loss_is_its_definition(loss: str, hardness: float) -> None:
    clip, of = model(loss, hardness=hardness), batch()
    output = clip(of)
    assert output.loss.dtype == torch.float64
    assert float(output.loss) == pytest.approx(by_hand(clip, of, hardness), abs=1e-12)
    other = CaptionBatch(of.tokens, of.attention_mask, of.loss_mask, of.pixels, names=("a", "b", "e", "c", "d"))
    assert abs(float(clip(other).loss - output.loss)) > 1e-4  # Who stands there twice is not a negative of himself.
    other = copy.deepcopy(of)
    other.tokens[7, 3] += 1
    assert abs(float(clip(other).loss) - by_hand(clip, other, hardness)) < 1e-12


def test_what_multiplies_is_limited_in_a_softmax_only() -> None:
    for loss, most in (("softmax", 100.0), ("sigmoid", 150.0)):
        clip = model(loss)
        clip.logit_scale.data.fill_(math.log(150.0))
        assert clip.scale.item() == pytest.approx(most)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_loss_and_gradients_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs: Any
    if kind == "clip":
        theirs = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=13))
    else:
        theirs = SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT))
        theirs.logit_scale.data, theirs.logit_bias.data = torch.tensor([1.2]), torch.tensor([-2.5])
    for name, parameter in theirs.named_parameters():
        if "logit" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if kind == "clip":  # Here it is added into the class token, in float32.
        theirs.vision_model.embeddings.position_embedding.weight.data[0] = 0
    theirs.save_pretrained(tmp_path)
    ours, theirs = load_clip(tmp_path).double(), theirs.double()
    tokens = torch.randint(5, 53, (4, 11))
    lengths = torch.tensor([11, 5, 8, 4])
    tokens[:, 0], tokens[torch.arange(4), lengths - 1] = 2, 3
    attention_mask = torch.arange(11) < lengths[:, None]
    tokens = tokens.masked_fill(~attention_mask, 1)
    pixels = torch.randn(4, 3, 14, 14, dtype=torch.float64)
    mask = {} if kind == "siglip" else {"attention_mask": attention_mask.long()}
    expected = theirs(input_ids=tokens, pixel_values=pixels, **mask, return_loss=True)
    loss_mask = attention_mask.clone()
    loss_mask[:, 0] = kind == "siglip"
    loss = ours(CaptionBatch(tokens, attention_mask, loss_mask, pixels)).loss
    torch.testing.assert_close(loss, expected.loss, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(ours.encode_image(pixels), expected.image_embeds, atol=1e-12, rtol=1e-12)
    loss.backward()
    expected.loss.backward()
    for ours_name, theirs_name in (("text.tok_embed.weight", "text_model.embeddings.token_embedding.weight"),
                                   ("vision.patch_embed.proj.weight", "vision_model.embeddings.patch_embedding.weight"),
                                   ("logit_scale", "logit_scale")):  # fmt: skip
        mine = ours.get_parameter(ours_name).grad
        other = theirs.get_parameter(theirs_name).grad
        assert mine is not None
        torch.testing.assert_close(mine.flatten(), other.flatten(), atol=1e-12, rtol=1e-9)


# ---------------------------------------------------------------------------------------------- two processes


def gradients(clip: CLIP) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in clip.parameters()]


def share(rank: int, folder: str) -> None:
    """One process's part of the batch, of another width each: losses and gradients into a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        out = {}
        for loss in ("softmax", "sigmoid"):
            for hardness in (0.0, 0.7):
                clip, whole = model(loss, hardness=hardness), batch()
                mine = torch.tensor([[0], [1, 2, 3, 4]][rank])  # real texts: 2 and 6
                rows = (mine[:, None] * 2 + torch.arange(2)).flatten()
                width = 9 if rank else int(whole.attention_mask[rows].sum(1).max())
                tokens, attention_mask, loss_mask = (
                    x[rows, :width] for x in (whole.tokens, whole.attention_mask, whole.loss_mask)
                )
                names = tuple(whole.names[i] for i in mine)
                assert whole.pixels is not None
                found = clip(CaptionBatch(tokens, attention_mask, loss_mask, whole.pixels[mine], names=names)).loss
                found.backward()
                grads = gradients(clip)
                for grad in grads:  # what DDP does
                    dist.all_reduce(grad)
                out[loss, hardness] = (found.detach(), [grad / 2 for grad in grads])
        torch.save(out, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("fork")
    workers = [context.Process(target=share, args=(rank, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for loss, hardness in parts[0]:
        clip = model(loss, hardness=hardness)
        whole = clip(batch()).loss
        whole.backward()
        both = (parts[0][loss, hardness][0] + parts[1][loss, hardness][0]) / 2
        assert float((both - whole).detach().abs()) < 1e-13, (loss, hardness)
        for mine, together in zip(gradients(clip), parts[0][loss, hardness][1], strict=True):
            assert float((mine - together).abs().max()) < 1e-12, (loss, hardness)


# ------------------------------------------------------------------------------------------------- properties


def encoder(**options: Any) -> TextEncoder:
    return TextEncoder(53, 20, 2, 2, **{"max_len": 11, "dropout": 0.0, "num_types": 1} | options)


@pytest.mark.parametrize("pool", ["eos", "attention", "last", "projected", "pooled"])
@torch.no_grad()
def test_padding_changes_no_text(pool: str) -> None:
    text: TextTower | TextEncoderTower
    if pool in ("projected", "pooled"):
        text = TextEncoderTower(encoder(), embed_dim=17 if pool == "projected" else None)
    else:
        pad = 3 if pool == "last" else None
        text = TextTower(53, 20, 2, 2, max_len=11, causal=pool == "eos", pool=pool, pad_id=pad)  # type: ignore[arg-type]
    clip, of = model(text=text), batch()
    together = clip.encode_text(of.tokens, of.attention_mask)
    noise = torch.where(of.attention_mask, of.tokens, torch.randint(53, of.tokens.shape))
    torch.testing.assert_close(clip.encode_text(noise, of.attention_mask), together)
    for i, length in enumerate(of.attention_mask.sum(1).tolist()):
        alone = clip.encode_text(of.tokens[i : i + 1, :length])
        torch.testing.assert_close(alone[0], together[i], atol=1e-12, rtol=1e-12)
        shorter = clip.encode_text(of.tokens[i : i + 1, : length - 1])
        assert float((shorter[0] - together[i]).abs().max()) > 1e-3  # Every token counts.


@torch.no_grad()
def test_a_prompt_is_not_read_but_for_what_opens() -> None:
    clip, plain = model(), batch(prompt=1)
    tagged = batch(prompt=1)
    for name, value in (("tokens", 4), ("attention_mask", True), ("loss_mask", False)):
        x = getattr(tagged, name)
        setattr(tagged, name, torch.cat((x[:, :1], torch.full_like(x[:, :1], value), x[:, 1:]), 1))
    torch.testing.assert_close(clip(tagged).loss, clip(plain).loss)
    assert clip.text_inputs(tagged)[1].sum() == clip.text_inputs(plain)[1].sum()


@torch.no_grad()
def test_cached_tokens_are_pixels() -> None:
    clip, of = model(freeze_vision=True), batch()
    assert of.pixels is not None
    cached = CaptionBatch(
        of.tokens, of.attention_mask, of.loss_mask, None, clip.forward_features(of.pixels), names=of.names
    )
    torch.testing.assert_close(clip(cached).loss, clip(of).loss)
    clip.train()
    assert not clip.vision.training
    assert clip.text.training


@torch.no_grad()
def test_a_learned_pooling_reads_all_tokens(tmp_path: Path) -> None:
    clip, of = model(pool_heads=4, freeze_vision=True), batch()
    assert clip.image_pool is not None
    assert of.pixels is not None
    tokens = clip.vision.forward_features(of.pixels[:, 0])
    expected = F.normalize(clip.image_proj(clip.image_pool(tokens)[:, 0]), dim=-1)
    torch.testing.assert_close(clip.image_features(of), expected)
    assert any(p.requires_grad for p in clip.image_pool.parameters())
    assert "image_pool.queries" in clip.no_weight_decay()
    clip.float().save_pretrained(tmp_path)
    pixels = of.pixels[:, 0].float()
    torch.testing.assert_close(CLIP.from_pretrained(tmp_path).encode_image(pixels), clip.encode_image(pixels))
    with pytest.raises(ValueError, match="nothing like pool_heads=4"):
        save_clip(clip, tmp_path)


def test_text_keys_tell_texts_apart() -> None:
    tokens = torch.tensor([[5, 7, 9, 0], [5, 7, 9, 8], [5, 9, 7, 0], [7, 5, 9, 0], [5, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    keys = text_keys(tokens, mask)
    assert keys[0] == keys[1]
    assert len(set(keys.tolist())) == 4
    assert torch.equal(text_keys(F.pad(tokens, (0, 3)), F.pad(mask, (0, 3))), keys)


@torch.no_grad()
def test_a_bert_is_a_text_tower(tmp_path: Path) -> None:
    clip = model(text=TextEncoder(53, 20, 1, 2, max_len=11, dropout=0.0)).float()
    assert clip.encode_text(torch.tensor([[2, 8, 9, 3]])).shape == (1, 13)
    clip.save_pretrained(tmp_path)
    again = CLIP.from_pretrained(tmp_path)
    tokens = torch.tensor([[2, 8, 9, 3]])
    torch.testing.assert_close(again.encode_text(tokens), clip.eval().encode_text(tokens))


@pytest.mark.parametrize("width", [17, None])
def test_an_encoder_tower_is_its_definition(width: int | None, tmp_path: Path) -> None:
    clip, of = model(text=TextEncoderTower(encoder(mlm_head=True), embed_dim=width)), batch()
    tower, (tokens, mask) = clip.text, clip.text_inputs(of)
    assert isinstance(tower, TextEncoderTower)
    first = tower.encoder(tokens, attention_mask=mask)[:, 0]
    if width is None:
        assert tower.encoder.pool_proj is not None
        wanted = torch.tanh(first @ tower.encoder.pool_proj.weight.T + tower.encoder.pool_proj.bias)
    else:
        assert tower.norm is not None
        assert tower.proj is not None
        normed = F.layer_norm(first, (20,), tower.norm.weight, tower.norm.bias, eps=1e-12)
        wanted = normed @ tower.proj.weight.T + tower.proj.bias
    torch.testing.assert_close(tower(tokens, mask), wanted, atol=1e-12, rtol=1e-12)
    clip(of).loss.backward()
    learns = {name for name, p in clip.named_parameters() if p.requires_grad}
    assert learns == {name for name, p in clip.named_parameters() if p.grad is not None}
    assert ("text.encoder.pool_proj.weight" in learns) == (width is None)
    assert "text.encoder.mlm_proj.bias" not in learns
    clip.float().eval().save_pretrained(tmp_path)
    again = CLIP.from_pretrained(tmp_path)
    torch.testing.assert_close(again.encode_text(tokens, mask), clip.encode_text(tokens, mask))


@torch.no_grad()
def test_the_largest_id_stands_for_a_text() -> None:
    text = TextTower(53, 20, 2, 2, max_len=11, pool="argmax")
    clip, ids = model(text=text), torch.tensor([[2, 9, 40, 7, 3], [2, 30, 8, 52, 52]])
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    tower = clip.text
    assert isinstance(tower, TextTower)
    hidden = tower.forward_features(ids, real)
    torch.testing.assert_close(tower(ids, real), torch.stack([hidden[0, 2], hidden[1, 1]]))


# ------------------------------------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused() -> None:
    vision, text = ViT(14, 7, 24, 1, 4), TextTower(53, 20, 1, 2, max_len=11)
    with pytest.raises(ValueError, match='loss must be "softmax" or "sigmoid", not "hinge"'):
        CLIP(vision, text, loss="hinge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"hardness \(-1\) must be at least 0"):
        CLIP(vision, text, hardness=-1)
    with pytest.raises(ValueError, match="a classifier of 5 classes"):
        CLIP(ViT(14, 7, 24, 1, 4, num_classes=5), text)
    with pytest.raises(ValueError, match=r"pad_id \(None\) is what pool=\"last\" fills"):
        TextTower(53, 20, 1, 2, pool="last")
    with pytest.raises(
        ValueError, match="without an embed_dim the encoder's pooler is read: build it with pooler=True"
    ):
        TextEncoderTower(encoder(pooler=False))
    with pytest.raises(ValueError, match=r"pad_id \(99\) must be one of the 53 ids"):
        TextTower(53, 20, 1, 2, pool="last", pad_id=99)
    clip = CLIP(vision, text)
    with pytest.raises(ValueError, match="texts of 12 tokens, but this tower reads 11 at most"):
        clip.encode_text(torch.ones(1, 12, dtype=torch.long))
    with pytest.raises(ValueError, match="text 1 of 2 is empty"):
        clip.encode_text(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]]).bool())
    with pytest.raises(ValueError, match="vocabulary of 53"):
        clip.encode_text(torch.full((1, 3), 60))
    of = batch()
    of.pixels = torch.randn(5, 2, 3, 14, 14)
    with pytest.raises(ValueError, match="one image with its texts, and these samples have 2"):
        clip(of)
    of = batch()
    of.image_index = of.tokens
    with pytest.raises(ValueError, match="does not support the batch field image_index"):
        clip(of)
