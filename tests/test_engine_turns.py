"""Questions that follow from answers, against `generate` on each conversation from its start."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine import live, prefill, prompts
from pipeline.engine.replays import Replays
from pipeline.engine.request import Answer, Branch, Decoding, Outcome, Prefix, Request
from pipeline.engine.slots import SlotsEngine
from schemas.errors import (
    DeviceOutOfMemory,
    NonFiniteLogits,
    PromptTooLong,
    TokenFeatureMismatch,
)
from tests.engine_cases import EOS, Counted
from tests.flash import stand_in
from tests.turns import (
    BROKEN,
    END,
    SHAPES,
    Asking,
    Known,
    Question,
    known_of,
    mixed,
    right,
    talk,
    tree,
    words,
)


@pytest.fixture(scope="module", params=SHAPES)
def known(request: pytest.FixtureRequest) -> Known:
    return known_of(request.param)


@pytest.fixture(scope="module")
def llama() -> Known:
    return known_of("Llama")


KINDS = ["slots", "plain"]
ROOMS = [("slots", 3), ("slots", 40), ("plain", 7)]


@pytest.mark.parametrize(("kind", "room"), ROOMS)
def test_every_turn_equals_generate_on_the_whole_conversation(
    known: Known, kind: str, room: int
) -> None:
    askings = [*mixed(known, random.Random(0)), *mixed(known, random.Random(0))]
    random.Random(room).shuffle(askings)
    known.check_all(known.engine(kind, room=room), askings)


@pytest.mark.parametrize(("kind", "room"), ROOMS)
def test_whatever_follows_from_an_answer_equals_generate(
    known: Known, kind: str, room: int
) -> None:
    rng = random.Random(7)
    askings = [
        Asking(image, [tree(rng, 3) for _ in range(rng.randint(1, 3))])
        for image in (*known.images, *known.images)
    ]
    known.check_all(known.engine(kind, room=room), askings)


def test_attention_by_matrix_products_gives_the_same_turns(known: Known) -> None:
    engine = known.engine(room=8, attention="eager")
    known.check_all(engine, list(mixed(known, random.Random(0))))


def test_a_kernel_that_takes_lengths_and_no_masks_gives_the_same_turns(
    known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stand_in(monkeypatch)
    engine = known.engine(room=8, attention="flash_attention_2")
    known.check_all(engine, list(mixed(known, random.Random(0))))
    assert calls["causal"]


def test_steps_that_are_done_again_as_recorded_give_the_same_turns(known: Known) -> None:
    engine = known.engine(room=8)
    engine._stepper.replays = Replays(lambda run: run)
    known.check_all(engine, list(mixed(known, random.Random(0))))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_request_raises_when_it_is_to_grow_reaches_who_asked(
    llama: Known, kind: str
) -> None:
    engine = llama.engine(kind)
    with pytest.raises(KeyError, match="no such turn"):
        engine.submit([failing(llama, random.Random(0))])
    llama.check_all(engine, list(mixed(llama, random.Random(0))))


def failing(known: Known, rng: random.Random) -> Request:
    """Its second answer is one too many."""
    asking = Asking(known.images[0], [talk(rng, 3), talk(rng, 2), talk(rng, 1)])

    def grow(number: int, outcome: Outcome) -> Sequence[Branch]:
        if asking.outcomes:
            raise KeyError("no such turn")
        return asking.grow(number, outcome)

    return Request(asking.prefix, asking.branches, grow)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_raises_is_not_told_anything_more(llama: Known, kind: str) -> None:
    """What there can be no room for is over before anything is read."""
    told: list[int] = []

    def grow(number: int, outcome: Outcome) -> Sequence[Branch]:
        told.append(number)
        raise KeyError("no such turn")

    branches = [Branch((70,) * count, 3) for count in (5, 480, 480, 6)]
    with pytest.raises(KeyError, match="no such turn"):
        llama.engine(kind, room=2).submit([Request(llama.images[0].prefix, branches, grow)])
    assert len(told) == 1


# Of slots alone


def check_idle(engine: SlotsEngine) -> None:
    """Nothing is left behind. Callers may know it before the engine does."""
    for _ in range(500):
        live = engine._live
        assert live is not None
        if not (engine._has_work() or live.rows or live.jobs or live.continuing):
            return
        time.sleep(0.01)
    pytest.fail("the engine is still at work, and nobody waits for it")


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_turn_does_not_depend_on_what_else_is_in_flight(llama: Known, data: Any) -> None:
    drawn = data.draw(
        st.lists(st.tuples(st.integers(0, 3), st.lists(QUESTIONS, max_size=3)), max_size=4)
    )
    guess = data.draw(st.sampled_from(GUESSES))
    askings = [Asking(llama.images[n], each, guess=guess) for n, each in drawn if each]
    engine = llama.engine(room=data.draw(st.floats(1.5, 8)))
    llama.check_all(engine, askings)
    if askings:
        check_idle(engine)


GUESSES = [right, lambda _: 0, lambda tokens: tokens // 2, lambda _: 10_000]
"""Of the tokens that are to follow."""


def asked(*later: st.SearchStrategy[Question]) -> st.SearchStrategy[Question]:
    return st.builds(
        Question,
        words=st.lists(st.integers(60, 63), min_size=1, max_size=5).map(tuple),
        longest=st.integers(1, 4),
        follow=st.lists(st.one_of(later), max_size=2 if later else 0),
        is_quoting=st.booleans(),
    )


GIVEN = st.builds(
    Question, words=st.just((61, 62, 60)), scored=st.integers(1, 2), is_quoting=st.booleans()
)
QUESTIONS = asked(GIVEN, asked(GIVEN, asked()))


@pytest.mark.parametrize("guess", GUESSES)
def test_a_wrong_guess_of_what_follows_costs_time_only(
    llama: Known, guess: Callable[[int], int]
) -> None:
    engine = llama.engine(room=4)
    llama.check_all(engine, list(mixed(llama, random.Random(0), guess=guess)))
    check_idle(engine)
    assert engine._live.size.tokens <= engine._room._tokens


def test_each_token_of_a_conversation_is_read_once(known: Known) -> None:
    engine = known.engine()
    counted = Counted(engine)
    asking = Asking(known.images[0], [talk(random.Random(0), 4)])
    [outcomes] = engine.submit([asking.request])
    known.check(asking, outcomes)
    last = outcomes[-1]
    assert isinstance(last, Answer)
    # Nobody looks at the very last.
    assert sum(counted.passes) == last.prompt_tokens + last.output_tokens - 1


def test_each_token_of_many_conversations_is_read_once(known: Known) -> None:
    engine = known.engine(room=8)
    counted = Counted(engine)
    askings = [
        Asking(image, [talk(random.Random(n), 3) for n in range(2)]) for image in known.images
    ]
    known.check_all(engine, askings)
    assert sum(counted.passes) == sum(asking.tokens_read for asking in askings)


def test_questions_that_quote_an_answer_find_the_prefix(known: Known) -> None:
    """However many there are, and however they follow from each other."""
    rng = random.Random(3)
    last = Question(words(rng), 9, is_quoting=True)
    middle = [Question(words(rng), 40, [last, last], is_quoting=True) for _ in range(3)]
    asking = Asking(known.images[1], [Question(words(rng), 3, middle), Question(words(rng), 3)])
    engine = known.engine()
    counted = Counted(engine)
    known.check_all(engine, [asking])
    own = sum(len(branch.token_ids) for branch in asking.branches)
    said = sum(o.output_tokens - 1 for o in asking.outcomes.values() if isinstance(o, Answer))
    assert sum(counted.passes) == len(asking.prefix.token_ids) + own + said


def test_of_an_answer_that_is_tokenised_otherwise_what_differs_is_read_again(
    known: Known,
) -> None:
    rng = random.Random(5)
    question = Question(words(rng), 9, [Question(words(rng), 4)])
    asking = Asking(known.images[2], [question], heard=lambda said: (*said[:-3], 70, 71))
    engine = known.engine()
    counted = Counted(engine)
    [[first, second]] = outcomes = engine.submit([asking.request])
    known.check(asking, outcomes[0])
    assert isinstance(first, Answer)
    assert isinstance(second, Answer)
    assert len(first.token_ids) > 3
    kept = first.prompt_tokens + len(first.token_ids) - 3
    again = second.prompt_tokens - kept
    assert again == 2 + 1 + len(question.follow[0].words)
    whole = first.prompt_tokens + first.output_tokens - 1 + again + second.output_tokens - 1
    assert sum(counted.passes) == whole


def test_several_that_continue_one_answer_read_what_is_their_own(known: Known) -> None:
    rng = random.Random(6)
    follow = [
        *(Question(words(rng), 6, [Question(words(rng))]) for _ in range(3)),
        *(Question((80, 81, *words(rng, 4)), scored=n) for n in (1, 2, 1, 2)),
    ]
    # What is over early leaves rows for copies.
    short = [Question(words(rng), 1) for _ in range(8)]
    asking = Asking(known.images[3], [Question(words(rng), 6, follow), *short])
    engine = known.engine()
    counted = Counted(engine)
    known.check_all(engine, [asking])
    assert sum(counted.passes) == asking.tokens_read


def test_those_that_continue_one_answer_take_its_row_in_turn(known: Known) -> None:
    """Where there is no second row."""
    follow = [Question((70 + n, 80), 3) for n in range(3)]
    follow += [Question((73 + n, 80, 81), scored=1 + n) for n in range(2)]
    asking = Asking(known.images[0], [Question((60, 61), 3, follow)])
    engine = known.engine(room=1.1)
    counted = Counted(engine)
    known.check_all(engine, [asking])
    assert engine._live.size.rows == 1
    assert sum(counted.passes) <= asking.tokens_read


def test_continuing_in_little_room_is_read_again_where_the_row_is_gone(known: Known) -> None:
    rng = random.Random(7)
    follow = [Question(words(rng), 6, [Question(words(rng))]) for _ in range(4)]
    askings = [Asking(image, [Question(words(rng), 6, follow)]) for image in known.images[:2]]
    engine = known.engine(room=3)
    known.check_all(engine, askings)
    check_idle(engine)


def test_conversations_without_an_image_are_answered(llama: Known) -> None:
    """With a prefix that is empty, or not."""
    ids = llama.processor.tokenizer("USER: yes or no? ASSISTANT:")["input_ids"]
    said: dict[int, list[tuple[int, ...]]] = {0: [], 3: []}
    for split, found in said.items():

        def grow(number: int, outcome: Outcome) -> Sequence[Branch]:
            assert isinstance(outcome, Answer)
            found.append(tuple(outcome.token_ids))  # noqa: B023 (asked before the next)
            own = (*ids[split:], *found[0], END, 70, 71)  # noqa: B023
            return [] if number > 1 else [Branch(own, 4, continues=0)]

        request = Request(Prefix(ids[:split]), [Branch(ids[split:], 4)] * 2, grow)
        [outcomes] = llama.engine().submit([request])
        assert len(outcomes) == 4
    again = llama.model.generate(
        input_ids=torch.tensor([[*ids, *said[0][0], END, 70, 71]]),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=list(EOS),
    )
    expected = [token for token in again[0, -4:].tolist() if token not in EOS]
    assert said[0] == said[3]
    assert list(said[0][-1]) == list(said[0][-2]) == expected


def test_calls_from_several_threads_grow_each_their_own(llama: Known) -> None:
    """One of them raises meanwhile."""
    engine = llama.engine(room=5)
    failures: list[BaseException] = []

    def ask(seed: int) -> None:
        try:
            if seed % 3:
                llama.check_all(engine, list(mixed(llama, random.Random(seed // 3))))
            else:
                with pytest.raises(KeyError, match="no such turn"):
                    engine.submit([failing(llama, random.Random(seed))])
        except BaseException as error:  # noqa: BLE001 (told below)
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    check_idle(engine)


def test_what_is_at_work_for_a_request_that_raises_is_dropped(llama: Known) -> None:
    engine = llama.engine()
    counted = Counted(engine)

    def grow(number: int, outcome: Outcome) -> Sequence[Branch]:
        raise KeyError("no such turn")

    long = [Branch((70, n), 300, Decoding(min_new_tokens=300)) for n in range(100, 103)]
    branches = [Branch((70, 71), 2), *long]
    with pytest.raises(KeyError, match="no such turn"):
        engine.submit([Request(llama.images[0].prefix, branches, grow)])
    check_idle(engine)
    assert len(counted.passes) == 2


# Degrading


def test_what_does_not_fit_is_halved_and_turns_stay_the_same(known: Known) -> None:
    engine = known.engine()
    counted = Counted(engine, room=60)
    known.check_all(engine, list(mixed(known, random.Random(0))))
    assert max(counted.passes) <= 60
    check_idle(engine)


def test_memory_that_runs_out_at_the_logits_continues_nothing_twice(llama: Known) -> None:
    engine = llama.engine()
    Counted(engine).fails_at_logits = True
    llama.check_all(engine, list(mixed(llama, random.Random(0))))
    check_idle(engine)


def check_but(
    known: Known, asking: Asking, error: type[Exception], is_guilty: Callable[[Branch], bool]
) -> None:
    """Guilty branches have failed, the others are as ever; there are some of both."""
    failed = 0
    for number, branch in enumerate(asking.branches):
        outcome = asking.outcomes[number]
        if is_guilty(branch):
            assert isinstance(outcome, error)
            failed += 1
        else:
            known.check_one(asking, number, outcome)
    assert 0 < failed < len(asking.branches)


def siblings(guilty: Question) -> list[Question]:
    """Conversations; one begins with it, one goes on with it, and with another one."""
    rng = random.Random(8)
    good = talk(rng, 2)
    behind = Question(guilty.words, guilty.longest, [good])
    return [talk(rng, 3), Question(words(rng), 4, [behind, good, behind]), behind, talk(rng, 2)]


def test_a_turn_that_does_not_fit_alone_fails_and_its_siblings_do_not(known: Known) -> None:
    guilty = Question((90,) * 75)
    asking = Asking(known.images[0], siblings(guilty))
    engine = known.engine()
    Counted(engine, room=70)
    engine.submit([asking.request])
    check_but(known, asking, DeviceOutOfMemory, lambda b: 90 in b.token_ids)
    check_idle(engine)


@pytest.mark.parametrize("room", [4, 30])
def test_logits_that_are_not_finite_fail_their_turn_only(llama: Known, room: int) -> None:
    """The guilty one's keys are gone, too, when its place is used again."""
    engine = llama.engine(room=room, broken=BROKEN)
    for guilty in (Question((BROKEN,)), Question((120, BROKEN))):
        askings = [Asking(image, siblings(guilty)) for image in llama.images[:2]]
        engine.submit([asking.request for asking in askings])
        for asking in askings:
            check_but(llama, asking, NonFiniteLogits, lambda b: BROKEN in b.token_ids)
        llama.check_all(engine, list(mixed(llama, random.Random(0))))


