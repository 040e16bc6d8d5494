"""The demo dataset: ten letters laid in mosaic, from which a tiny C-JEPA learns in a minute on a CPU.

Each image is a mosaic of about 144 irregular tiles; those nearest to the strokes of a letter are lighter on average.
Each tile has its own colour, lightness and contrast, each pixel its noise, each letter its place, size, aspect and
tilt. Image-wide colour and contrast do not give the class away: each letter lights the same share of the tiles (larger
ones have thinner strokes), and each image has a mid-grey mean.

Tile colours are independent, so some patches predict others through the letter's layout alone. Pixels show the layout
(20-NN on a 6 x 6 thumbnail: 98 %), pooled tokens only once they encode it. Measured with a prototype (width 96, depth
3, 36 tokens, 250 steps of 128, 36 s of one core), 20-NN of pooled target features, chance 10 %, six seeds: untrained 15
to 33 %, C-JEPA 58 to 72 %, I-JEPA (three seeds) 19 to 32 %. More steps are not better: 600 passed 59 % and fell to 31 %
(one seed), as features without the class took over. Earlier designs taught less (one seed each): letters in sharp
strokes 28 to 41 %, as edges are read untrained; free mean colours 15 to 22 %; quilts of ten patterns 46 to 48 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

DEMO_VERSION = "mosaic-letters-1"
IMAGE_SIZE = 48  # pixels
JPEG_QUALITY = 90
TILES = 12  # along a side
INK_SHARE = 0.28  # share of the tiles that the letter lights

# Strokes (x0, y0, x1, y1) in the letter's box [-1, 1]^2, y pointing down.
_STROKES: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    "F": ((-1, -1, -1, 1), (-1, -1, 1, -1), (-1, 0, 0.6, 0)),
    "H": ((-1, -1, -1, 1), (1, -1, 1, 1), (-1, 0, 1, 0)),
    "I": ((0, -1, 0, 1), (-0.6, -1, 0.6, -1), (-0.6, 1, 0.6, 1)),
    "L": ((-1, -1, -1, 1), (-1, 1, 1, 1)),
    "O": (
        (-1, -0.5, -1, 0.5), (-1, 0.5, -0.5, 1), (-0.5, 1, 0.5, 1), (0.5, 1, 1, 0.5),
        (1, 0.5, 1, -0.5), (1, -0.5, 0.5, -1), (0.5, -1, -0.5, -1), (-0.5, -1, -1, -0.5),
    ),
    "T": ((-1, -1, 1, -1), (0, -1, 0, 1)),
    "U": ((-1, -1, -1, 1), (-1, 1, 1, 1), (1, 1, 1, -1)),
    "V": ((-1, -1, 0, 1), (0, 1, 1, -1)),
    "X": ((-1, -1, 1, 1), (-1, 1, 1, -1)),
    "Z": ((-1, -1, 1, -1), (1, -1, -1, 1), (-1, 1, 1, 1)),
}  # fmt: skip
CLASSES: tuple[str, ...] = tuple(_STROKES)


def write_demo_dataset(root: Path, *, train_per_class: int = 300, test_per_class: int = 100, seed: int = 0) -> None:
    """Write `root/{train,test}/<class>/NNNNN.jpg`: RGB, `IMAGE_SIZE` pixels square, 2 to 3 kB each.

    The same seed gives the same files (under the same NumPy and Pillow). Each split and class has its own stream, so
    more images per class only add files.

    Raises:
        FileExistsError: `root` holds a class folder already.
    """
    from PIL import Image

    for split, (name, n) in enumerate((("train", train_per_class), ("test", test_per_class))):
        for label, letter in enumerate(CLASSES):
            folder = root / name / letter
            folder.mkdir(parents=True)
            for i, image in enumerate(_images(letter, n, (seed, split, label))):
                Image.fromarray(image).save(folder / f"{i:05d}.jpg", quality=JPEG_QUALITY)


def _images(letter: str, n: int, seed: tuple[int, ...], chunk: int = 20) -> Iterator[np.ndarray]:
    """Yield n images, uint8 [IMAGE_SIZE, IMAGE_SIZE, 3], drawn in whole chunks so that image i does not depend on n."""
    import numpy as np

    rng = np.random.default_rng(seed)
    for start in range(0, n, chunk):
        yield from _mosaic(letter, chunk, rng)[: n - start]


def _mosaic(letter: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n mosaics of one letter, uint8 [n, IMAGE_SIZE, IMAGE_SIZE, 3]."""
    import numpy as np

    f32 = np.float32
    grid = TILES + 3  # margins for the random offset and for the neighbours
    # Tile seeds in tile units: one per cell of a grid, jittered. [n, grid * grid, 2] as (y, x)
    cell = np.stack(np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij"), -1).reshape(-1, 2)
    seeds = (cell + rng.uniform(0.1, 0.9, (n, grid * grid, 2))).astype(f32)
    origin = (1 + rng.uniform(0, 1, (n, 2))).astype(f32)  # where the image's corner lies on the grid

    # A pixel belongs to the nearest seed of its own cell and the eight around it: Voronoi tiles, near enough.
    pixel = (np.arange(IMAGE_SIZE, dtype=f32) + 0.5) * (TILES / IMAGE_SIZE)
    y = (pixel + origin[:, :1])[:, :, None]  # [n, H, 1]
    x = (pixel + origin[:, 1:])[:, None, :]  # [n, 1, W]
    image = np.arange(n)[:, None, None]
    nearest = np.full((n, IMAGE_SIZE, IMAGE_SIZE), np.inf, f32)
    tile = np.zeros(nearest.shape, np.int32)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            candidate = (y.astype(np.int32) + dy) * grid + x.astype(np.int32) + dx
            at = seeds[image, candidate]
            distance = (y - at[..., 0]) ** 2 + (x - at[..., 1]) ** 2
            closer = distance < nearest
            nearest[closer], tile[closer] = distance[closer], candidate[closer]

    lit = _lit((seeds - origin[:, None]) * f32(2 / TILES) - 1, letter, rng)[..., None]  # [n, grid * grid, 1]
    lightness = 0.5 + rng.uniform(-0.15, 0.15, lit.shape)
    tint = rng.normal(0, 0.1, (*lit.shape[:2], 3))
    contrast = rng.uniform(0.3, 0.6, lit.shape)
    colour = (lightness + tint + contrast * (lit - 0.5)).astype(f32)
    rgb = colour[image, tile] + f32(0.06) * rng.standard_normal((*tile.shape, 3), dtype=f32)
    rgb += 0.5 - rgb.mean((1, 2), keepdims=True)
    return (rgb.clip(0, 1) * 255).astype(np.uint8)


def _lit(seeds: np.ndarray, letter: str, rng: np.random.Generator) -> np.ndarray:
    """Return the tiles that the letter lights, bool [n, T]: the `INK_SHARE` of them nearest to its strokes.

    Args:
        seeds: [n, T, 2] as (y, x), in units where the image is [-1, 1]^2.
    """
    import numpy as np

    n = len(seeds)

    def draw(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (n, 1)).astype(np.float32)

    tilt, height = np.deg2rad(draw(-8, 8)), draw(0.6, 0.75)
    width = height * draw(0.85, 1.15)
    y, x = seeds[..., 0] - draw(-0.15, 0.15), seeds[..., 1] - draw(-0.15, 0.15)
    u = (np.cos(tilt) * x + np.sin(tilt) * y) / width
    v = (np.cos(tilt) * y - np.sin(tilt) * x) / height
    distance = np.full(u.shape, np.inf, np.float32)
    for x0, y0, x1, y1 in _STROKES[letter]:
        dx, dy = x1 - x0, y1 - y0
        along = (((u - x0) * dx + (v - y0) * dy) / (dx * dx + dy * dy)).clip(0, 1)
        distance = np.minimum(distance, np.hypot(u - x0 - along * dx, v - y0 - along * dy))
    distance[(np.abs(seeds) > 1).any(-1)] = np.inf  # tiles centred outside the image take no ink
    rank = int(TILES * TILES * INK_SHARE)
    return distance < np.partition(distance, rank, axis=1)[:, rank, None]
