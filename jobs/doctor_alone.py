"""What `doctor` says of a model on the slow path: whether the engine says what the model does."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs.bench import ran_with
from jobs.doctor_processor import MOST_TOKENS, QUESTIONS
from jobs.findings import Finding
from jobs.workload import noise
from pipeline.engine.alone import AloneEngine
from pipeline.engine.checkpoint import dtype_name, open_checkpoint
from pipeline.engine.load import device_of, load_model, load_processor
from pipeline.engine.memory import weights_bytes
from pipeline.engine.request import Answer, Branch, ImagePixels, Prefix, Request
from pipeline.engine.wholeprocessor import WholeProcessor
from pipeline.tokenise import Tokeniser
from schemas.job import ModelSpec

SHAPES = ((64, 96, 3), (200, 90, 3))

Report = dict[str, Any]


@dataclass(frozen=True)
class Patient:
    """A checkpoint on the slow path. Raises SpecError for one that cannot be asked."""

    spec: ModelSpec

    def look_over(self, why: str) -> tuple[list[Finding], Report]:
        """All but what it says."""
        processor: Any = load_processor(self.spec)
        shown = Tokeniser(self.spec, processor).render(QUESTIONS[0], ())
        image = _images()[0]
        places = len(WholeProcessor(processor).ids(shown, image))
        model: Any = load_model(self.spec, device_of(self.spec))
        told = (
            f"the slow path: each question alone, with its image anew, by its own generate: {why}"
        )
        findings = [
            Finding("engine", "ok", told),
            Finding("chat template", "ok", f"a question becomes {shown!r}"),
            Finding(
                "image tokens",
                "ok",
                f"with an image of {image.width} x {image.height} pixels these are {places} "
                f"tokens, as {type(processor).__name__} writes them",
            ),
        ]
        dtype = dtype_name(self.spec, open_checkpoint(self.spec))
        return findings, {
            "ran": ran_with(self.spec.path, dtype, model),
            "engine": {"name": "alone", "why": why},
            "weights_bytes": weights_bytes(model),
        }

    def exact(self) -> Report:
        """In float32, token for token."""
        spec = self.spec.model_copy(update={"dtype": "float32"})
        processor: Any = load_processor(spec)
        model: Any = load_model(spec, device_of(spec))
        tokeniser, whole = Tokeniser(spec, processor), WholeProcessor(processor)
        requests, expected = [], []
        for image in _images():
            for question in QUESTIONS:
                prompt = tokeniser.render(question, ())
                branch = Branch(tuple(whole.ids(prompt, image)), MOST_TOKENS)
                pixels = np.frombuffer(whole.of_image(image), np.uint8)
                requests.append(
                    Request(Prefix((), [ImagePixels(pixels, "", image.size)]), [branch])
                )
                expected.append(_said(model, processor, prompt, image))
        # Without end tokens, both sides.
        engine = AloneEngine(model, processor=processor, eos_token_ids=())
        outcomes = [outcome for (outcome,) in engine.submit(requests)]
        equal = [
            isinstance(outcome, Answer) and list(outcome.token_ids) == said
            for outcome, said in zip(outcomes, expected, strict=True)
        ]
        different = [number for number, is_equal in enumerate(equal) if not is_equal]
        return {
            "compared_with": "tokens of generate on the single unpadded prompt",
            "answers": len(equal),
            "different": different,
            "ok": not different,
        }


@torch.inference_mode()
def _said(model: Any, processor: Any, prompt: str, image: Image.Image) -> list[int]:
    """By generate, from what the processor gives."""
    model.generation_config.eos_token_id = None
    bos = processor.tokenizer.bos_token
    options = {"add_special_tokens": False} if bos and prompt.startswith(bos) else {}
    inputs = processor(text=prompt, images=image, return_tensors="pt", **options)
    inputs.pop("labels", None)
    inputs = inputs.to(model.device, model.dtype)
    whole = model.generate(**inputs, do_sample=False, max_new_tokens=MOST_TOKENS)
    said: list[int] = whole[0, inputs["input_ids"].shape[1] :].tolist()
    return said


def _images() -> list[Image.Image]:
    return [Image.fromarray(noise(shape, 1, seed=0)[0]) for shape in SHAPES]
