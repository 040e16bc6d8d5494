"""Checks of one encoded image: its format, its size as DALI shows it, and whether all of its bytes are there.

JPEG, PNG and WebP are read by hand, without decoding a pixel: these checks see damage that Pillow lets pass, at a tenth
of its cost. BMP, PNM and TIFF go through Pillow. Accepted is only what DALI decodes correctly (tests compare the two).

Sources: JPEG ITU-T T.81 B.2; Exif 3.0, 4.6; PNG 3rd edition (W3C); WebP RFC 9649.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import struct
import zlib
from functools import partial
from typing import Any, NamedTuple

import numpy as np

FORMATS = ("JPEG", "PNG", "WebP", "BMP", "PNM", "TIFF")
# Endings of file and member names that are taken for images. The format follows from the first bytes, not the ending.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
MAX_PIXELS = 178_956_970  # Pillow's limit of a decompression bomb: 512 MiB of RGB
MAX_BYTES = 2**27  # of one encoded image; bounds the memory of a reader

_JPEG, _PNG, _WEBP, _BMP, _PNM, _TIFF = range(len(FORMATS))
_FOREIGN = {  # formats worth a name in the message
    b"GIF8": "a GIF, which DALI does not decode",
    b"\0\0\0\x0cjP": "a JPEG 2000, which is not read",
    b"\0\0\1\0": "an icon",
    b"%PDF": "a PDF",
    b"PK\3\4": "a zip archive",
    b"\x1f\x8b": "gzip-compressed",
    b"P7\n": "a PAM, which DALI does not decode",
    b"PF\n": "a float PFM, which DALI does not decode",
    b"Pf\n": "a float PFM, which DALI does not decode",
    b"8BPS": "a Photoshop document",
}
_HOLE = bytes(4096)  # a disk block or page never written
_MAX_SEGMENTS = 10_000  # JPEG and PNG have some dozens; more would let a hostile file cost minutes

REASONS = (
    "empty", "not an image", "unsupported", "no pixels", "too many pixels", "too many bytes", "truncated", "damaged",
    "missing", "unreadable", "not a file", "duplicate", "no image", "bad shard",
)  # fmt: skip


class Header(NamedTuple):
    """Format (a position in FORMATS), width and height (in pixels after the EXIF orientation) of an image."""

    format: int
    width: int
    height: int


class BadImage(Exception):
    """An image that cannot be used: `reason` is one of REASONS, `detail` a sentence without the file's name."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class _Short(Exception):
    """The given bytes end too early; an argument is the BadImage to raise if the image has no more."""


def inspect(data: bytes, *, max_pixels: int = MAX_PIXELS, thorough: bool = True) -> Header:
    """Return the header of a whole encoded image; if `thorough`, only of an undamaged one.

    Sees a file that ends early anywhere, 4,096 and more bytes of zeros or noise in a JPEG's compressed data, and any
    changed byte of a PNG. Does not see a few changed bytes in other formats. Does not see zeros that a JPEG's own
    tables read as flat colour, nor a JPEG cut short and closed again while its pixels could fit into the rest.

    Raises:
        BadImage: the image cannot be used.
    """
    return _parse(data, len(data), max_pixels, thorough)


