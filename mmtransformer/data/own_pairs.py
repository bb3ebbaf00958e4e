"""Your own pairs as the data of a recipe: one function, so that a recipe needs no more than `--data.root FOLDER`."""

from mmtransformer.data.captions import CaptionData
from mmtransformer.data.loading.source import PairSource
from mmtransformer.data.opening import are_documents, are_shards, open_pairs
from mmtransformer.data.pairs import Format, PairFiles
from mmtransformer.images import Augment, ImageTransform


def own_pairs(
    root: str,
    *,
    format: Format = "auto",
    images: str | None = None,
    image_column: str | None = None,
    caption_column: str | list[str] | None = None,
    language_column: str | None = None,
    split_column: str | None = None,
    language: str | None = "en",
    val_fraction: float = 0.1,
    image: ImageTransform | None = None,
    augment: Augment | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    captions_per_image: int = 1,
    batch_size: int = 16,
    max_len: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    cache_features: bool = False,
    cache_dir: str | None = None,
    flip_features: bool = False,
    max_bad: float = 0.01,
) -> CaptionData:
    """Pairs in a folder, CSV, TSV, JSONL, JSON (COCO, Karpathy), Parquet, zip or tar; the format is detected.

    Tar shards are read by their index, and of interleaved documents each picture with the text that follows it.

    Args:
        root: A folder, an archive, one manifest, or a pattern of tar shards.
        format: The format, if it cannot be told.
        images: Folder or archive with the pictures, if not at or below the root.
        image_column: Column with the picture's path.
        caption_column: Column, or columns, with captions.
        language_column: Column with the language of the row's captions.
        split_column: Column with the split.
        language: The language of captions that neither the data nor their script tells.
        val_fraction: Share of the pictures for validation where the data names none.
        image: How a picture becomes pixels; a saved model that is fine-tuned brings its own.
        augment: Random changes to training pictures.
        tokenizer: Folder or hub name of a tokenizer; a model that is fine-tuned brings its own; else one is trained.
        vocab_size: The most words of a tokenizer that is trained.
        captions_per_image: Captions of a picture in a batch.
        batch_size: Pictures in a batch of one process.
        max_len: The most tokens of a caption, with prompt and end.
        num_workers: Processes that load pictures.
        seed: Seed of order, augmentation and choice of captions.
        cache_features: Compute a frozen vision tower's visual tokens once.
        cache_dir: Folder of the visual tokens.
        flip_features: Keep mirrored visual tokens as well.
        max_bad: Share of rows, or of pictures, that may be unusable before the run stops.
    """
    named = (image_column, caption_column, language_column, split_column)
    if format == "auto" and not any(named) and (are_shards(root) or are_documents(root)):
        source: PairSource = open_pairs(
            root, images=images, language=language, val_fraction=val_fraction, max_bad=max_bad
        )
    else:
        source = PairFiles(
            root,
            format=format,
            images=images,
            image_column=image_column,
            caption_column=caption_column,
            language_column=language_column,
            split_column=split_column,
            language=language,
            val_fraction=val_fraction,
            max_bad=max_bad,
        )
    return CaptionData(
        source,
        image=image or ImageTransform(),
        augment=augment,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        captions_per_image=captions_per_image,
        batch_size=batch_size,
        max_len=max_len,
        num_workers=num_workers,
        seed=seed,
        cache_features=cache_features,
        cache_dir=cache_dir,
        flip_features=flip_features,
        max_bad=max_bad,
    )
