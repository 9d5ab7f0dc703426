"""Encoded image → RGB, as all see it but training, which crops JPEGs by itself (`crops.py`)."""

from __future__ import annotations

import PIL.Image

from megatron_lcl.data.corpus.probe import DAMAGE, BadImage, eight_bits, open_image, upright, what_it_is


def decode_rgb(data: bytes, min_side: int | None = None) -> PIL.Image.Image:
    """First frame as RGB: turned as EXIF says, 16 bits and floats scaled to 8 bits, transparent parts on white.

    min_side: a JPEG's decoder may scale it down as long as both sides stay that long. BadImage if the image does not
    decode.
    """
    try:
        image = open_image(data)
        if min_side is not None:
            image.draft(None, (min_side, min_side))
        return rgb(image)
    except DAMAGE as error:
        reason = what_it_is(data) if isinstance(error, PIL.UnidentifiedImageError) else error
        raise BadImage(f"an image that does not decode: {reason}") from None


def rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as `decode_rgb` says, a copy without what else Pillow knows of it: whoever reads the EXIF data would
    turn it once more."""
    image = _opaque(eight_bits(upright(image)))
    image.info = {}
    return image


def _opaque(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if alpha.getextrema() != (255, 255):
            white = PIL.Image.new("RGB", image.size, "white")
            white.paste(image, mask=alpha)
            return white
    return image.convert("RGB")
