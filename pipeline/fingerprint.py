"""What decides an answer, as short hashes: whether a table may be continued.

One side is the model's (weights, processor, dtype, quantization, template, limits), one is each
question's.
Attention kernel, device, batch size and actors do not decide an answer and are left out. Runs on
the driver and imports no torch.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from textwrap import shorten

from pipeline.engine.checkpoint import Checkpoint, dtype_name, open_checkpoint
from pipeline.engine.repair import FILE as PROCESSOR_FILE
from pipeline.engine.repair import repaired
from pipeline.formats import FORMATS, format_of, given_template
from pipeline.script import Script, scripts_of
from schemas.ask import DRAWN, ROW_QUESTIONS, Ask, AskPrompt, AskRow, default_of
from schemas.job import JobSpec, SourceSpec
from schemas.tables import SCHEMA_VERSION

TEMPLATES = frozenset({"chat_template.jinja", "chat_template.json"})
PROCESSOR_SUFFIXES = (".json", ".jinja", ".model", ".txt")
ONLY_DRAWN = {*DRAWN, "seed"}
"""Keys that mean nothing where always the likeliest token is taken."""
MOST_CHARACTERS = 80
"""Of a question's text in its fingerprint; what decides is the hash."""
NOT_DECIDING = frozenset({"model.safetensors.index.json", "README.md"})


def model_fingerprint(job: JobSpec) -> dict[str, str]:
    """Named components, each a readable value or a hash, so that a refusal can say which differs.

    Costs a read of the weights of a local folder; a hub id is known by its commit, weights in a
    store by their etags.
    """
    checkpoint = open_checkpoint(job.model)
    pinned = None if checkpoint.stored else checkpoint.commit
    columns = job.source.columns
    quantization = job.model.quantization
    return {
        "weights": f"commit {pinned}" if pinned else _of_files(checkpoint, checkpoint.weights),
        "processor": f"commit {pinned}" if pinned else _of_files(checkpoint, _texts(checkpoint)),
        "dtype": dtype_name(job.model, checkpoint),
        # Only where there is any: tables of unquantized models were begun before there was this.
        **({} if quantization == "none" else {"quantization": quantization}),
        **({"code": _code(checkpoint)} if job.model.trust_remote_code else {}),
        "template": _template(checkpoint, job.model.chat_template),
        "system_prompt": digest({"text": job.model.system_prompt}),
        "image": digest({"column": columns.image}),
        "pixels": _pixels(job.source),
        "conversation": digest({"column": columns.conversation}),
        "where": job.source.where or "every row",
        "schema_version": str(SCHEMA_VERSION),
    }


def _pixels(source: SourceSpec) -> str:
    """How images are decoded, and which are not."""
    truncated = "truncated ones too" if source.allow_truncated else "no truncated ones"
    return (
        f"{source.decode}, up to {source.max_image_pixels} pixels and {source.max_image_bytes} "
        f"bytes, {truncated}"
    )


def question_fingerprints(job: JobSpec) -> dict[str, str]:
    """One hash for each unit of the job: what is asked, and how it is answered.

    Beside it how the question begins, for people to whom a refusal has to name it.
    """
    prints: dict[str, str] = {}
    for unit, script in scripts_of(job).items():
        ask = script.ask
        needed = {each: prints[each] for each in script.needs}
        hashed = digest({**_asked(job, script), **_answering(job, ask), **_beside(ask, needed)})
        limit = f"at most {job.decoding(ask).max_new_tokens} tokens"
        told = f"column {job.source.columns.questions}"
        if isinstance(ask, AskPrompt):
            first = next(iter(ask.texts), f"preset {ask.preset}")
            told = shorten(first, MOST_CHARACTERS, placeholder="...")
        prints[unit] = (
            f"{told} ({f'{len(ask.choices)} choices' if ask.choices else limit}, {hashed})"
        )
    return prints


def _asked(job: JobSpec, script: Script) -> dict[str, object]:
    """The words of a question."""
    ask = script.ask
    if isinstance(ask, AskRow):
        return {"from": ROW_QUESTIONS, "column": job.source.columns.questions}
    if ask.turns:
        return {"turns": ask.turns}
    if ask.prompt is not None:
        return {"prompt": ask.prompt}
    # What is drawn for a row follows from the seed.
    return {"drawn": script.seed} if len(ask.words.prompts) > 1 else {}


def _beside(ask: Ask, needed: Mapping[str, str]) -> dict[str, object]:
    """What else decides what is asked, as far as there is any of it."""
    known = {
        "preset": ask.words.to_json() if ask.preset else None,
        "when": ask.when,
        "shots": [shot.model_dump() for shot in ask.shots],
        "needs": needed,
    }
    return {name: value for name, value in known.items() if value}


def _answering(job: JobSpec, ask: Ask) -> dict[str, object]:
    """What decides the answers to a question, among the keys of `ask` and `generate`."""
    if ask.choices:
        return {"choices": ask.choices, "length_normalise": ask.length_normalise}
    decoding = job.decoding(ask)
    deciding = decoding.model_dump(exclude=None if decoding.temperature else ONLY_DRAWN)
    known: dict[str, object] = {
        name: value
        for name, value in deciding.items()
        if name == "max_new_tokens" or value != default_of(name)
    }
    if ask.json_schema is not None:
        # As text: an answer has its keys in the order of the schema.
        known["json_schema"] = json.dumps(ask.json_schema)
    return known


def digest(components: Mapping[str, object]) -> str:
    """A short hash of a mapping, the same for any order of its keys: 16 hex digits."""
    text = json.dumps(dict(components), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _texts(checkpoint: Checkpoint) -> list[str]:
    """Configurations, tokenizer and template: every file but the weights that could matter."""
    return sorted(
        name
        for name in checkpoint.files
        if name.endswith(PROCESSOR_SUFFIXES) and name not in NOT_DECIDING
    )


def _code(checkpoint: Checkpoint) -> str:
    """The Python files that the checkpoint brings."""
    if checkpoint.commit and not checkpoint.stored:
        return f"commit {checkpoint.commit}"
    return _of_files(checkpoint, sorted(n for n in checkpoint.files if n.endswith(".py")))


def _template(checkpoint: Checkpoint, given: str | None) -> str:
    if template := given_template(given):
        return digest({"template": template})
    if files := sorted(TEMPLATES & checkpoint.files):
        return _of_files(checkpoint, files)
    for name in ("tokenizer_config.json", "processor_config.json"):
        if template := checkpoint.read_json(name).get("chat_template"):
            return digest({"template": template})
    return digest({"template": FORMATS[format_of(checkpoint)]})


def _of_files(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """A hash of the files' names and contents, whatever folder they lie in: 16 hex digits."""
    whole = hashlib.sha256()
    for name in names:
        whole.update(f"{name} {_content(checkpoint, name)}\n".encode())
    return whole.hexdigest()[:16]


def _content(checkpoint: Checkpoint, name: str) -> str:
    """A processor that is set right while it is loaded counts as one that was right."""
    if name == PROCESSOR_FILE and (right := repaired(checkpoint)) is not None:
        return hashlib.sha256(right).hexdigest()
    if checkpoint.stored is not None and name in checkpoint.weights:
        return checkpoint.stored.files[name].identity
    with checkpoint.open(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
