"""Encoded images of every kind that a data set may hold, sound and bad, each with its exact outcome."""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

H, W = 48, 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """One file. `outcome` of a thorough index: (format, height, width), or (reason, a part of the detail)."""

    content: bytes
    outcome: tuple
    quick: tuple | None = None  # of a quick index, where it differs
    dali: str = "agrees"  # or "decodes" what we refuse, or "crashes" the whole process
    file: str = "image.jpg"


def picture(seed: int = 0, height: int = H, width: int = W) -> Image.Image:
    """Return a smooth colourful image."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def jpeg(seed: int = 0, height: int = H, width: int = W) -> bytes:
    return encode(picture(seed, height, width), "JPEG", quality=90)


def exif(orientation: int, entries: int = 1, tag: int = 0x112) -> bytes:
    """Return an EXIF block whose directory claims `entries` and has one."""
    return struct.pack("<4sIHHHIHHI", b"II*\0", 8, entries, tag, 3, 1, orientation, 0, 0)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """Return the start of an RGB PNG."""
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def png_bomb(side: int) -> bytes:
    """Return a sound black PNG of side * side pixels in about side**2 / 1000 bytes."""
    squeeze = zlib.compressobj(9)
    row = bytes(3 * side + 1)
    data = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    return png_header(side, side) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def jpeg_frame(content: bytes, *, height: int = H, width: int = W, bits: int = 8, marker: int = 0xC0) -> bytes:
    """Return a JPEG whose frame header does not fit its data."""
    at = content.index(b"\xff\xc0")
    return content[: at + 1] + struct.pack(">BHBHH", marker, 17, bits, height, width) + content[at + 9 :]


def overwritten(content: bytes, at: int, data: bytes) -> bytes:
    return content[:at] + data + content[at + len(data) :]


def frames(form: str, image: Image.Image | None = None) -> bytes:
    """Return a file with two pictures."""
    return encode(image or picture(), form, save_all=True, append_images=[picture(1)])


def image_cases() -> dict[str, Case]:
    small, large = jpeg(), jpeg(1, 480, 640)
    rng = np.random.default_rng(3)
    grey, rgba = picture().convert("L"), picture().convert("RGBA")
    rgba.putalpha(Image.fromarray(rng.integers(0, 256, (H, W), dtype=np.uint8)))
    deep = Image.fromarray(np.arange(H * W, dtype=np.uint16).reshape(H, W) * 20)
    palette = picture().convert("P", palette=Image.Palette.ADAPTIVE)
    turned = Image.Exif()
    turned[0x112] = 6
    png, bmp, ppm = (encode(picture(), form) for form in ("PNG", "BMP", "PPM"))
    webp, lossless = encode(picture(), "WEBP"), encode(picture(), "WEBP", lossless=True)
    tiff, lzw = encode(picture(), "TIFF"), encode(picture(), "TIFF", compression="tiff_lzw")
    white = Image.new("RGB", (2000, 1500), "white")
    white.paste((200, 30, 10), (800, 800, 900, 900))
    flat = encode(white, "JPEG", optimize=True)
    scan = large.rindex(b"\xff\xda")
    segment = b"\xff\xe1" + struct.pack(">H", 8 + len(exif(6))) + b"Exif\0\0"
    damaged_exif = b"\xff\xe1" + struct.pack(">H", 8 + len(exif(6))) + b"Exif\0\0" + exif(6, entries=80)
    sound = ("JPEG", H, W)
    cut_header = ("truncated", "inside its header")
    assert bytes(4096) in flat

    cases = {
        # JPEG
        "jpeg": Case(content=small, outcome=sound),
        "jpeg progressive": Case(content=encode(picture(), "JPEG", progressive=True), outcome=sound),
        "jpeg grey": Case(content=encode(grey, "JPEG"), outcome=sound),
        "jpeg CMYK": Case(content=encode(picture().convert("CMYK"), "JPEG"), outcome=sound),
        "jpeg with restarts": Case(content=encode(picture(), "JPEG", restart_marker_blocks=2), outcome=sound),
        "jpeg of one pixel": Case(content=jpeg(0, 1, 1), outcome=("JPEG", 1, 1)),
        "jpeg with a long tail": Case(content=small + b"junk" * 99, outcome=sound),
        "jpeg flat, optimised: a run of zero bytes": Case(content=flat, outcome=("JPEG", 1500, 2000)),
        "jpeg of two pictures": Case(content=frames("MPO"), outcome=sound),
        "jpeg turned by EXIF": Case(content=encode(picture(), "JPEG", exif=turned), outcome=("JPEG", W, H)),
        "jpeg EXIF 3": Case(content=small[:2] + segment + exif(3) + small[2:], outcome=sound),
        "jpeg EXIF 9": Case(content=small[:2] + segment + exif(9) + small[2:], outcome=sound),
        "jpeg two EXIF alike": Case(
            content=small[:2] + 2 * (segment + exif(6)) + small[2:], outcome=("JPEG", W, H)
        ),
        "jpeg two EXIF, the last says upright": Case(
            content=small[:2] + segment + exif(6) + segment + exif(1) + small[2:], outcome=sound
        ),
        "jpeg two EXIF, the last says nothing": Case(
            content=small[:2] + segment + exif(6) + segment + exif(1, tag=0x100) + small[2:], outcome=("JPEG", W, H)
        ),
        "jpeg two EXIF, the last turns": Case(
            content=small[:2] + segment + exif(1) + segment + exif(6) + small[2:],
            outcome=("damaged", "its EXIF blocks disagree on its orientation"),
            dali="decodes",
        ),
        "jpeg two EXIF, the last is out of range": Case(
            content=small[:2] + segment + exif(6) + segment + exif(9) + small[2:],
            outcome=("damaged", "its EXIF blocks disagree on its orientation"),
            dali="decodes",
        ),
        "jpeg damaged EXIF": Case(content=small[:2] + damaged_exif + small[2:], outcome=sound),
        "jpeg named .png": Case(content=small, outcome=sound, file="image.png"),
        "jpeg without end marker": Case(
            content=small[:-2], outcome=("truncated", "before its end marker"), quick=sound
        ),
        "jpeg cut in half": Case(
            content=large[: len(large) // 2], outcome=("truncated", "before its end marker"), quick=("JPEG", 480, 640)
        ),
        "jpeg with a tail of zeros": Case(
            content=overwritten(large, len(large) - 3000, bytes(3000)),
            outcome=("truncated", "before its end marker"),
            quick=("JPEG", 480, 640),
        ),
        "jpeg cut in its header": Case(content=small[:100], outcome=cut_header),
        "jpeg cut and closed again": Case(
            content=large[: scan + 300] + b"\xff\xd9",
            outcome=("truncated", "too few for its 640 x 480 pixels"),
            quick=("JPEG", 480, 640),
            dali="decodes",
        ),
        "jpeg that claims 65,500 pixels a side": Case(
            content=jpeg_frame(small, height=65500, width=65500),
            outcome=("too many pixels", "65500 x 65500 = 4,290,250,000 pixels, over the limit of 178,956,970"),
        ),
        "jpeg that claims 4,000 pixels a side": Case(
            content=jpeg_frame(small, height=4000, width=4000),
            outcome=("truncated", "too few for its 4000 x 4000 pixels"),
            quick=("JPEG", 4000, 4000),
            dali="decodes",
        ),
        "jpeg with a hole": Case(
            content=overwritten(large, len(large) // 2, bytes(5000)),
            outcome=("damaged", "a hole of zero bytes"),
            quick=("JPEG", 480, 640),
            dali="decodes",
        ),
        "jpeg with noise": Case(
            content=overwritten(large, len(large) // 2, np.random.default_rng(5).bytes(4096)),
            outcome=("damaged", "in its compressed data"),
            quick=("JPEG", 480, 640),
            dali="decodes",
        ),
        "jpeg of height 0": Case(content=jpeg_frame(small, height=0), outcome=("no pixels", "64 x 0 pixels")),
        "jpeg of width 0": Case(content=jpeg_frame(small, width=0), outcome=("no pixels", "0 x 48 pixels")),
        "jpeg of 12 bits": Case(content=jpeg_frame(small, bits=12), outcome=("unsupported", "12 bits a channel")),
        "jpeg lossless": Case(content=jpeg_frame(small, marker=0xC3), outcome=("unsupported", "lossless")),
        "jpeg arithmetic": Case(
            content=jpeg_frame(small, marker=0xC9), outcome=("unsupported", "arithmetic-coded"), dali="decodes"
        ),
        "jpeg without image data": Case(content=b"\xff\xd8\xff\xd9", outcome=("damaged", "without image data")),
        "jpeg with garbage between segments": Case(
            content=small[:20] + b"xyz" + small[20:], outcome=("damaged", "no JPEG marker at byte 20")
        ),
        # PNG
        "png": Case(content=png, outcome=("PNG", H, W)),
        "png named .jpg": Case(content=png, outcome=("PNG", H, W)),
        "png of 16 bits": Case(content=encode(deep, "PNG"), outcome=("PNG", H, W)),
        "png of 1 bit": Case(content=encode(picture().convert("1"), "PNG"), outcome=("PNG", H, W)),
        "png with alpha": Case(content=encode(rgba, "PNG"), outcome=("PNG", H, W)),
        "png grey with alpha": Case(content=encode(rgba.convert("LA"), "PNG"), outcome=("PNG", H, W)),
        "png palette with alpha": Case(content=encode(palette, "PNG", transparency=3), outcome=("PNG", H, W)),
        "png animated": Case(content=frames("PNG"), outcome=("PNG", H, W)),
        "png turned by EXIF": Case(content=encode(picture(), "PNG", exif=turned), outcome=("PNG", W, H)),
        "png turned by late EXIF": Case(
            content=png[:-12] + png_chunk(b"eXIf", exif(6)) + png[-12:], outcome=("PNG", W, H), quick=("PNG", H, W)
        ),
        "png damaged EXIF": Case(
            content=png[:33] + png_chunk(b"eXIf", exif(6, entries=80)) + png[33:],
            outcome=("damaged", "its EXIF block is damaged"),
            dali="crashes",
        ),
        "png EXIF with a value out of bounds": Case(
            content=png[:33] + png_chunk(b"eXIf", exif(6)[:10] + struct.pack("<HHII", 0x10E, 2, 10, 2**31)) + png[33:],
            outcome=("damaged", "its EXIF block is damaged"),
            dali="decodes",
        ),
        "png cut": Case(content=png[: len(png) // 2], outcome=cut_header, quick=("PNG", H, W)),
        "png without end": Case(content=png[:-12], outcome=cut_header, quick=("PNG", H, W)),
        "png with a flipped bit": Case(
            content=overwritten(png, len(png) // 2, bytes([png[len(png) // 2] ^ 1])),
            outcome=("damaged", "checksum of PNG chunk b'IDAT'"),
            quick=("PNG", H, W),
        ),
        "png without data": Case(
            content=png_header(W, H) + png_chunk(b"IEND", b""), outcome=("damaged", "without image data"),
            quick=("truncated", "inside its header"),
        ),
        "png of width 0": Case(content=png_header(0, H) + png[33:], outcome=("no pixels", "0 x 48 pixels")),
        "png bomb": Case(
            content=png_header(60000, 60000) + png[33:],
            outcome=("too many pixels", "60000 x 60000 = 3,600,000,000 pixels, over the limit of 178,956,970"),
        ),
        # WebP
        "webp": Case(content=webp, outcome=("WebP", H, W)),
        "webp lossless": Case(content=lossless, outcome=("WebP", H, W)),
        "webp with alpha": Case(content=encode(rgba, "WEBP"), outcome=("WebP", H, W)),
        "webp animated": Case(content=frames("WEBP"), outcome=("WebP", H, W)),
        "webp turned by EXIF": Case(content=encode(picture(), "WEBP", exif=turned), outcome=("WebP", W, H)),
        "webp cut": Case(
            content=webp[:-4], outcome=("truncated", f"of the {len(webp)} its header promises"), quick=("WebP", H, W)
        ),
        "a WAV named .webp": Case(
            content=b"RIFF\x24\0\0\0WAVEfmt " + bytes(24), outcome=("not an image", "not WebP"), file="sound.webp"
        ),
        # the rest
        "bmp": Case(content=bmp, outcome=("BMP", H, W)),
        "bmp palette": Case(content=encode(palette, "BMP"), outcome=("BMP", H, W)),
        "bmp upside down": Case(
            content=overwritten(bmp, 22, struct.pack("<i", -H)), outcome=("BMP", H, W)
        ),
        "bmp cut": Case(content=bmp[:-1], outcome=("truncated", "image file is truncated"), quick=("BMP", H, W)),
        "bmp run-length-coded": Case(
            content=overwritten(encode(palette, "BMP"), 30, b"\2"), outcome=("unsupported", "run-length-coded")
        ),
        "bmp of 16 bits without masks": Case(
            content=overwritten(bmp, 28, b"\x10"), outcome=("unsupported", "16 bits a pixel without masks")
        ),
        "ppm": Case(content=ppm, outcome=("PNM", H, W)),
        "pgm in text": Case(content=b"P2\n# by hand\n2 1\n255\n1 2\n", outcome=("PNM", 1, 2)),
        "pgm in text, cut": Case(
            content=b"P2\n2 1\n255\n1 2", outcome=("truncated", "inside a number"), quick=("PNM", 1, 2)
        ),
        "pgm in text, a number too large": Case(
            content=b"P2\n2 1\n255\n1 256\n", outcome=("damaged", "too large"), quick=("PNM", 1, 2), dali="decodes"
        ),
        "ppm cut": Case(content=ppm[:-1], outcome=("truncated", "image file is truncated"), quick=("PNM", H, W)),
        "tiff": Case(content=tiff, outcome=("TIFF", H, W)),
        "tiff LZW": Case(content=lzw, outcome=("TIFF", H, W)),
        "tiff of 16 bits": Case(content=encode(deep, "TIFF"), outcome=("TIFF", H, W)),
        "tiff of two pages": Case(content=frames("TIFF"), outcome=("TIFF", H, W)),
        "tiff turned": Case(content=encode(picture(), "TIFF", tiffinfo={0x112: 6}), outcome=("TIFF", W, H)),
        "tiff turned by nonsense": Case(
            content=encode(picture(), "TIFF", tiffinfo={0x112: 9}), outcome=("TIFF", H, W)
        ),
        "tiff of floats": Case(
            content=encode(grey.convert("F"), "TIFF"), outcome=("unsupported", "a TIFF of [32] bits"), dali="decodes"
        ),
        "tiff cut": Case(content=tiff[:-20], outcome=("truncated", "image file is truncated"), quick=("TIFF", H, W)),
        "tiff LZW, damaged": Case(
            content=overwritten(lzw, 200, bytes(50)), outcome=("damaged", "Pillow cannot decode"), quick=("TIFF", H, W),
            dali="decodes",
        ),
        "gif": Case(content=encode(palette, "GIF"), outcome=("unsupported", "a GIF, which DALI does not decode")),
        "gif animated": Case(content=frames("GIF", palette), outcome=("unsupported", "a GIF")),
        "jpeg 2000": Case(content=encode(picture(), "JPEG2000"), outcome=("unsupported", "JPEG 2000"), dali="decodes"),
        "avif": Case(content=b"\0\0\0\x20ftypavif" + bytes(20), outcome=("unsupported", "AVIF or HEIC")),
        # no image at all
        "nothing": Case(content=b"", outcome=("empty", "0 bytes")),
        "one byte": Case(content=b"\xff", outcome=("not an image", "starts with b'\\xff'")),
        "a web page": Case(content=b"<html>404</html>", outcome=("not an image", "starts with b'<html>40'")),
        "random bytes": Case(content=b"\x01" + rng.bytes(5000), outcome=("not an image", "starts with")),
        "zeros": Case(content=bytes(5000), outcome=("not an image", "starts with")),
        "a zip archive": Case(content=b"PK\3\4" + bytes(99), outcome=("unsupported", "a zip archive")),
    }  # fmt: skip
    return cases


CASES = image_cases()
SOUND = jpeg(7, 20, 30)


def tree(root: str | os.PathLike[str]) -> dict[str, bytes]:
    """Return every file below `root` with its content, to see that nothing was written."""
    found = {}
    for folder, _, files in os.walk(root):
        for name in files:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    found[os.path.relpath(path, root)] = file.read()
    return found
