"""What `doctor` found, for people."""

import textwrap
from collections.abc import Iterator
from typing import Any

WIDTH = 100
INDENT = 28

Report = dict[str, Any]


def told(report: Report) -> str:
    """Findings, then what works and what it takes, then what came of it."""
    return "\n".join([*_head(report), *_findings(report), *_rest(report), _verdict(report)]) + "\n"


def _head(report: Report) -> Iterator[str]:
    if ran := report.get("ran"):
        yield (
            f"{report['model']}: {ran['parameters']:,} parameters, {ran['dtype']}, on "
            f"{'the CPU' if ran['device'] == 'cpu' else ran['device']}"
        )
    else:
        yield str(report["model"])
    yield ""


def _findings(report: Report) -> Iterator[str]:
    for finding in report["findings"]:
        yield _line(f"{finding['state']:<8} {finding['about']}", finding["text"])


def _rest(report: Report) -> Iterator[str]:
    yield ""
    for key, line in (("dtype", _dtype), ("attention", _attention), ("quantization", _quantized)):
        for name, found in report.get(key, {}).items():
            works = "works" if found["works"] else "no"
            yield _line(f"{works:<8} {name}", line(found))
    if memory := report.get("memory"):
        yield ""
        yield _line("memory", _memory(memory))


def _dtype(found: Report) -> str:
    own = ", the checkpoint's own" if found["own"] else ""
    if "why" in found:
        return f"dtype{own}: {found['why']}"
    text = (
        f"dtype{own}: {found['top']:.0%} of {found['tokens']} tokens are those that transformers "
        "finds likeliest on the prompt alone"
    )
    if not found["works"]:
        text += ", which is too few: do not use it"
    if "other_answers" in found:
        text += f"; {found['other_answers']} of {found['answers']} answers differ from float32's"
    return text


def _attention(found: Report) -> str:
    if "why" in found:
        return f"attention: {found['why']}"
    if "other_answers" not in found:
        return f"attention, tried in {found['dtype']}"
    if not found["other_answers"]:
        return "attention: gives the same answers"
    return f"attention, in {found['dtype']}: {found['other_answers']} answers are others"


def _quantized(found: Report) -> str:
    if "why" in found:
        return f"weights: {found['why']}"
    text = f"weights: {_size(found['weights_bytes'])}"
    if "forced" in found:
        text += (
            f"; {found['other_answers']} answers differ from the unquantized model's, which finds "
            f"{found['forced']['top']:.0%} of their tokens likeliest"
        )
    if others := found["others_in_a_small_room"]:
        text += f"; {others} depend on what is answered at the same time"
    return text


def _memory(memory: Report) -> str:
    return (
        f"weights {_size(memory['weights_bytes'])}; keys and values: "
        f"{_size(memory['kv_bytes_an_image'])} an image, {_size(memory['kv_bytes_a_question'])} a "
        f"question of {memory['question_tokens']} tokens with its answer; "
        f"{_size(memory['kv_budget_bytes'])} for them here (resources.generate.kv_budget_bytes) "
        f"hold {memory['images_at_once']:,} images with a question each at a time"
    )


def _verdict(report: Report) -> str:
    wrong = [finding for finding in report["findings"] if finding["state"] == "wrong"]
    if not wrong:
        unknown = any(finding["state"] == "unknown" for finding in report["findings"])
        return "\nNothing is wrong, as far as it was tried." if unknown else "\nNothing is wrong."
    rest = "" if "exact" in report else " Nothing else was tried: mend that, and ask again."
    return f"\nSomething is wrong: {', '.join(f['about'] for f in wrong)}.{rest}"


def _line(label: str, text: str) -> str:
    whole = textwrap.fill(
        text, WIDTH, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return f"{label:<{INDENT}}" + whole[INDENT:]


def _size(n_bytes: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000  # type: ignore[assignment]
    return f"{n_bytes:.3g} GB"
