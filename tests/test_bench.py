"""`lavaflow bench`: what is measured is what it says, and a wrong answer does not pass."""

import dataclasses
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from jobs import agreement
from jobs.agreement import TIE
from jobs.baseline import Baseline, Setting, twin
from jobs.bench import Bench, build_engine, measure
from jobs.cli import main
from jobs.endtoend import measure_jobs
from jobs.photos import write_shards
from jobs.subject import Subject, load_subject, random_subject, save_random
from jobs.workload import Row, Workload, caption_lengths, captions, noise, questions
from pipeline.engine.reference import random_model
from pipeline.engine.request import Answer, Engine, Outcome, Request
from schemas.errors import DeviceOutOfMemory, JobError, SpecError
from schemas.job import ModelSpec
from tests.models import shared_checkpoint

N_IMAGES, N_QUESTIONS = 3, 4


@pytest.fixture(scope="module")
def subject() -> Subject:
    return load_subject(ModelSpec(path=str(shared_checkpoint())))


@pytest.fixture(scope="module")
def work(subject: Subject) -> Workload:
    images = noise(subject.image_shape, N_IMAGES, seed=1)
    return questions(subject.vocabulary, images, each=N_QUESTIONS, new_tokens=4, seed=1)


def bench_of(**changed) -> Bench:
    tiny = Bench(
        mode="vqa",
        images=N_IMAGES,
        questions=N_QUESTIONS,
        new_tokens=4,
        model=str(shared_checkpoint()),
        batch_sizes=(2, 4),
        rounds=3,
        checked=12,
    )
    return dataclasses.replace(tiny, **changed)


def quiet(text: str) -> None:
    pass


class Broken:
    """An engine that changes what another one says before anybody sees it."""

    def __init__(self, engine: Engine, change) -> None:
        self._engine, self._change = engine, change

    def submit(self, requests: Sequence[Request]) -> list[list[Outcome]]:
        answered = [list(outcomes) for outcomes in self._engine.submit(requests)]
        self._change(answered)
        return answered


def broken(change):
    return lambda subject: Broken(build_engine(subject), change)


def one_token_wrong(answered: list[list[Answer]]) -> None:
    answer = answered[1][2]
    wrong = (*answer.token_ids[:-1], answer.token_ids[-1] ^ 1)
    answered[1][2] = dataclasses.replace(answer, token_ids=wrong)


def siblings_swapped(answered: list[list[Answer]]) -> None:
    for outcomes in answered:
        outcomes.reverse()


# What is reported


@pytest.fixture(scope="module")
def report() -> dict:
    return measure(bench_of(), say=quiet)


def test_the_report_can_be_read_by_a_script(report: dict) -> None:
    assert json.loads(json.dumps(report)) is not None
    assert report["unit"] == "questions/s"
    assert set(report["rates"]) == {"engine", "generate", "generate_static"}
    assert all(len(rate["rounds"]) == 3 for rate in report["rates"].values())
    assert report["work"]["rows"] == N_IMAGES * N_QUESTIONS
    ran = report["ran"]
    assert ran["model"] == str(shared_checkpoint())
    assert (ran["dtype"], ran["threads"]) == ("float32", torch.get_num_threads())
    assert {"python", "torch", "transformers", "lavaflow"} == set(ran["versions"])


def test_a_speedup_is_the_median_of_the_rounds_ratios(report: dict) -> None:
    rates = report["rates"]
    for name in ("", "_static"):
        pairs = zip(rates["engine"]["rounds"], rates["generate" + name]["rounds"], strict=True)
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        assert report["speedup" + name] == pytest.approx(ratios[1], abs=0.01)


def test_the_best_batch_size_is_the_one_that_counts(report: dict) -> None:
    for kind, tried in report["trials"].items():
        assert set(tried) == {2, 4}
        counted = report["rates"][kind]["batch_size"]
        assert tried[counted] >= 0.9 * max(tried.values())


def test_captions_are_also_measured_against_lengths_known_beforehand() -> None:
    report = measure(bench_of(mode="caption", questions=1, rounds=1), say=quiet)
    assert report["unit"] == "useful tokens/s"
    assert {"speedup", "speedup_static", "speedup_sorted"} <= set(report)
    assert report["ok"]


# Agreement


def test_answers_that_are_right_agree(report: dict) -> None:
    exact = report["agreement"]["float32"]
    assert report["ok"]
    assert (exact["answers"], exact["equal"]) == (12, 12)


def test_bfloat16_is_compared_by_its_logits_and_once_more_in_float32() -> None:
    report = measure(bench_of(dtype="bfloat16", rounds=1), say=quiet)
    assert report["ok"]
    assert report["agreement"]["bfloat16"]["engine"]["tokens"] == 12 * 4
    assert report["agreement"]["float32"]["equal"] == 12


