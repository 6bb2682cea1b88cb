"""Whether an image is of the kind that the embedded model knows.

It knows one coloured shape on a light, plain background, and answers anything else with the same
confidence: whoever asks it about other images has to be told.
"""

import numpy as np
from PIL import Image

SIDE_PX = 64
MAX_DISTANCE = 48.0
MIN_SHARE = 0.9
MIN_BACKGROUND = 200.0


def is_coloured_shape(image: Image.Image) -> bool:
    """Whether nearly all pixels of an RGB image are one light colour or one other colour."""
    small = image.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.float32).reshape(-1, 3)
    background = np.median(pixels, axis=0)
    from_background = np.linalg.norm(pixels - background, axis=1)
    shape = pixels[from_background > MAX_DISTANCE]
    if background.min() < MIN_BACKGROUND or len(shape) == 0:
        return False
    from_shape = np.linalg.norm(pixels - np.median(shape, axis=0), axis=1)
    nearest = np.minimum(from_background, from_shape)
    return bool((nearest < MAX_DISTANCE).mean() >= MIN_SHARE)