def test_what_continues_a_broken_answer_has_none_of_its_keys(llama: Known) -> None:
    """Whatever looks as far as they were."""
    asking = Asking(llama.images[0], [Question((120, 121, BROKEN, *range(122, 150)))])

    long = Question((130,) * 60, 9).branch((130,) * 60, None, right)
    asking.branches += [long, Branch((120, 121, 123), 9, continues=0)]

    def grow(number: int, outcome: Outcome) -> Sequence[Branch]:
        return asking.branches[2:] if isinstance(outcome, NonFiniteLogits) else []

    request = Request(asking.prefix, asking.branches[:2], grow)
    [found] = llama.engine(broken=BROKEN).submit([request])
    assert isinstance(found[0], NonFiniteLogits)
    for number in (1, 2):
        llama.check_one(asking, number, found[number])


def test_a_turn_beyond_the_context_or_the_budget_fails_alone(llama: Known) -> None:
    for count, room, error in ((600, 16, PromptTooLong), (200, 2, DeviceOutOfMemory)):
        asking = Asking(llama.images[0], siblings(Question((90,) * count)))
        engine = llama.engine(room=room)
        engine.submit([asking.request])
        check_but(llama, asking, error, lambda b: 90 in b.token_ids)
        check_idle(engine)


def test_an_image_that_cannot_be_looked_at_fails_every_turn(llama: Known) -> None:
    asking = Asking(llama.images[0], [talk(random.Random(0), 3), talk(random.Random(1), 2)])
    prefix = Prefix(asking.prefix.token_ids[:-1], asking.prefix.images)
    request = Request(prefix, asking.branches, asking.grow)
    [outcomes] = llama.engine().submit([request])
    assert [type(outcome) for outcome in outcomes] == [TokenFeatureMismatch] * 5