@pytest.mark.parametrize("change", [one_token_wrong, siblings_swapped])
def test_a_wrong_answer_is_found_in_float32(change) -> None:
    report = measure(bench_of(rounds=1), say=quiet, build=broken(change))
    assert not report["ok"]
    different = report["agreement"]["float32"]["different"]
    if change is one_token_wrong:
        assert [(each["row"], each["token"]) for each in different] == [(6, 3)]
    else:
        assert len(different) > 6


def test_wrong_answers_are_found_by_bfloat16_logits() -> None:
    bench = bench_of(dtype="bfloat16", rounds=1, is_exact=False)
    report = measure(bench, say=quiet, build=broken(siblings_swapped))
    assert set(report["agreement"]) == {"bfloat16"}
    assert not report["ok"]
    assert report["agreement"]["bfloat16"]["generate"]["ok"]


class Alone:
    """Stands for a model whose two likeliest tokens, 0 and 1, are this far apart at each step."""

    def __init__(self, gap: float) -> None:
        self._gap = gap

    def alone(self, row: Row) -> tuple[list[int], torch.Tensor]:
        return [0] * row.new_tokens, torch.tensor([[self._gap, 0.0, -5.0]] * row.new_tokens)


@pytest.mark.parametrize(
    ("gap", "said", "outcome"),
    [
        (1.0, [0, 0, 0], "equal"),
        (TIE / 2, [0, 1, 2], "excused_by_a_tie"),
        (TIE * 2, [0, 1, 0], "different"),
        (TIE / 2, [0, 2, 0], "different"),
        (TIE / 2, [0, 0], "different"),
    ],
)
def test_only_a_tie_excuses_another_token(gap: float, said: list[int], outcome: str) -> None:
    found = agreement.exact(Alone(gap), [Row(0, (5,), 3)], {0: said})
    counts = {**found, "different": len(found["different"])}
    assert {name: counts[name] for name in ("equal", "excused_by_a_tie", "different")} == {
        name: int(name == outcome) for name in ("equal", "excused_by_a_tie", "different")
    }
    assert found["ok"] == (outcome != "different")


def test_more_than_one_excuse_in_a_hundred_is_a_disagreement() -> None:
    rows = [Row(0, (5,), 1)] * 100
    said = {i: [0] for i in range(100)}
    assert agreement.exact(Alone(0.0), rows, {**said, 7: [1]})["ok"]
    assert not agreement.exact(Alone(0.0), rows, {**said, 7: [1], 9: [1]})["ok"]


def test_an_engine_that_fails_a_row_is_not_measured() -> None:
    def fail(answered: list[list[Outcome]]) -> None:
        answered[0][0] = DeviceOutOfMemory("no room")

    with pytest.raises(JobError, match="DeviceOutOfMemory: no room"):
        measure(bench_of(rounds=1), say=quiet, build=broken(fail))


def test_an_engine_that_leaves_work_undone_is_not_measured() -> None:
    def shorten(answered: list[list[Answer]]) -> None:
        answered[0][0] = dataclasses.replace(answered[0][0], token_ids=(1,))

    with pytest.raises(JobError, match="1 tokens of 4"):
        measure(bench_of(rounds=1), say=quiet, build=broken(shorten))


# Both sides


@pytest.mark.parametrize(
    "setting",
    [Setting(5), Setting(12, cache="static"), Setting(5, order="answer"), Setting(1)],
    ids=str,
)
def test_generate_in_batches_says_what_it_says_alone(
    subject: Subject, work: Workload, setting: Setting
) -> None:
    baseline = Baseline(subject.model, work, subject.table)
    rows = [dataclasses.replace(row, new_tokens=2 + i % 3) for i, row in enumerate(work.rows)]
    alone = [baseline.alone(row)[0] for row in rows]
    assert baseline.answer(rows, setting) == alone
    assert len({tuple(tokens) for tokens in alone}) > len(rows) / 2


def test_both_sides_share_the_weights_and_nothing_else(subject: Subject) -> None:
    other = twin(subject.model)
    ours, theirs = subject.model.parameters(), other.parameters()
    assert all(a is b for a, b in zip(ours, theirs, strict=True))
    other.config.text_config._attn_implementation = "eager"
    assert subject.model.config.text_config._attn_implementation == "sdpa"


def test_no_round_can_live_on_features_of_an_earlier_one(work: Workload) -> None:
    looks = [work.requests(look) for look in (0, 1)]
    first, second = ({r.prefix.images[0].sha256 for r in look} for look in looks)
    assert len(first) == N_IMAGES
    assert not first & second


# Workloads


def test_captions_are_of_log_normal_length() -> None:
    lengths = caption_lengths(64, mean=30)
    assert np.mean(lengths) == pytest.approx(30, abs=0.5)
    assert lengths[-1] in range(72, 77)
    assert caption_lengths(64, mean=1)[0] == 1


def test_a_workload_is_its_seed_s(subject: Subject) -> None:
    images = noise(subject.image_shape, 8, seed=0)
    made = [captions(subject.vocabulary, images, new_tokens=9, seed=s).rows for s in (3, 3, 4)]
    assert made[0] == made[1] != made[2]


