"""A captioner that writes only tokens of given texts: less to read for each token, where a model knows far more."""

from collections.abc import Iterable

from mmtransformer.backbones.decoder import TextDecoder
from mmtransformer.layers.restricted_head import RestrictedLMHead
from mmtransformer.pipelines.image_captioner import ImageCaptioner


def restrict_vocabulary(captioner: ImageCaptioner, texts: Iterable[str]) -> int:
    """From now on the captioner writes only tokens that are in these texts, and ends of texts.

    Of GPT-2's 50,257 rows, a third of its bytes, captions of Flickr8k need some 8,000. A caption of those tokens alone
    is written as before, its log-probability being among them; `save_pretrained` writes the whole model.

    Args:
        captioner: The captioner, before its first picture.
        texts: Such as the captions that it was trained on; each is also taken as a caption in the middle of a line.

    Returns:
        How many tokens are left.

    Raises:
        ValueError: If its language model has no head of rows, or there is no text.
    """
    decoder = getattr(captioner.model, "decoder", None)
    if not isinstance(decoder, TextDecoder) or decoder.logit_softcap is not None:
        raise ValueError(
            f"the vocabulary of a {type(captioner.model).__name__} over a {type(decoder).__name__} cannot be "
            "restricted: that goes with a TextDecoder whose logits have no softcap"
        )
    tokenizer = captioner.tokenizer
    allowed: set[int] = set()
    for text in texts:
        allowed.update(tokenizer.encode(text), tokenizer.encode(f" {text}"))
    if not allowed:
        raise ValueError("there is no text to take tokens from, so no caption could be written")
    allowed.update(tokenizer.eos_ids)
    decoder.lm_head = RestrictedLMHead(decoder.lm_head, allowed)
    return len(allowed)
