"""Stage 1 as a task: what it learns from, what it leaves, what it refuses; and stage 2 from its folder."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from PIL import Image
from torch import Tensor

from mmtransformer import (
    Blip2,
    Blip2QFormer,
    CaptionBatch,
    CoCa,
    ImageCaptioner,
    ImageTransform,
    PositionConfig,
    QFormer,
    TextDecoder,
    ViT,
    blip2_from_stage1,
)
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.loading.features import FeatureCacheConfig
from mmtransformer.data.loading.hashing import hash64
from mmtransformer.data.loading.module import Splits
from mmtransformer.data.loading.source import Caption
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.losses.contrastive import image_ids
from mmtransformer.metrics.retrieval import recall_at_k
from mmtransformer.plots.gallery import GAP
from mmtransformer.plots.retrieval import MARK_INKS, WIDE, FoundImages, FoundTexts, plot_searches
from mmtransformer.training import Captioning, OptimConfig, QFormerStage1, Run
from mmtransformer.training.evaluation.retrieval import evaluate_retrieval
from mmtransformer.weights import load_qformer_from_bert

VOCAB = 420


@pytest.fixture(autouse=True)
def lightning_is_quiet() -> None:
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    for message in (".*LeafSpec.*", ".*in eval mode.*"):
        warnings.filterwarnings("ignore", message=message)


def model(**options: Any) -> Blip2QFormer:
    torch.manual_seed(3)
    qformer = QFormer(3, 24, 2, 3, 24, vocab_size=VOCAB + 1, max_len=80, dropout=0.0)
    vision = ViT(32, 8, 24, 1, 3, class_token=False, pool="mean")
    return Blip2QFormer(vision, qformer, embed_dim=11, cls_token_id=VOCAB, **options)


def scenes(source: Any = None, **arguments: Any) -> CaptionData:
    source = source or Scenes(image_size=32, train_size=11, val_size=5, compositional_size=3)
    arguments = {
        "vocab_size": VOCAB,
        "max_len": 80,
        "splits": Splits(val=["val", "compositional"]),
        "batch_size": 4,
    } | arguments
    return CaptionData(source, transform=ImageTransform(32), **arguments)


def trainer(folder: Path, **arguments: Any) -> pl.Trainer:
    arguments = {"max_steps": 2, "max_epochs": 1, "enable_progress_bar": False} | arguments
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **arguments,
    )


# -------------------------------------------------------------------------------------------------- what it learns


def gradients(tmp_path: Path, batches: list[CaptionBatch], accumulate: int) -> list[Tensor]:
    """What the optimizer gets to see at its first step."""
    module = QFormerStage1(model().double(), optim=OptimConfig(warmup_steps=0), num_match_texts=1)
    seen: list[Tensor] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
            seen.extend(p.grad.clone() for p in pl_module.parameters() if p.grad is not None)

    run = trainer(tmp_path, accumulate_grad_batches=accumulate, precision="64-true", max_steps=1, callbacks=[Look()])
    run.fit(module, train_dataloaders=torch.utils.data.DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert module.tokens_seen == sum(int(b.loss_mask.sum()) for b in batches)
    return seen[-sum(1 for p in module.parameters() if p.grad is not None) :]


def test_gradient_is_that_of_the_mean_of_the_sums(tmp_path: Path) -> None:
    data = scenes(captions_per_image=2)
    first, second = (
        replace(b, pixels=b.pixels.double()) for b, _ in zip(data.loader("train", training=True), "ab", strict=False)
    )
    found = gradients(tmp_path, [first, second], 2)
    m = model().double()
    parts = []
    for micro, b in enumerate((first, second)):
        seed = int(hash64(0, 0, micro)) >> 2
        parts.append(m(b, label_smoothing=0.1, itc_smoothing=0.1, seed=seed, num_match_texts=1).loss)
    (sum(parts) / 2).backward()  # type: ignore[operator]
    expected = [p.grad for p in m.parameters() if p.grad is not None]
    assert len(found) == len(expected) > 20
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-14


def test_images_have_ids_of_their_own() -> None:
    tokens = torch.ones(6, 3).long()
    loss_mask = torch.tensor([1, 1, 1, 0, 0, 0]).bool()[:, None].expand(6, 3)
    given = CaptionBatch(tokens, tokens > 0, loss_mask, names=("a", "b", "a"))
    ids = image_ids(given.names, given.loss_mask)
    assert ids is not None
    assert ids[0] > 0
    assert ids[1] > 0
    assert ids[0] != ids[1]
    assert ids[2] == -1  # none of its texts counts
    same = image_ids(given.names, torch.ones_like(loss_mask))
    assert same is not None
    assert same[2] == same[0] == ids[0]
    assert image_ids((), given.loss_mask) is None


def test_it_learns_to_find() -> None:
    """Sixteen pictures by heart: with 0.02 for all weights of a narrow Q-Former this is still at chance, log 16."""
    torch.manual_seed(0)
    source = Scenes(image_size=32, train_size=16, languages=("ko",))
    given = next(iter(scenes(source, batch_size=16, splits=Splits(val=["train"])).loader("train")))
    qformer = QFormer(4, 32, 2, 4, 32, cross_attention_frequency=1, vocab_size=VOCAB + 1, max_len=80, dropout=0.0)
    vision = ViT(32, 8, 32, 1, 4, class_token=False, pool="mean")
    m = Blip2QFormer(vision, qformer, embed_dim=16, cls_token_id=VOCAB)
    optim = OptimConfig(kind="muon", lr=3e-3, warmup_steps=5)
    optimizer = optim.build(m)
    schedule = optim.schedule(optimizer, 20)
    for step in range(20):
        loss = m(given, seed=step)
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
        schedule.step()
    assert float(loss.terms["itc"]) < 0.7  # pyright: ignore[reportPossiblyUnboundVariable]


def test_frozen_vision_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = ViT.forward_features
    monkeypatch.setattr(ViT, "forward_features", lambda self, x: calls.append(len(x)) or forward(self, x))
    data = scenes(cache_features=FeatureCacheConfig(str(tmp_path / "features")))
    module = QFormerStage1(model(freeze_vision=True), image_ablation_batches=0)
    run = trainer(tmp_path, max_steps=-1, max_epochs=2)
    run.fit(module, datamodule=data)
    assert sum(calls) == 11 + 5 + 3
    assert run.global_step == 6


# -------------------------------------------------------------------------------------------------- what it leaves


def test_it_leaves_recall_and_a_model_for_stage_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = scenes(captions_per_image=2), trainer(tmp_path, limit_val_batches=1, callbacks=[])
    module = QFormerStage1(model(), num_rerank=2, generation=GenerationConfig(num_beams=1, max_new_tokens=5))
    run.fit(module, datamodule=data)
    module.finish(Run(tmp_path, 1.0, torch.device("cpu"), 1))
    metrics = run.callback_metrics
    out = capsys.readouterr().out
    said = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    for split, images in (("val", 4), ("compositional", 3)):
        for code in ("en", "ko"):
            found = said["retrieval"][split][code]
            assert found["images"] == images
            assert found["captions"] == 3 * images  # all of them, not those of a batch
            for kind in ("itc", "itm"):
                assert 0 <= found[kind]["text_recall@1"] <= found[kind]["text_recall@5"] <= 1
                assert found[kind]["image_recall@10"] == 1.0
        scores = said["stage1"][split]
        assert scores["itg_perplexity"] == pytest.approx(np.exp(float(metrics[f"{split}/loss"])), rel=1e-5)
        assert scores["itg"] == pytest.approx(float(metrics[f"{split}/loss"]), rel=1e-5)
        assert 0 <= scores["itm_accuracy"] <= 1
    assert "val ko: 4 pictures, 12 captions" in out
    assert "matching" in out
    assert (tmp_path / "retrieval.png").read_bytes()[1:4] == b"PNG"
    assert "contrast" in module.describe("val", metrics)
    assert {"loss_right_image", "loss_other_image", "loss_blank_image"} <= said["image_ablation"]["val"].keys()

    saved = ImageCaptioner.from_pretrained(tmp_path / "model", device="cpu").model
    decoder = TextDecoder(VOCAB, 16, 1, 2, max_len=40)
    stage2 = blip2_from_stage1(tmp_path, decoder)
    assert isinstance(stage2, Blip2)
    assert isinstance(saved, Blip2QFormer)
    assert stage2.qformer.vocab_size is None
    assert stage2.qformer.training
    assert not stage2.vision.training
    assert not any(p.requires_grad for p in (*stage2.vision.parameters(), *stage2.decoder.parameters()))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        seen = saved.qformer.encode_queries(saved.vision.forward_features(pixels)).queries
        assert torch.equal(stage2.eval().qformer(stage2.vision.forward_features(pixels)), seen)
    assert blip2_from_stage1(tmp_path / "model", decoder, freeze_vision=False).vision.training


@torch.no_grad()
def test_recall_is_that_of_all_pairs() -> None:
    data, m = scenes(), model().train()
    for parameter in m.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    flags = [part.training for part in m.modules()]
    found = evaluate_retrieval(m, data, ["val"], num_rerank=2, text_batch=7).splits["val"]["ko"]
    assert [part.training for part in m.modules()] == flags
    m.eval()
    pairs = data.pairs("val")
    transform = data.transform
    near, matched, owner, texts = [], [], [], []
    for i in range(5):
        for caption in pairs.captions(i):
            if caption.language == "ko":
                owner.append(i)
                texts.append(caption.text)
    tokens = [
        torch.tensor([[*data.tokenizer.prompt("ko"), *data.tokenizer.encode(t), data.tokenizer.eos_id]]) for t in texts
    ]
    for i in range(5):
        visual = m.vision.forward_features(transform(pairs.image(i))[None])
        queries = m.project_queries(m.qformer(visual))[0]
        near.append([float((queries @ m.encode_text(t, t >= 0)[0]).max()) for t in tokens])
        matched.append([float(m.match(visual, t, t >= 0)[0, 1]) for t in tokens])
    assert found.texts == texts
    assert found.owner == owner
    np.testing.assert_allclose(found.similarity, near, atol=1e-5)
    assert found.recalls()["itc"] == recall_at_k(np.array(near), owner)

    scores = np.array(near)
    again = np.zeros(scores.shape, bool)
    for i in range(5):
        again[i, np.argsort(-scores[i])[:2]] = True
    for j in range(len(texts)):
        again[np.argsort(-scores[:, j])[:2], j] = True
    assert found.matched is not None
    np.testing.assert_allclose(found.matched[again], (scores + np.array(matched))[again], atol=1e-5)
    assert found.matched[~again].max() < found.matched[again].min()


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(x) for x in np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0).tolist()}


def test_a_sheet_shows_what_was_found() -> None:
    images = [Image.new("RGB", (30 + 10 * i, 40), (40 * i, 80, 120)) for i in range(3)]
    found = FoundImages("큰 빨간 원 하나", images, ["other", "own", "true"], 2, "ko")
    texts = FoundTexts(images[0], ["a red circle", "two stars"], ["other", "other"], 7)
    left = plot_searches([found], [], title="found")
    whole = plot_searches([found], [texts], title="found")
    assert whole.width == left.width + WIDE + GAP
    assert colours(left) >= {MARK_INKS["own"][1], MARK_INKS["true"][1]}
    assert MARK_INKS["own"][1] not in colours(whole.crop((left.width, 0, *whole.size)))
    with pytest.raises(ValueError, match="3 pictures were found, but 2 are marked"):
        plot_searches([replace(found, marks=["own", "other"])], [])
    with pytest.raises(ValueError, match="at least one search"):
        plot_searches([], [])


@torch.no_grad()
def test_a_q_former_starts_from_bert(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 31}
    bert = BertModel(BertConfig(vocab_size=53, max_position_embeddings=17, **sizes), add_pooling_layer=False).eval()
    for parameter in bert.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    bert.embeddings.token_type_embeddings.weight.zero_()  # a Q-Former has none
    bert.save_pretrained(tmp_path)
    qformer = load_qformer_from_bert(str(tmp_path), num_queries=5, visual_dim=13, extra_ids=2).eval()
    assert (qformer.vocab_size, qformer.max_len, qformer.visual_dim, qformer.num_queries) == (55, 17, 13, 5)
    tokens = torch.randint(0, 53, (3, 11))
    torch.testing.assert_close(qformer.encode_text(tokens), bert(tokens).last_hidden_state, atol=1e-5, rtol=1e-5)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match='model_type is "gpt2", not "bert"'):
        load_qformer_from_bert(str(tmp_path))


# ------------------------------------------------------------------------------------------------ what it refuses


class WithAnEmptyCaption:
    """Scenes of which one has a caption without words."""

    languages = ("en", "ko")

    def splits(self) -> tuple[str, ...]:
        return ("train", "val", "compositional")

    def split(self, name: str) -> Any:
        split = Scenes(image_size=32, train_size=5, val_size=5, compositional_size=3).split(name)
        captions = split.captions
        if name == "train":
            split.captions = lambda i: [Caption("", "en"), *captions(i)] if i == 3 else captions(i)  # type: ignore[method-assign]
        return split


def test_an_empty_caption_is_refused(tmp_path: Path) -> None:
    module = QFormerStage1(model())
    with pytest.raises(
        ValueError, match="train: 1 of 11 captions are empty, the first is one of scenes-0-train-000003"
    ):
        trainer(tmp_path).fit(module, datamodule=scenes(WithAnEmptyCaption()))


def test_an_empty_caption_is_refused_by_coca_while_it_contrasts(tmp_path: Path) -> None:
    def coca(weight: float) -> CoCa:
        text = TextDecoder(VOCAB, 16, 1, 2, max_len=90)
        upper = TextDecoder(VOCAB, 16, 1, 2, max_len=90, context_dim=24, positions=PositionConfig("rotary"))
        return CoCa(ViT(32, 8, 24, 1, 3), text, upper, num_queries=3, embed_dim=8, contrastive_weight=weight)

    data = scenes(WithAnEmptyCaption())
    with pytest.raises(ValueError, match="1 of 11 captions are empty, the first is one of scenes-0-train-000003"):
        trainer(tmp_path).fit(Captioning(coca(1.0)), datamodule=data)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(Captioning(coca(0.0)), datamodule=data)


def test_a_caption_longer_than_the_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.max_len \(81\) is more than the 80 tokens"):
        trainer(tmp_path).fit(QFormerStage1(model()), datamodule=scenes(max_len=81))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"itc_smoothing": 1.0}, r"itc_smoothing \(1.0\)"), ({"num_rerank": -1}, r"num_rerank \(-1\) must be at least 0")],
)
def test_numbers_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QFormerStage1(model(), **change)
    given = next(iter(scenes(captions_per_image=2).loader("train")))
    with pytest.raises(ValueError, match=r"num_match_texts \(3\) must be from 1 to the 2 texts of an image"):
        model()(given, num_match_texts=3)


def test_stage_2_says_what_does_not_fit(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "stage1")
    decoder = TextDecoder(VOCAB, 16, 1, 2, max_len=40)
    with pytest.raises(
        ValueError, match="reads visual tokens 24 wide, but the vision encoder given makes them 36 wide"
    ):
        blip2_from_stage1(tmp_path / "stage1", decoder, vision=ViT(32, 8, 36, 1, 3))
    blip2_from_stage1(tmp_path / "stage1", decoder).save_pretrained(tmp_path / "stage2")
    other = TextDecoder(VOCAB, 16, 1, 2, max_len=3)
    with pytest.raises(ValueError, match="the decoder's 3 positions leave no room for text after 3 queries"):
        blip2_from_stage1(tmp_path / "stage1", other)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        blip2_from_stage1(tmp_path / "nowhere", decoder)