def inspect_header(start: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> Header | None:
    """Return the header of an image of `size` bytes from its first bytes, or None if these do not reach far enough.

    Raises:
        BadImage: the header shows that the image cannot be used; a missing end is not noticed.
    """
    if len(start) < size and start[:2] in (b"II", b"MM"):
        return None  # the header of a TIFF may lie at its end
    try:
        return _parse(start, size, max_pixels, thorough=False)
    except _Short:
        return None


def check_bytes(size: int) -> None:
    """Raise BadImage for an encoded image of `size` bytes that need not be read."""
    if size == 0:
        raise BadImage("empty", "0 bytes")
    if size > MAX_BYTES:
        raise BadImage("too many bytes", f"{size:,} bytes, over the limit of {MAX_BYTES:,}")


def no_image(data: bytes) -> BadImage:
    """Return the fault of bytes that start with none of `STARTS`."""
    for magic, what in _FOREIGN.items():
        if data.startswith(magic):
            return BadImage("unsupported", f"is {what}")
    if data[4:12] in (b"ftypavif", b"ftypavis", b"ftypheic", b"ftypmif1", b"ftypheix"):
        return BadImage("unsupported", "is an AVIF or HEIC, which DALI does not decode")
    return BadImage("not an image", f"starts with {data[:8]!r}, not as a JPEG, PNG, WebP, BMP, PNM or TIFF does")


def _parse(data: bytes, size: int, max_pixels: int, thorough: bool) -> Header:
    check_bytes(size)
    try:
        for magic, parse in _PARSERS.items():
            if data.startswith(magic):
                return parse(data, max_pixels, thorough)
    except _Short as short:
        if len(data) < size:
            raise
        fault = BadImage("truncated", f"ends after {size:,} bytes, inside its header")
        raise short.args[0] if short.args else fault from None
    raise no_image(data)


def _header(form: int, width: int, height: int, max_pixels: int, orientation: int = 1) -> Header:
    if width <= 0 or height <= 0:
        raise BadImage("no pixels", f"its header says {width} x {height} pixels")
    if width * height > max_pixels:
        raise BadImage(
            "too many pixels", f"{width} x {height} = {width * height:,} pixels, over the limit of {max_pixels:,}"
        )
    return Header(form, height, width) if 5 <= orientation <= 8 else Header(form, width, height)


def _bytes(data: bytes, at: int, n: int) -> bytes:
    piece = data[at : at + n]
    if len(piece) < n:
        raise _Short
    return piece


def _truncated(data: bytes, what: str) -> BadImage:
    return BadImage("truncated", f"ends after {len(data):,} bytes, {what}")


_BLOCK_BITS = {0xC0: 2, 0xC1: 2, 0xC2: 1}  # the fewest bits an 8 x 8 block takes: one code for DC, one for AC
_FACTORS = {16 * across + down for across in range(1, 5) for down in range(1, 5)}  # of a channel's sampling
_FRAMES = {0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)}  # processes that few decoders know
_IN_SCANS = {0xC4, 0xDA, 0xDB, 0xDC, 0xDD, 0xFE}  # segments allowed between the scans
_NO_MARKER = np.zeros(256, dtype=bool)  # bytes that follow 0xFF in compressed data: stuffing, restarts, fill
_NO_MARKER[[0x00, *range(0xD0, 0xD8), 0xFF]] = True


