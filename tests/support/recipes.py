"""What each recipe needs beside recipes/tiny.yaml: small data and models, made here."""

from pathlib import Path
from typing import Any

from mmtransformer import (
    CLIP,
    Blip2QFormer,
    ImageCaptioner,
    ImageTextEmbedder,
    ImageTransform,
    QFormer,
    TextDecoder,
    TextTower,
    Tokenizer,
    VisionEncoderDecoder,
    ViT,
)
from mmtransformer.data.scenes.scenes import Scenes
from mmtransformer.weights import save_lm

RECIPES = Path(__file__).parents[2] / "recipes"


NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "tiny")


def flickr_folder(folder: Path) -> Path:
    """Six pictures as Flickr8k's authors hand theirs out."""
    (folder / "Flicker8k_Dataset").mkdir(parents=True)
    split = Scenes(image_size=32, train_size=6, phrasings=2, languages=("en",)).split("train")
    lines = []
    for i in range(6):
        split.image(i).save(folder / "Flicker8k_Dataset" / f"{i}.jpg")
        lines += [f"{i}.jpg#{k}\t{caption.text}" for k, caption in enumerate(split.captions(i))]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n", "utf-8")
    for name, some in (("train", (0, 1, 2)), ("dev", (3, 4)), ("test", (5,))):
        text = "".join(f"{i}.jpg\n" for i in some)
        (folder / f"Flickr_8k.{name}Images.txt").write_text(text, "utf-8")
    return folder


def saved_model(folder: Path) -> Path:
    source = Scenes(image_size=32, train_size=9).split("train")
    texts = [caption.text for i in range(9) for caption in source.captions(i)]
    decoder = TextDecoder(300, 16, 1, 2, max_len=64, context_dim=16)
    captioner = VisionEncoderDecoder(ViT(32, 8, 16, 1, 2, class_token=False, pool="mean"), decoder)
    tokenizer = Tokenizer.train(texts, 300, ("en", "ko"))
    ImageCaptioner(captioner, tokenizer, ImageTransform(32), device="cpu").save_pretrained(folder)
    return folder


def dual_model(folder: Path) -> Path:
    source = Scenes(image_size=32, train_size=9).split("train")
    tokenizer = Tokenizer.train([c.text for i in range(9) for c in source.captions(i)], 300, ("en", "ko"))
    clip = CLIP(ViT(32, 8, 16, 1, 2), TextTower(300, 16, 1, 2), embed_dim=12)
    ImageTextEmbedder(clip, tokenizer, ImageTransform(32), device="cpu").save_pretrained(folder)
    return folder


def language_model(folder: Path, family: str = "ours") -> list[str]:
    """The arguments that put a small language model with its tokenizer into a recipe: ours, or as a hub has it."""
    source = Scenes(image_size=32, train_size=9).split("train")
    texts = [caption.text for i in range(9) for caption in source.captions(i)]
    tokenizer = Tokenizer.train(texts, 300, ("en", "ko") if family == "ours" else ())
    decoder = TextDecoder(300, 16, 2, 2, max_len=128)
    if family == "gpt2":
        save_lm(decoder, folder, "gpt2")
    else:
        decoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [f"--model.captioner.decoder.source={folder}", f"--data.tokenizer={folder}"]


def stage1(folder: Path) -> str:
    """The argument that names a small model of stage 1."""
    qformer = QFormer(3, 16, 2, 2, 16, vocab_size=301, max_len=64)
    Blip2QFormer(ViT(32, 8, 16, 1, 2), qformer, cls_token_id=300).save_pretrained(folder)
    return f"--model.captioner.folder={folder}"


