"""`lavaflow doctor`: whether a checkpoint works, whether its answers are right, and what it takes.

    files       what can be told without weights (`check.py`)
    processor   whether images and questions come out as the model reads them
                (`doctor_processor.py`)
    trials      questions of all lengths, packed, against transformers' `generate` on each prompt
                alone; other dtypes, attentions and quantizations (`doctor_trials.py`)

    the slow path is looked at by `doctor_alone.py`

A checkpoint that is wrong so far is not tried further. `doctor_text.py` tells the same to people.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jobs.baseline import Tokens
from jobs.bench import ran_against
from jobs.doctor_processor import QUESTIONS_OF, look_over, mixed_work
from jobs.doctor_trials import Build, Trials, build_engine, memory
from jobs.findings import Finding
from jobs.race import Say
from jobs.subject import Subject, load_subject
from jobs.workload import Workload, noise
from pipeline.engine.check import check_model
from pipeline.engine.checkpoint import open_checkpoint
from pipeline.engine.choose import why_plain
from pipeline.engine.load import device_of, load_family, own_padding_side
from pipeline.engine.memory import available_bytes
from schemas.errors import JobError, PromptError, SpecError
from schemas.job import ModelSpec

DTYPES = ("float32", "bfloat16", "float16")
FLASH, FLASH_DTYPE = "flash_attention_2", "bfloat16"
ATTENTIONS = ("sdpa", "eager", FLASH)
QUANTIZATIONS = ("8bit", "4bit")
FLOAT32_BYTES = 4 * 1.3
"""Of a weight, with what a forward pass needs beside it."""

Report = dict[str, Any]


def examine(spec: ModelSpec, *, say: Say, build: Build = build_engine) -> Report:
    """What there is to be said of a checkpoint, as JSON.

    Raises SpecError where there is none; what is wrong with one that is there is in the report.
    """
    from transformers.utils import logging

    open_checkpoint(spec)
    logging.set_verbosity_error()
    doctor = Doctor(spec, say, build)
    try:
        doctor.examine()
    except (SpecError, JobError, PromptError) as error:
        doctor.findings.append(Finding("checkpoint", "wrong", str(error)))
    return {
        "model": spec.path,
        "ok": all(finding.state != "wrong" for finding in doctor.findings),
        "findings": [asdict(finding) for finding in doctor.findings],
        **doctor.report,
    }


class Doctor:
    """One examination."""

    def __init__(self, spec: ModelSpec, say: Say, build: Build) -> None:
        self.spec, self.say, self.build = spec, say, build
        self.findings: list[Finding] = []
        self.report: Report = {}

    def examine(self) -> None:
        self.say("loading")
        check_model(self.spec)
        if (why := load_family(self.spec).why_slow) is not None:
            self.alone(why)
            return
        subject = load_subject(self.spec)
        self.findings += look_over(self.spec, subject)
        if any(finding.state == "wrong" for finding in self.findings):
            return
        images = noise(subject.image_shape, len(QUESTIONS_OF), seed=0)
        work = mixed_work(self.spec, subject, images)
        self.describe(subject, work)
        own, device = subject.dtype, device_of(self.spec)
        needed = int(FLOAT32_BYTES * self.report["ran"]["parameters"])
        del subject
        named = self.spec.model_copy(update={"device": device.type})
        trials = Trials(named, work, self.build)
        said = self.exact(trials, needed, available_bytes(device))
        quantized = self.quantizations(trials)
        self.dtypes(trials, own, said, quantized)
        self.attentions(trials, own, said)

    def alone(self, why: str) -> None:
        """A model on the slow path: nothing is packed, and little can go wrong."""
        from jobs.doctor_alone import Patient

        patient = Patient(self.spec)
        findings, report = patient.look_over(why)
        self.findings += findings
        self.report |= report
        needed = int(FLOAT32_BYTES * report["ran"]["parameters"])
        if (finding := _too_large(needed, available_bytes(device_of(self.spec)))) is not None:
            self.findings.append(finding)
            return
        self.say("the engine against generate, in float32")
        self.report["exact"] = patient.exact()
        self.findings.append(_exactness(self.report["exact"]))

    def describe(self, subject: Subject, work: Workload) -> None:
        """What it is, which engine it gets, and what its answers take."""
        why = why_plain(subject.model)
        self.report["ran"] = ran_against(subject)
        self.report["engine"] = {"name": "plain" if why else "slots", "why": why}
        self.report["memory"] = memory(subject, work)
        if why:
            told = f"the plain engine answers, each question with its image anew: {why}"
        else:
            told = "slots answer: an image's prompt is read once for all questions about it"
        self.findings.append(Finding("engine", "ok", told))

    def exact(self, trials: Trials, needed: int, available: int) -> list[Tokens] | None:
        """Gives what was said, where it could be tried."""
        if (finding := _too_large(needed, available)) is not None:
            self.findings.append(finding)
            return None
        self.say("batches against single prompts, in float32")
        self.report["exact"], said = trials.exact()
        self.findings.append(_exactness(self.report["exact"]))
        self.findings.append(_padding(self.spec, trials, said))
        return said

    def quantizations(self, trials: Trials) -> dict[str, list[Tokens]]:
        """Gives what was said in each that works."""
        said = {}
        self.report["quantization"] = {}
        for name in QUANTIZATIONS:
            self.say(f"quantization {name}")
            self.report["quantization"][name], tokens = trials.quantization(name)
            if tokens is not None:
                said[name] = tokens
        return said

    def dtypes(
        self,
        trials: Trials,
        own: str,
        said: Sequence[Tokens] | None,
        quantized: dict[str, list[Tokens]],
    ) -> None:
        """A model that its own dtype gives wrong answers in is wrong; others are worth knowing."""
        self.report["dtype"] = {}
        for name in DTYPES:
            if name == "float32" and said is None:
                continue
            self.say(f"dtype {name}")
            judged = quantized if name == own else {}
            found = trials.dtype(name, exact=said, quantized=judged)
            for kind, part in found.pop("quantized", {}).items():
                self.report["quantization"][kind] |= part
            self.report["dtype"][name] = {**found, "own": name == own}
            if not found["works"] and name == own:
                self.findings.append(Finding("dtype", "wrong", _dtype_fault(name, found)))

    def attentions(self, trials: Trials, own: str, said: Sequence[Tokens] | None) -> None:
        """In float32, where that could be tried; flash attention knows 16 bits only."""
        dtype = own if said is None else "float32"
        self.report["attention"] = {}
        for name in ATTENTIONS:
            self.say(f"attention {name}")
            if name == FLASH:
                self.report["attention"][name] = trials.attention(name, FLASH_DTYPE, None)
            else:
                self.report["attention"][name] = trials.attention(name, dtype, said)


def _too_large(needed: int, available: int) -> Finding | None:
    if needed <= available:
        return None
    return Finding(
        "answers",
        "unknown",
        f"not compared in float32: that takes about {needed / 1e9:.0f} GB, and "
        f"{available / 1e9:.0f} GB are free. Try it on a larger machine",
    )


def _exactness(found: Report) -> Finding:
    answers, about = found["answers"], "answers"
    is_packed = "others_in_a_small_room" in found
    if found["ok"]:
        how = ", short and long ones packed together," if is_packed else ""
        where = ", with much room and with little" if is_packed else ""
        return Finding(
            about,
            "ok",
            f"{answers} answers{how} are token for token what transformers' generate gives for "
            f"each prompt alone, in float32{where}",
        )
    other = max(len(found["different"]), found.get("others_in_a_small_room", 0))
    return Finding(
        about,
        "wrong",
        f"{other} of {answers} answers are others in a batch than alone, in float32: do not "
        "trust what this model answers here, and tell Lavaflow's authors which model it is",
    )


def _padding(spec: ModelSpec, trials: Trials, said: list[Tokens]) -> Finding:
    if own_padding_side(spec) == "left":
        return Finding("padding", "ok", "short prompts of a batch are padded on the left")
    return Finding(
        "padding",
        "mended",
        "the tokenizer pads short prompts on the right (padding_side in tokenizer_config.json, "
        "where it says so). A model goes on from the last place of its row, and padding is there "
        f"then: of {len(said)} answers that transformers' own generate gives to such a batch, "
        f"{trials.wrong_when_padded_right(said)} are wrong. Lavaflow pads on the left whatever the "
        "file says; for other programs, set padding_side to left",
    )


def _dtype_fault(name: str, found: Report) -> str:
    if why := found.get("why"):
        return f"it does not answer in {name}, its own dtype: {why}"
    return (
        f"in {name}, its own dtype, answers are not those of the model: only "
        f"{found['top']:.0%} of the tokens are the likeliest; set model.dtype to float32"
    )