def _jpeg(data: bytes, max_pixels: int, thorough: bool) -> Header:
    at, orientation, upright, frame, process, busy = 2, 1, False, b"", 0, False
    for _ in range(_MAX_SEGMENTS):
        fill, marker = _bytes(data, at, 2)
        if fill != 0xFF:
            raise BadImage("damaged", f"no JPEG marker at byte {at:,}")
        if marker == 0xFF:
            at += 1
            continue
        if marker == 0xD9:
            raise BadImage("damaged", "a JPEG without image data")
        length = int.from_bytes(_bytes(data, at + 2, 2), "big")
        if length < 2:
            raise BadImage("damaged", f"a JPEG segment of {length} bytes at byte {at:,}")
        if marker in _BLOCK_BITS:
            frame, process = _bytes(data, at + 4, length - 2), marker
            _check_frame(frame, length)
        elif marker in _FRAMES:
            raise BadImage("unsupported", "an arithmetic-coded, lossless or hierarchical JPEG")
        elif marker == 0xC4:
            busy |= _check_huffman_tables(_bytes(data, at + 4, length - 2))
        elif marker == 0xDA:
            break
        elif marker == 0xE1:
            exif = _bytes(data, at + 4, length - 2)
            if exif.startswith(b"Exif\0\0"):  # the last of several blocks counts
                with contextlib.suppress(_Short):  # damaged metadata does not spoil a JPEG
                    said = _orientation(exif[6:])
                    upright |= said is not None and said < 5
                    orientation = said or orientation
        at += 2 + length
    else:
        raise BadImage("damaged", f"more than {_MAX_SEGMENTS:,} JPEG segments")
    if not frame:
        raise BadImage("damaged", "a JPEG without a frame header")
    if upright and orientation >= 5:  # DALI decodes the whole image, but no crop window
        raise BadImage("damaged", "its EXIF blocks disagree on its orientation")
    height, width = struct.unpack(">HH", frame[1:5])
    header = _header(_JPEG, width, height, max_pixels, orientation)
    if thorough:
        end = _jpeg_end(data, at)
        together = len(frame) == 6 + 3 * data[at + 4]  # one scan holds all channels, so the busy table applies
        if busy and together and process != 0xC2 and (hole := data.find(_HOLE, at, end)) >= 0:
            raise BadImage("damaged", f"a hole of zero bytes from byte {hole:,} on")
        factors = [(c >> 4, c & 15) for c in frame[7::3]]
        across, down = max(h for h, _ in factors), max(v for _, v in factors)
        units = -(-width // (8 * across)) * -(-height // (8 * down))
        blocks = units * sum(h * v for h, v in factors) if len(factors) > 1 else -(-width // 8) * -(-height // 8)
        if (end - at) * 8 < blocks * _BLOCK_BITS[process]:
            raise _truncated(data, f"too few for its {width} x {height} pixels")
    return header


def _check_frame(frame: bytes, length: int) -> None:
    if length < 11 or frame[5] not in (1, 3, 4) or length != 8 + 3 * frame[5] or not _FACTORS.issuperset(frame[7::3]):
        raise BadImage("damaged", "a damaged JPEG frame header")
    if frame[0] != 8:
        raise BadImage("unsupported", f"a JPEG with {frame[0]} bits a channel, where DALI decodes 8")


def _check_huffman_tables(tables: bytes) -> bool:
    """Return whether zero bits cannot be flat colour: some AC table reads them as more than the end of a block."""
    at, busy = 0, False
    while at < len(tables):
        codes = sum(tables[at + 1 : at + 17])
        if tables[at] & 0xEC or codes > 256 or at + 17 + codes > len(tables):
            raise BadImage("damaged", "a damaged JPEG Huffman table")
        busy |= tables[at] >= 0x10 and codes > 0 and tables[at + 17] != 0  # canonical codes: the first is 0
        at += 17 + codes
    return busy


def _jpeg_end(data: bytes, scan: int) -> int:
    """Return the position of the end marker, after a check of every marker from the scan at `scan` on."""
    body = np.frombuffer(data, dtype=np.uint8)[scan:]
    prefixes = np.flatnonzero(body[:-1] == 0xFF)
    markers = prefixes[~_NO_MARKER[body[prefixes + 1]]] + scan
    at, inside = scan, False
    for _ in range(_MAX_SEGMENTS):
        if inside:  # compressed data up to the next marker
            later = np.searchsorted(markers, at)
            if later == len(markers):
                raise _truncated(data, "before its end marker")
            at = int(markers[later])
        marker = data[at : at + 2]
        if marker == b"\xff\xd9":
            return at
        if marker == b"\xff\xff":
            at += 1
            continue
        if len(marker) == 2 and (marker[0] != 0xFF or marker[1] not in _IN_SCANS):
            raise BadImage("damaged", f"stray bytes {marker.hex()} at byte {at:,}, in its compressed data")
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if at + 4 > len(data) or at + 2 + length > len(data):
            raise _truncated(data, "before its end marker")
        at += 2 + length
        inside = marker[1] == 0xDA
    raise BadImage("damaged", f"more than {_MAX_SEGMENTS:,} JPEG segments")


def _orientation(exif: bytes, *, strict: bool = False) -> int | None:
    """Return the orientation in the first directory of an EXIF block: None if absent, 0 if out of range.

    Raises:
        _Short: the directory leaves the block, or, if `strict`, one of its values does.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return None
    found = None
    (directory,) = struct.unpack(order + "I", _bytes(exif, 4, 4))
    (entries,) = struct.unpack(order + "H", _bytes(exif, directory, 2))
    for i in range(entries):
        entry = _bytes(exif, directory + 2 + 12 * i, 12)
        tag, kind, count, place = struct.unpack(order + "HHII", entry)
        length = count * _EXIF_SIZES.get(kind, 0)
        if strict and length > 4:
            _bytes(exif, place + length - 1, 1)
        if tag == 0x112 and found is None and kind in _EXIF_INTEGERS:
            (found,) = struct.unpack_from(order + _EXIF_INTEGERS[kind], entry, 8)
    return found if found is None or found in range(1, 9) else 0


_EXIF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # bytes of a value, by type
_EXIF_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}


def _png(data: bytes, max_pixels: int, thorough: bool) -> Header:
    if _bytes(data, 8, 8) != b"\0\0\0\rIHDR":
        raise BadImage("damaged", "a PNG without a header chunk")
    width, height = struct.unpack(">II", _bytes(data, 16, 8))
    depth, colour, compression, filters, interlace = _bytes(data, 24, 5)
    _header(_PNG, width, height, max_pixels)  # a bomb ends here
    if depth not in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.get(colour, ()) or (
        compression or filters or interlace > 1
    ):
        raise BadImage("damaged", "a damaged PNG header")
    at, orientation, has_data, has_palette = 8, 1, False, colour != 3
    view = memoryview(data)
    for _ in range(len(data) // 12 + 1):
        length = int.from_bytes(_bytes(data, at, 4), "big")
        kind = _bytes(data, at + 4, 4)
        if thorough:
            check = int.from_bytes(_bytes(data, at + 8 + length, 4), "big")
            if zlib.crc32(view[at + 4 : at + 8 + length]) != check:
                raise BadImage("damaged", f"the checksum of PNG chunk {kind!r} at byte {at:,} is wrong")
        if kind == b"eXIf":
            orientation = _strict_orientation(_bytes(data, at + 8, length))
        elif not kind[0] & 32 and kind not in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            raise BadImage("damaged", f"an unknown PNG chunk {kind!r} at byte {at:,}")
        has_palette |= kind == b"PLTE"
        has_data |= kind == b"IDAT"
        if kind == (b"IEND" if thorough else b"IDAT"):
            break
        at += 12 + length
    if not has_data or not has_palette:
        raise BadImage("damaged", "a PNG without image data" if has_palette else "a PNG without its palette")
    return _header(_PNG, width, height, max_pixels, orientation)


def _strict_orientation(exif: bytes) -> int:
    """Return the orientation, 1 if absent. OpenCV, DALI's decoder of PNG and WebP, crashes on some damaged blocks."""
    try:
        return _orientation(exif, strict=True) or 1
    except _Short:
        raise BadImage("damaged", "its EXIF block is damaged, on which decoders crash") from None


def _webp(data: bytes, max_pixels: int, thorough: bool) -> Header:
    size = int.from_bytes(_bytes(data, 4, 4), "little") + 8
    if _bytes(data, 8, 4) != b"WEBP":
        raise BadImage("not an image", "a RIFF file, but not WebP")
    if thorough and len(data) < size:
        raise _truncated(data, f"of the {size:,} its header promises")
    at, flags, orientation = 12, 0, 1
    canvas = frame = None
    if _bytes(data, 12, 4) not in (b"VP8 ", b"VP8L", b"VP8X"):
        raise BadImage("damaged", "a WebP without image data")
    while at + 8 <= size:
        kind, length = struct.unpack("<4sI", _bytes(data, at, 8))
        if at + 8 + length > size:
            raise BadImage("damaged", f"WebP chunk {kind!r} at byte {at:,} leaves its file")
        if kind == b"VP8X":
            flags = _bytes(data, at + 8, 1)[0]
            bits = int.from_bytes(_bytes(data, at + 12, 6), "little")
            canvas = (bits & 0xFFFFFF) + 1, (bits >> 24) + 1
        elif kind == b"VP8 " and frame is None:
            if _bytes(data, at + 11, 3) != b"\x9d\x01\x2a":
                raise BadImage("damaged", "a damaged WebP frame header")
            width, height = struct.unpack("<HH", _bytes(data, at + 14, 4))
            frame = width & 0x3FFF, height & 0x3FFF
        elif kind == b"VP8L" and frame is None:
            if _bytes(data, at + 8, 1) != b"\x2f":
                raise BadImage("damaged", "a damaged WebP frame header")
            bits = int.from_bytes(_bytes(data, at + 9, 4), "little")
            frame = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        elif kind == b"ANMF" and flags & _WEBP_ANIMATED:
            frame = canvas  # decoders paint the first frame on the canvas
        elif kind == b"EXIF" and flags & _WEBP_EXIF:
            orientation = _strict_orientation(_bytes(data, at + 8, length))
        if frame is not None and not flags & _WEBP_EXIF and not thorough:
            break
        at += 8 + length + length % 2
    if frame is None or canvas not in (None, frame):
        raise BadImage("damaged", "a WebP without image data" if frame is None else "a WebP frame unlike its canvas")
    return _header(_WEBP, *frame, max_pixels, orientation)


_WEBP_ANIMATED, _WEBP_EXIF = 2, 8  # flags of the extended header


def _by_pillow(form: int, data: bytes, max_pixels: int, thorough: bool) -> Header:
    """Return the header that Pillow reads; if `thorough`, decode the pixels too."""
    from PIL import BmpImagePlugin, PpmImagePlugin, TiffImagePlugin

    # Image.open would try other formats too, and has its own limit of pixels
    plugins: tuple[Any, ...] = (BmpImagePlugin.BmpImageFile, PpmImagePlugin.PpmImageFile, TiffImagePlugin.TiffImageFile)
    try:
        with plugins[form - _BMP](io.BytesIO(data)) as image:
            if form == _TIFF:  # Image.size is turned or not, depending on Pillow's version
                tags = image.tag_v2
                header = _header(form, tags[256], tags[257], max_pixels, tags.get(274, 1))
            else:
                header = _header(form, image.width, image.height, max_pixels)
            _check_dali_decodes(form, image)
            if thorough:
                image.load()
    except BadImage:
        raise
    except Exception as error:  # hostile bytes make Pillow raise exceptions of many kinds
        text = f"{error}".strip().partition("\n")[0] or type(error).__name__
        reason = next((r for r in ("truncated", "unsupported") if r in text.lower()), "damaged")
        raise _Short(BadImage(reason, f"Pillow cannot decode its {len(data):,} bytes: {text}")) from None
    if thorough and data.startswith((b"P2", b"P3")) and data[-1:].isdigit():
        raise _truncated(data, "inside a number")
    return header


def _check_dali_decodes(form: int, image: Any) -> None:
    """Raise BadImage for what Pillow decodes and DALI does not, or decodes to garbage."""
    if form == _BMP:
        codec, _, _, (layout, *_) = image.tile[0]
        if codec != "raw" or (layout == "BGR;15" and not image.info["compression"]):
            raise BadImage("unsupported", "a BMP that is run-length-coded, or of 16 bits a pixel without masks")
    if form == _TIFF:
        tags = image.tag_v2
        bits, kinds, packing = set(tags.get(258, (1,))), set(tags.get(339, (1,))), tags.get(259, 1)
        if bits not in ({8}, {16}) or kinds != {1} or packing not in (1, 5, 7, 8, 32773, 32946):
            raise BadImage(
                "unsupported",
                f"a TIFF of {sorted(bits)} bits, sample format {sorted(kinds)}, compression {packing}, where 8 or 16 "
                "bits, unsigned, in common compressions are read",
            )


_PARSERS = {
    b"\xff\xd8": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"RIFF": _webp,
    b"BM": partial(_by_pillow, _BMP),
    **{b"P%c%c" % pair: partial(_by_pillow, _PNM) for pair in itertools.product(b"123456", b" \n\r\t")},
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), partial(_by_pillow, _TIFF)),
}
STARTS = tuple(_PARSERS)  # an image starts with one of these