def bert(folder: Path) -> list[str]:
    """The arguments that start a Q-Former from a small BERT with its tokenizer."""
    from transformers import BertConfig, BertModel

    sizes: Any = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 31}
    BertModel(BertConfig(vocab_size=300, max_position_embeddings=40, **sizes)).save_pretrained(folder)
    source = Scenes(image_size=32, train_size=9).split("train")
    Tokenizer.train([c.text for i in range(9) for c in source.captions(i)], 300).save_pretrained(folder)
    return [
        f"--model.captioner.qformer.source={folder}",
        f"--data.tokenizer={folder}",
        "--model.captioner.cls_token_id=300",
    ]


def arguments(name: str, folder: Path) -> list[str]:
    """What a recipe needs beside recipes/tiny.yaml: small data, made here."""
    if name == "qformer_stage1_scenes":
        ViT(64, 8, 192, 1, 3).save_pretrained(folder / "vit")
        vision = f"--model.captioner.vision.source={folder / 'vit'}"
        return [vision]
    if name == "qformer_stage2_scenes":
        return [
            *language_model(folder / "lm"),
            stage1(folder / "stage1"),
            "--data.transform.image_size=32",
            "--data.source.image_size=32",
        ]
    if name == "flamingo_scenes":
        ViT(64, 8, 192, 1, 3).save_pretrained(folder / "vit")
        vision = f"--model.captioner.vision.source={folder / 'vit'}"
        return [*language_model(folder / "lm"), vision]
    if name == "few_shot_scenes":
        ViT(64, 8, 192, 1, 3).save_pretrained(folder / "vit")
        return [
            f"--model.captioner.vision.source={folder / 'vit'}",
            "--data.source.val_size=2",
            "--model.generation.max_new_tokens=3",
        ]
    if name == "lm_scenes":
        return ["--model.num_texts=3"]
    if name in ("caption_scenes", "clip_scenes", "draw_scenes", "prefix_scenes", "translate_scenes", "vit_classify"):
        return []
    if name == "lm_captions":
        paths = f"--data.source={flickr_folder(folder / 'flickr')}"
        return [paths, "--data.max_len=48", "--model.num_texts=3"]
    if name == "bert_captions":
        return [f"--data.source={flickr_folder(folder / 'flickr')}"]
    root = f"--data.source={flickr_folder(folder / 'flickr')}"
    if name == "finetune_pairs":
        return [root, f"--model.init={saved_model(folder / 'model')}"]
    if name == "finetune_hub":
        from support.hub import folder as public_folder

        return [root, f"--model.init={public_folder(folder / 'model', 'blip')}", "--model.tuning.save_merged=true"]
    if name == "finetune_clip":
        return [root, f"--model.init={dual_model(folder / 'model')}"]
    if name == "clip_flickr8k":
        ViT(32, 8, 192, 1, 3).save_pretrained(folder / "vit")
        cache = f"--data.cache_features.folder={folder / 'features'}"
        return [root, f"--model.model.vision.source={folder / 'vit'}", cache]
    if name in ("qformer_stage2_flickr8k", "qformer_stage2_coco"):
        language = language_model(folder / "lm", "gpt2" if name == "qformer_stage2_coco" else "ours")
        cache = [f"--data.cache_features.folder={folder / 'features'}"] if name == "qformer_stage2_flickr8k" else []
        return [root, *language, stage1(folder / "stage1"), "--data.transform.image_size=32", *cache]
    dim = {"flamingo_coco": 768, "qformer_stage1_coco": 1024}.get(name, 192)
    vision = ViT(32, 8, dim, 1, 4 if dim % 3 else 3)
    vision.save_pretrained(folder / "vit")
    sources = [root, f"--model.captioner.vision.source={folder / 'vit'}"]
    if name == "flamingo_coco":
        smaller = ["--model.captioner.connector.depth=1", "--data.max_len=60"]
        return sources + smaller + language_model(folder / "lm", "gpt2")
    if name == "qformer_stage1_coco":
        return sources + bert(folder / "bert")
    sources += [f"--data.cache_features.folder={folder / 'features'}"]
    return sources + (language_model(folder / "lm") if name == "flamingo_flickr8k" else [])
