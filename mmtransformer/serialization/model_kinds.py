"""What a saved model is for, said where another kind was wanted."""

from pathlib import Path

_USES = {
    "CLIP": "it compares pictures and texts: `mmt search`, or ImageTextEmbedder (its save_transformers exports)",
    "TextToImageModel": "it draws: `mmt draw`, or ImageGenerator",
    "Transformer": "it translates: `mmt translate`, or Translator",
    "ViT": "a vision encoder; one that vit_classify has trained classifies: `mmt classify`, or ImageClassifier",
    "Captioner": "it captions: `mmt caption`, or ImageCaptioner",
}
_WANTED = {
    "CLIP": "a CLIP, a dual encoder, which has a tower for pictures and one for texts",
    "TextToImageModel": "a TextToImageModel, a model that draws",
}


def with_article(name: str) -> str:
    """`a CLIP`, `a VisionEncoderDecoder`."""
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def other_kind(folder: str | Path, found: type, wanted: str) -> ValueError:
    """The error that a folder holds another model than is wanted, with what takes the one that it holds.

    Args:
        folder: the folder.
        found: the class of its model.
        wanted: the name of the class that was asked for.
    """
    use = next((f"; {_USES[kind.__name__]}" for kind in found.__mro__ if kind.__name__ in _USES), "")
    return ValueError(
        f"{folder} holds {with_article(found.__name__)}, not {_WANTED.get(wanted) or with_article(wanted)}{use}"
    )
