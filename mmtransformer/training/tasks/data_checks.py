"""What a task checks before anything is computed: that model and texts fit."""

from typing import Any, Protocol

from mmtransformer.backbones.vit import ViT
from mmtransformer.data.captions import CaptionData
from mmtransformer.data.loading.module import DataModule


class _Reader(Protocol):
    @property
    def vocab_size(self) -> int: ...

    @property
    def max_len(self) -> int: ...


def check_texts(data: DataModule, max_len: int, model: _Reader, part: str, key: str = "max_len") -> None:
    """Checks that a model knows all tokens of the data, and reads texts as long as its.

    Args:
        data: The data.
        max_len: The most tokens of one of its texts.
        model: The model.
        part: What the part of the recipe's model is called that is too small: "decoder".
        key: What the data calls `max_len`.

    Raises:
        ValueError: If the vocabulary or the texts are larger than the model.
    """
    tokens = data.tokenizer.vocab_size
    if tokens > model.vocab_size:
        raise ValueError(
            f"wrong vocabulary: the tokenizer has {tokens} tokens, but the model scores {model.vocab_size}; set the "
            f"{part}'s vocab_size to at least {tokens}, or data.vocab_size to {model.vocab_size}"
        )
    if max_len > model.max_len:
        raise ValueError(
            f"data.{key} ({max_len}) is more than the {model.max_len} tokens that the model reads; lower it, or "
            f"raise the {part}'s max_len"
        )


def check_pixels(data: CaptionData, model: Any) -> None:
    """Checks that a model's vision encoder can read the data's pictures.

    Args:
        data: The data.
        model: The model, with its `vision`.

    Raises:
        ValueError: If patches do not divide the pictures, or pictures keep sizes of their own and the model reads no
            such, or cuts them into other patches.
    """
    vision, transform = model.vision, data.transform
    patch = getattr(vision, "patch_size", None)
    if not isinstance(patch, int):
        return
    if (native := transform.patch_size) is None:
        if any(side % patch for side in transform.size):
            raise ValueError(
                f"data.transform gives pictures of {transform.size[0]} x {transform.size[1]} px, which the backbone's "
                f"patches of {patch} px do not divide; change image_size or patch_size"
            )
        return
    remedy = 'set data.resize (or transform.resize) to "squash", "crop" or "letterbox"'
    if "patch_grids" in getattr(model, "unsupported_fields", ()):
        raise ValueError(f"a {type(model).__name__} does not read pictures of native size: {remedy}")
    if type(vision) is not ViT or vision.patches.stem != "patch":
        raise ValueError(f"pictures of native size go through a ViT that cuts patches and does not convolve: {remedy}")
    if native != patch:
        raise ValueError(
            f"data.transform cuts pictures into patches of {native} px, and the vision encoder reads patches of "
            f"{patch} px: set transform.native.patch_size to {patch}"
        )
    if (dropped := vision.patches.patch_dropout) or vision.block.drop_path:
        raise ValueError(
            f"the vision encoder's patches.patch_dropout ({dropped}) and block.drop_path ({vision.block.drop_path}) "
            f"are drawn for a row, which holds many pictures of native size: train them with 0"
        )


def refuse_empty_captions(data: CaptionData, *, testing: bool) -> None:
    """Refuses captions without words, where pictures and captions are compared.

    Args:
        data: The data.
        testing: Whether the test splits are asked about, or those of training and validation.

    Raises:
        ValueError: With their number, and the picture of the first.
    """
    for split in data.test_splits if testing else (data.train_split, *data.val_splits):
        rows, pairs = data.rows(split), data.pairs(split)
        words = rows.starts[1:] - rows.starts[:-1] - rows.prompt
        empty = (words <= 1).nonzero()[0]  # nothing, or the end alone
        if len(empty):
            first = pairs.name(int((rows.first <= empty[0]).sum()) - 1)
            raise ValueError(
                f"{split}: {len(empty)} of {len(words)} captions are empty, the first is one of {first}; in a "
                f"contrastive batch an empty caption fits every picture: leave it out"
            )
