"""Prompts that need not be written: by name, in `preset` of an entry of `ask`.

    about a question    short-answer, multiple-choice, yes-no: what follows the question, in the
                        words that LLaVA-1.5 was trained with ("Improved Baselines with Visual
                        Instruction Tuning", arXiv 2310.03744, section 3.2 and appendix)
    about the image     brief-caption, detailed-caption, as in that paper's lists of instructions;
                        instruct-*, for the three kinds of LLaVA's instruction data ("Visual
                        Instruction Tuning", arXiv 2304.08485, section 3). In our own words.

Changing a text here changes answers, and so the fingerprint of every question that uses it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

PresetName = Literal[
    "short-answer",
    "multiple-choice",
    "yes-no",
    "brief-caption",
    "detailed-caption",
    "instruct-conversation",
    "instruct-detail",
    "instruct-reasoning",
]


@dataclass(frozen=True)
class Preset:
    """`prompts`: one of them is drawn for each row, by `generate.seed` and the row; where there are
    none, the entry brings the question. `ending`: a line behind it. `lists_choices`: they stand
    between the two, each behind a letter, and the letters are what is scored. `defaults`: keys of
    `ask` that the entry leaves out."""

    prompts: tuple[str, ...] = ()
    ending: str = ""
    lists_choices: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What decides a prompt."""
        return {name: value for name, value in asdict(self).items() if name != "defaults"}


PRESETS: Mapping[PresetName, Preset] = {
    "short-answer": Preset(
        ending="Answer the question using a single word or phrase.",
        defaults={"max_new_tokens": 16},
    ),
    "multiple-choice": Preset(
        ending="Answer with the option's letter from the given choices directly.",
        lists_choices=True,
    ),
    "yes-no": Preset(
        ending="Please answer yes or no.",
        defaults={"choices": ("Yes", "No")},
    ),
    "brief-caption": Preset(
        prompts=(
            "Describe the image in one sentence.",
            "Give a short caption for this picture.",
            "What does this image show? Answer in one sentence.",
            "Summarise what can be seen in the picture, briefly.",
            "Write a brief, factual caption of the image.",
            "In one short sentence, say what this photo is of.",
            "Name the main content of the image in a single sentence.",
            "Provide a concise description of the scene.",
        ),
        defaults={"max_new_tokens": 64},
    ),
    "detailed-caption": Preset(
        prompts=(
            "Describe the image in detail.",
            "Give a thorough description of everything that can be seen in this picture.",
            "Explain in detail what this image shows, from the foreground to the background.",
            "Write a paragraph that describes the scene, its objects and how they are arranged.",
            "Look closely at the image and describe all of its visible details.",
            "What is in this picture? Describe objects, colours, positions and any text.",
            "Provide a complete and precise account of the contents of the image.",
            "Characterise the image with a detailed description.",
        ),
        defaults={"max_new_tokens": 256},
    ),
    "instruct-conversation": Preset(
        prompts=(
            "Write a conversation between a person who asks about this image and an assistant who "
            "sees it. Ask about kinds, numbers, actions, places and positions of what is visible, "
            "and only what the image answers with certainty. Begin each question with 'Question:' "
            "and each answer with 'Answer:'.",
        ),
        defaults={"max_new_tokens": 512},
    ),
    "instruct-detail": Preset(
        prompts=(
            "Describe the image as completely as you can, for somebody who cannot see it: what "
            "there is, what it looks like, where it is and what happens.",
            "Analyse the image comprehensively, detail after detail.",
            "Write a rich description of this image that leaves nothing visible out.",
            "Go through the picture part by part and describe each of them in depth.",
        ),
        defaults={"max_new_tokens": 512},
    ),
    "instruct-reasoning": Preset(
        prompts=(
            "Ask one question about this image whose answer takes several steps of reasoning about "
            "what is visible, its causes, its background or what will follow. Then answer it step "
            "by step. Begin with 'Question:' and 'Answer:'.",
        ),
        defaults={"max_new_tokens": 512},
    ),
}