def test_an_image_token_stands_for_nothing_but_the_image(subject: Subject) -> None:
    vocabulary = subject.vocabulary
    drawn = vocabulary.draw(np.random.default_rng(0), 20_000)
    assert set(drawn) == set(range(vocabulary.size)) - {vocabulary.image_token_id}


def test_answers_that_the_context_has_no_room_for_are_refused(subject: Subject) -> None:
    with pytest.raises(SpecError, match="context of 512: lower --new-tokens"):
        questions(
            subject.vocabulary,
            noise(subject.image_shape, 1, seed=0),
            each=1,
            new_tokens=500,
            seed=0,
        )


def test_the_reference_model_has_the_shape_of_the_real_one() -> None:
    model = random_model("ViT-S-135M", seed=0, dtype=torch.bfloat16, device=torch.device("cpu"))
    text = model.model.language_model
    assert sum(weight.numel() for weight in text.parameters()) == 134_515_008
    assert model.lm_head.weight is text.embed_tokens.weight
    with torch.inference_mode():
        pixels = torch.zeros(1, 3, 224, 224, dtype=torch.bfloat16)
        features = model.get_image_features(pixel_values=pixels).pooler_output[0]
    assert features.shape == (196, 576)
    assert features.isfinite().all()


# Whole jobs


def test_photographs_are_of_no_two_the_same_bytes(tmp_path: Path) -> None:
    write_shards(tmp_path / "photos", 70, seed=0)
    shards = sorted((tmp_path / "photos").iterdir())
    assert [shard.name for shard in shards] == ["00000.tar", "00001.tar"]
    members = [data for shard in shards for data in read_tar(shard)]
    assert len(members) == len(set(members)) == 70
    with Image.open(io.BytesIO(members[0])) as opened:
        assert (opened.format, opened.size) == ("JPEG", (640, 480))


def read_tar(path: Path) -> list[bytes]:
    with tarfile.open(path) as tar:
        return [tar.extractfile(member).read() for member in tar]


@pytest.mark.slow
def test_a_whole_job_is_measured_against_its_engine_alone() -> None:
    report = measure_jobs(bench_of(images=40, questions=2), say=quiet)
    assert report["work"]["answers"] == 80
    rates = report["pipeline"]["answers_per_s"], report["engine"]["answers_per_s"]
    assert report["fraction"] == pytest.approx(rates[0] / rates[1], abs=1e-3)
    assert report["fraction"] > 0
    pipeline = report["pipeline"]
    assert pipeline["first_to_last_s"] + pipeline["start_up_s"] <= pipeline["whole_run_s"]


@pytest.mark.slow
def test_a_random_model_is_the_same_as_a_checkpoint(tmp_path: Path) -> None:
    save_random(tmp_path / "model", "ViT-S-135M", seed=5, dtype="auto")
    saved = load_subject(ModelSpec(path=str(tmp_path / "model")))
    made = random_subject("ViT-S-135M", seed=5, dtype="auto")
    assert saved.dtype == made.dtype == "bfloat16"
    assert saved.end_tokens == made.end_tokens == []
    pairs = zip(saved.model.parameters(), made.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert np.array_equal(saved.table, made.table)
    assert saved.vocabulary == made.vocabulary


# The command


def lavaflow(*args: str) -> Result:
    return CliRunner().invoke(main, args, prog_name="lavaflow")


def lavaflow_bench() -> Result:
    sizes = ("--images", "2", "--questions", "2", "--batch-size", "4", "--rounds", "1")
    return lavaflow("bench", "vqa", "--model", str(shared_checkpoint()), *sizes, "--check", "2")


def test_the_command_prints_json_and_its_progress_beside_it() -> None:
    result = lavaflow_bench()
    assert result.exit_code == 0
    assert json.loads(result.stdout)["ok"]
    assert "round 1 of 1: engine" in result.stderr


def test_wrong_answers_end_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measure(bench_of(rounds=1), say=quiet, build=broken(siblings_swapped))
    monkeypatch.setattr("jobs.bench.measure", lambda *_, **__: measured)
    result = lavaflow_bench()
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    assert "not those of generate" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--random", "ViT-S-135M", "--model", "embedded"), "exclude each other"),
        (("caption", "--questions", "3"), "--questions is for vqa"),
        (("--random", "ViT-G-1B"), "there is ViT-S-135M"),
        (("--model", "/no/such/folder"), "does not exist"),
        (("--jobs", "--rounds", "3"), "--rounds says nothing of a whole job"),
        (("speed",), "'speed' is not one of 'vqa', 'caption'"),
    ],
)
def test_bad_usage_ends_with_status_2(args: tuple[str, ...], message: str) -> None:
    result = lavaflow("bench", *args)
    assert result.exit_code == 2
    assert message in result.stderr
