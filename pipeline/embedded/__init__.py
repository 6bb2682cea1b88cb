"""The small LLaVA that ships inside the package, and shards of images that it understands.

It makes the first command work without a network or a GPU: a CLIP vision tower, a projector and a
Llama of 2.2 million parameters together, trained by `tools/train_embedded.py` to answer questions
about one coloured shape on a light background, and nothing else. The files are an ordinary
checkpoint: the pipeline loads it as it loads any other LLaVA. Imports no torch.
"""

from pathlib import Path
from typing import Final

CHECKPOINT: Final[Path] = Path(__file__).parent / "checkpoint"
SAMPLES: Final[Path] = Path(__file__).parent / "samples"
