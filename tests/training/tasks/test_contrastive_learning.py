"""ContrastiveLearning: what it learns from, what it leaves, what it refuses; and going on from a saved folder."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from mmtransformer import CLIP, ImageTextEmbedder, ImageTransform, TextTower, ViT
from mmtransformer.cli import main
from mmtransformer.data import CaptionData, Scenes
from mmtransformer.data.loading.features import FeatureCacheConfig
from mmtransformer.data.loading.module import LoaderConfig, Splits
from mmtransformer.data.loading.source import Caption
from mmtransformer.data.scenes.grammar import parse
from mmtransformer.data.scenes.world import SceneWorld
from mmtransformer.metrics.retrieval import recall_at_k
from mmtransformer.plots.retrieval import plot_searches
from mmtransformer.training import ContrastiveLearning, OptimConfig, Run, finetune_clip
from mmtransformer.training.evaluation import retrieval
from mmtransformer.training.evaluation.retrieval import Retrieval, Scored, evaluate_retrieval, plot_retrieval
from mmtransformer.training.evaluation.zero_shot import sentences, zero_shot
from mmtransformer.training.tasks.contrastive_learning import RECALLS, recalls
from support import dual
from support.processes import pair
from support.recipes import RECIPES, flickr_folder

VOCAB = 420


@pytest.fixture(autouse=True)
def lightning_is_quiet() -> None:
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    for message in (".*LeafSpec.*", ".*in eval mode.*"):
        warnings.filterwarnings("ignore", message=message)


def model(**options: Any) -> CLIP:
    torch.manual_seed(3)
    vision = ViT(32, 8, 24, 1, 3, class_token=False, pool="mean")
    return CLIP(vision, TextTower(VOCAB, 24, 1, 3, max_len=80), embed_dim=11, **options)


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
    arguments = {"max_steps": 3, "max_epochs": 1, "enable_progress_bar": False, "logger": False} | arguments
    return pl.Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **arguments,
    )


def test_a_run_leaves_scores_searches_and_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = SceneWorld(group_shares=(1.0,))
    source = Scenes(image_size=32, train_size=11, val_size=5, compositional_size=3, world=world)
    task, data = ContrastiveLearning(model(), optim=OptimConfig(warmup_steps=1)), scenes(source)
    run = trainer(tmp_path)
    run.fit(task, datamodule=data)
    assert {f"{split}/{name}" for split in ("val", "compositional") for name in ("loss", *RECALLS)} <= set(
        task.validation_means
    )
    task.finish(Run(tmp_path, 1.0, torch.device("cpu")))
    metrics = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert metrics["retrieval"]["val"]["ko"]["images"] == 5
    assert set(metrics["zero_shot"]["val"]["en"]) == {"shape", "color"}
    assert metrics["training"]["steps"] == 3
    assert (tmp_path / "retrieval.png").read_bytes()[1:4] == b"PNG"
    out = capsys.readouterr().out
    assert "caption -> picture" in out
    assert "told by words alone" in out
    found = ImageTextEmbedder.from_pretrained(tmp_path / "model", device="cpu")
    pairs = data.pairs("val")
    texts = [c.text for i in range(5) for c in pairs.captions(i) if c.language == "en"]
    near = found.similarity([pairs.image(i) for i in range(5)], texts).numpy()
    owner = [i for i in range(5) for c in pairs.captions(i) if c.language == "en"]
    mine = evaluate_retrieval(task.model, data, ["val"]).splits["val"]["en"]
    assert np.abs(np.sort(mine.similarity.ravel()) - np.sort(near.ravel())).max() < 1e-5
    assert metrics["retrieval"]["val"]["en"]["itc"] == recall_at_k(near, owner)
    with pytest.raises(ValueError, match="a CLIP cannot"):
        evaluate_retrieval(task.model, data, ["val"], num_rerank=3)


def test_a_sheet_of_few_pictures_shows_each_search_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = scenes(Scenes(image_size=32, train_size=11, val_size=2, world=SceneWorld(group_shares=(1.0,))))
    near = np.array([[0.9, 0.3, 0.1, 0.2], [0.1, 0.4, 0.2, 0.8]])
    found = Retrieval({"val": {"en": Scored([0, 1], ["a", "b", "c", "d"], [0, 0, 1, 1], near)}})
    drawn: list[Sequence[Any]] = []

    def plot(by_text: Sequence[Any], by_image: Sequence[Any], **more: Any) -> Image.Image:
        drawn[:] = by_text, by_image
        return plot_searches(by_text, by_image, **more)

    monkeypatch.setattr(retrieval, "plot_searches", plot)
    plot_retrieval(found, data, tmp_path / "sheet.png")
    by_text, by_image = drawn
    assert [(search.text, search.rank) for search in by_text] == [("a", 1), ("b", 2), ("c", 1), ("d", 1)]
    assert [(search.texts[0], search.rank) for search in by_image] == [("a", 1), ("d", 1)]
    assert (tmp_path / "sheet.png").exists()


def test_validations_recall_is_that_of_whole_splits(tmp_path: Path) -> None:
    task, data = ContrastiveLearning(model()), scenes()
    trainer(tmp_path).validate(task, datamodule=data, verbose=False)
    images = task.model.encode_image(torch.stack([data.transform(data.pairs("val").image(i)) for i in range(5)]))
    rows = data.rows("val")
    texts, owner = [], []
    for i in range(5):
        for row in rows.fixed(i, 2):  # a batch has as many captions as there are languages
            tokens = np.concatenate((row.tokens[:1], row.tokens[row.prompt :]))
            texts.append(task.model.encode_text(torch.tensor(tokens)[None].long())[0])
            owner.append(i)
    expected = recall_at_k((images @ torch.stack(texts).T).detach().numpy(), owner)
    for name in RECALLS:
        assert task.validation_means[f"val/{name}"] == pytest.approx(expected[name], abs=1e-6)
    none = ContrastiveLearning(model(), recall_images=0)
    trainer(tmp_path).validate(none, datamodule=scenes(), verbose=False)
    assert "val/loss" in none.validation_means
    assert "val/text_recall@1" not in none.validation_means


def test_recall_passes_over_fillers() -> None:
    chance = torch.Generator().manual_seed(1)
    images, texts = torch.randn(4, 5, generator=chance), torch.randn(8, 5, generator=chance)
    ids, rows = torch.tensor([7, 9, 7, -1]), torch.tensor([7, 7, 9, -1, 7, -1, -1, -1])
    found = recalls(images, ids, texts, rows)
    kept = torch.tensor([0, 1, 2, 4])
    expected = recall_at_k((images[:2] @ texts[kept].T).numpy(), [0, 0, 1, 0])
    assert found == {name: expected[name] for name in RECALLS}
    assert recalls(images, torch.full((4,), -1), texts, rows) == {}


def test_it_learns_what_belongs_together(tmp_path: Path) -> None:
    """A few pictures are learnt by heart, by either loss; a model that cannot tell them stays at chance."""
    for loss in ("softmax", "sigmoid"):
        source = Scenes(image_size=32, train_size=8, val_size=2, world=SceneWorld(max_count=1, group_shares=(1.0,)))
        data = scenes(source, batch_size=8, splits=Splits(val=["train"]))
        task = ContrastiveLearning(model(loss=loss), optim=OptimConfig(kind="muon", lr=5e-3, warmup_steps=5))
        trainer(tmp_path, max_steps=100, max_epochs=100, limit_val_batches=0).fit(task, datamodule=data)
        trainer(tmp_path).validate(task, datamodule=data, verbose=False)
        assert task.validation_means["train/image_recall@1"] > 0.8, loss


def test_a_frozen_towers_tokens_are_cached(tmp_path: Path) -> None:
    def means(**arguments: Any) -> dict[str, float]:
        task = ContrastiveLearning(model(freeze_vision=True), optim=OptimConfig(warmup_steps=1))
        trainer(tmp_path, max_steps=3).fit(task, datamodule=scenes(**arguments))
        return task.validation_means

    plain = means()
    cached = means(cache_features=FeatureCacheConfig(str(tmp_path / "features"), dtype="float32"))
    assert list((tmp_path / "features").glob("train-*.safetensors"))
    for name in ("val/loss", "compositional/loss"):
        assert cached[name] == pytest.approx(plain[name], abs=1e-5)


class Empty:
    """A source with a caption without words."""

    languages = (None,)
    split_names = ("train", "val")

    def split(self, name: str) -> Any:
        split = Scenes(image_size=32, train_size=3, val_size=3, languages=("en",)).split(name)
        split.captions = lambda i: [Caption("a star" if i else " ", None)]  # type: ignore[method-assign]
        return split


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    cases = [
        (scenes(max_len=90), r"data.max_len \(90\) is more than the 80 tokens"),
        (scenes(vocab_size=500), "the tokenizer has 4.. tokens, but the model scores 420; set the text tower's"),
        (CaptionData(Scenes(image_size=32, train_size=4, val_size=2), transform=ImageTransform(36), vocab_size=VOCAB),
         "36 x 36 px, which the backbone's patches of 8 px do not divide"),
    ]  # fmt: skip
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path).fit(ContrastiveLearning(model()), datamodule=data)
    with pytest.raises(ValueError, match=r"recall_images \(-1\)"):
        ContrastiveLearning(model(), recall_images=-1)


def test_zero_shot_sentences_are_true_of_their_class() -> None:
    world = SceneWorld()
    for kind, label in (("shape", "star"), ("color", "red")):
        for language in ("en", "ko"):
            texts = sentences(world, kind, label, language)
            assert len(texts) == 8 * world.max_count
            for text in texts:
                (group,) = parse(text, language).groups
                assert getattr(group, kind) == label, text


def test_zero_shot_tells_what_vectors_say() -> None:
    """An encoder whose vectors are the truth is right in all pictures; one that mixes colours up, in none."""
    data = scenes(Scenes(image_size=32, train_size=4, val_size=9, world=SceneWorld(group_shares=(1.0,))),
                  splits=Splits(val=["val"]))  # fmt: skip
    pairs = data.pairs("val")
    world = pairs.world  # type: ignore[attr-defined]
    shapes, colors = list(world.shapes), list(world.colors)

    class Oracle:
        transform = staticmethod(lambda image: image)
        turn = 0

        def encode_images(self, images: list[Any]) -> torch.Tensor:
            rows = torch.zeros(len(images), 16)
            for row, i in zip(rows, range(9), strict=True):
                group = pairs.scene(i).groups[0]  # type: ignore[attr-defined]
                row[shapes.index(group.shape)] = row[8 + (colors.index(group.color) + self.turn) % 8] = 1
            return rows

        def encode_texts(self, texts: list[str]) -> torch.Tensor:
            rows = torch.zeros(len(texts), 16)
            for row, text in zip(rows, texts, strict=True):
                language = "en" if text.isascii() else "ko"
                (group,) = parse(text, language).groups
                assert group.shape is not None
                assert group.color is not None
                row[shapes.index(group.shape)] = row[8 + colors.index(group.color)] = 1
            return rows

    oracle: Any = Oracle()
    found = zero_shot(oracle, data)["val"]
    assert found["pictures"] == 9
    assert found["en"] == found["ko"] == {"shape": 1.0, "color": 1.0}
    oracle.turn = 3
    assert zero_shot(oracle, data)["val"]["en"] == {"shape": 1.0, "color": 0.0}


def test_fine_tuning_goes_on_with_the_folders_tokenizer_and_pixels(tmp_path: Path) -> None:
    data = scenes()
    ImageTextEmbedder(model(), data.tokenizer, ImageTransform(32), device="cpu").save_pretrained(tmp_path / "start")
    (tmp_path / "recipe.yaml").write_text(
        "model:\n  class_path: mmtransformer.training.finetune_clip\n  init_args:\n    optim:\n      warmup_steps: 2\n"
        "data:\n  class_path: mmtransformer.data.CaptionData\n"
    )
    words = ["fit", "--config", str(tmp_path / "recipe.yaml"), "--config", str(RECIPES / "tiny.yaml"),
             f"--model.init={tmp_path / 'start'}", f"--data.source={flickr_folder(tmp_path / 'pairs')}",
             f"--trainer.default_root_dir={tmp_path / 'run'}"]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([*words, "--data.max_len=81"]) == 2
        assert main(words) == 0
    again = ImageTextEmbedder.from_pretrained(tmp_path / "run/model", device="cpu")
    assert again.tokenizer.vocab_size == data.tokenizer.vocab_size
    assert again.transform == ImageTransform(32)
    frozen = finetune_clip(str(tmp_path / "start"), freeze_vision=True, freeze_text=True)
    assert not any(p.requires_grad for p in frozen.model.vision.parameters())
    assert {n for n, p in frozen.model.named_parameters() if p.requires_grad} == {
        "image_proj.weight",
        "text_proj.weight",
        "logit_scale",
    }


@pytest.mark.parametrize("kind", ["siglip2 naflex", "altclip"])
def test_a_public_pair_is_fine_tuned_on_pictures_of_all_shapes(kind: str, tmp_path: Path) -> None:
    """As its own tokenizer and processor read them; and it is written back as transformers reads it."""
    theirs = dual.write(tmp_path / "theirs", kind)
    (tmp_path / "pairs").mkdir()
    for i, size in enumerate([(60, 40), (40, 60), (33, 90), (20, 20), (90, 33), (48, 48), (24, 56), (56, 24)]):
        Image.effect_noise(size, 80.0).convert("RGB").save(tmp_path / "pairs" / f"{i}.png")
        (tmp_path / "pairs" / f"{i}.txt").write_text(f"a picture of {i} dogs", "utf-8")
    task = finetune_clip(str(tmp_path / "theirs"), optim=OptimConfig(lr=1e-3, warmup_steps=1))
    start = task.start
    assert start is not None
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    data = CaptionData(str(tmp_path / "pairs"), batch_size=3, loader=LoaderConfig(seed=1))
    data.continue_from(start.tokenizer, start.transform, None, task.model.max_len)
    trainer(tmp_path).fit(task, datamodule=data)
    moved = [name for name, tensor in task.model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {"vision.patch_embed.proj.weight", "text_proj.weight"} <= {*moved}
    task.model.eval()
    start.save_transformers(tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    texts = ["two dogs", "a red star"]
    found = AutoTokenizer.from_pretrained(tmp_path / "ours")(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    )
    pictures = [Image.open(file) for file in sorted((tmp_path / "pairs").glob("*.png"))]
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "ours")(pictures, return_tensors="pt")
    if "naflex" in kind:
        found.pop("attention_mask", None)
    with torch.no_grad():
        out = again.eval()(**found, **pixels)
    torch.testing.assert_close(start.encode_images(pictures), out.image_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(start.encode_texts(texts), out.text_embeds, atol=1e-5, rtol=1e-5)


def test_captions_are_as_long_as_the_model_that_is_trained_on_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = scenes().tokenizer
    for length, most, said in ((None, 24, 24), (None, 99, 64), (20, 24, 20)):
        data = CaptionData(Scenes(image_size=32, train_size=3, val_size=2), max_len=length)
        data.continue_from(known, ImageTransform(32), None, most)
        assert data.max_len == said
        assert ("captions may have 24 tokens" in caplog.text) == (most == said)
        caplog.clear()
    data = CaptionData(Scenes(image_size=32, train_size=3, val_size=2), max_len=25)
    with pytest.raises(ValueError, match=r"data.max_len \(25\) is more than the 24 .*: set data.max_len to 24 or"):
        data.continue_from(known, ImageTransform(32), None, 24)


def fit_in_a_process(rank: int, folder: str) -> None:
    """Two steps of a model in float64, four pictures a step in all; the weights into a file."""
    warnings.simplefilter("ignore")
    task = ContrastiveLearning(model(), optim=OptimConfig(warmup_steps=1))
    run = trainer(
        Path(folder), devices=2, strategy="ddp", precision="64-true", num_nodes=1, use_distributed_sampler=False
    )
    run.fit(task, datamodule=scenes(batch_size=2))
    if rank == 0:
        torch.save([task.model.state_dict(), task.validation_means], f"{folder}/two.pt")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    assert pair(lambda rank: fit_in_a_process(rank, str(tmp_path))) == [0, 0]
    weights, means = torch.load(tmp_path / "two.pt")
    task = ContrastiveLearning(model(), optim=OptimConfig(warmup_steps=1))
    trainer(tmp_path, precision="64-true").fit(task, datamodule=scenes(batch_size=4))
    for name, tensor in task.model.state_dict().items():
        assert float((tensor - weights[name]).abs().max()) < 1e-9, name
    for name in RECALLS:
        assert means[f"val/{name}"] == pytest.approx(task.validation_means[f"val/{name}"], abs=1e-6)
