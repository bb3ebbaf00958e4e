"""How large a picture is, without decoding it."""

import io

from PIL import JpegImagePlugin, PngImagePlugin

from mmtransformer.images.files import ImageError, load

_OPENERS = {b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile, b"\x89PN": PngImagePlugin.PngImageFile}
_MOST = 64_000_000  # pixels; what is larger is decoded at half its sides, or refused


def stored_size(data: bytes, name: str) -> tuple[int, int]:
    """Height and width of a picture's file, px; of a JPEG and a PNG by what stands before its pixels.

    A picture that is turned upright when it is read is told here as it lies.

    Args:
        data: The file's bytes.
        name: What errors call it.

    Raises:
        ImageError: If it cannot be read.
    """
    if (opener := _OPENERS.get(data[:3])) is not None:
        try:
            width, height = opener(io.BytesIO(data), "").size
        except Exception as error:  # damaged files bring out almost any
            raise ImageError(f"{name}: damaged ({error}); get the file again or save it anew") from error
        if 0 < width * height <= _MOST:
            return height, width
    image = load(data, name=name)
    return image.height, image.width