# The comparison


def shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    def question(flat: Any, row: live.Row) -> Any:
        found = right_question(flat, row)
        for place in range(found.start, found.stop):
            flat._positions[place] += bool(row.kept)
        return found

    right_question = prompts._Flat._question
    monkeypatch.setattr(prompts._Flat, "_question", question)


def one_kept_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = live.Row.kept_of
    monkeypatch.setattr(live.Row, "kept_of", lambda row, other: kept(row, other) + 1)


def own_keys_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    def bias(part: Any, asked: Any) -> Any:
        found = right_bias(part, asked)
        for question, kept in enumerate(part._kept.tolist()):
            found[question, ..., :kept] = float("-inf")
        return found

    right_bias = prefill._Continuing._bias
    monkeypatch.setattr(prefill._Continuing, "_bias", bias)


def window_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(distance: torch.Tensor, window: int | None) -> torch.Tensor:
        return distance >= 0

    monkeypatch.setattr(prefill, "is_seen", seen)


def written_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    make = prefill._Continuing.__init__

    def made(part: Any, questions: Sequence[Any], rows: Any) -> None:
        make(part, questions, rows)
        own = part._stretches
        own._new = (own._new - questions[0].kept).clamp(min=0)

    monkeypatch.setattr(prefill._Continuing, "__init__", made)


def uncopied_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.engine.kv.KVArena.move", lambda *_, **__: None)


FAULTS = [shifted, one_kept_too_many, own_keys_unseen, written_at_the_start, uncopied_keys]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_finds(
    llama: Known,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        llama.check_all(llama.engine(room=12), list(mixed(llama, random.Random(1))))


def test_the_comparison_finds_a_window_that_is_not_kept_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = known_of("Mistral, a window")
    window_from_the_start(monkeypatch)
    asking = Asking(known.images[0], [Question((70,) * 9, 9, [talk(random.Random(1), 2)])])
    with pytest.raises(AssertionError):
        known.check_all(known.engine(), [asking])
