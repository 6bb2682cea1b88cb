"""Conversations as chat templates take them."""

import jinja2
import pytest

from pipeline.formats import FORMATS
from pipeline.prompt import messages_for
from pipeline.sources.base import Turn
from schemas.errors import ImageTokenInText


def said(messages):
    """Messages as (role, parts) with the image as `...`."""
    return [
        (m["role"], [... if p["type"] == "image" else p["text"] for p in m["content"]])
        for m in messages
    ]


def rendered(messages):
    template = jinja2.Environment(autoescape=False).from_string(FORMATS["vicuna"])
    return template.render(messages=messages, add_generation_prompt=True)


def test_a_question_alone_is_one_user_message_with_the_image_first():
    assert said(messages_for("What?")) == [("user", [..., "What?"])]


def test_the_image_goes_into_the_first_message_of_the_user():
    earlier = [Turn("user", "What is it?"), Turn("assistant", "A cat.")]
    assert said(messages_for("Its colour?", conversation=earlier)) == [
        ("user", [..., "What is it?"]),
        ("assistant", ["A cat."]),
        ("user", ["Its colour?"]),
    ]


def test_a_conversation_that_the_assistant_opens_has_the_image_after_it():
    messages = messages_for("What?", conversation=[Turn("assistant", "Ask me.")])
    assert said(messages) == [("assistant", ["Ask me."]), ("user", [..., "What?"])]


def test_system_texts_become_one_message_the_specs_first():
    messages = messages_for("What?", system="Be brief.", conversation=[Turn("system", "Be kind.")])
    assert said(messages) == [("system", ["Be brief.\nBe kind."]), ("user", [..., "What?"])]


@pytest.mark.parametrize("text", ["<image>\nWhat?", "What?\n<image>", "<image>What?", "What?"])
def test_the_image_mark_of_llava_data_is_dropped_from_the_first_turn(text):
    earlier = [Turn("user", text), Turn("assistant", "A cat.")]
    assert said(messages_for("And?", conversation=earlier))[0] == ("user", [..., "What?"])


@pytest.mark.parametrize(
    "turns",
    [
        [Turn("user", "<image>\n<image>\nWhat?")],
        [Turn("user", "a <image> b")],
        [Turn("user", "a"), Turn("assistant", "<image>")],
        [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "<image>\nc")],
        [Turn("system", "<image>")],
    ],
)
def test_any_other_image_token_in_the_conversation_is_refused(turns):
    with pytest.raises(ImageTokenInText, match="<image>"):
        messages_for("What?", conversation=turns)


def test_an_image_token_in_the_question_is_refused_and_named():
    with pytest.raises(ImageTokenInText, match=r"user's text '<image> twice'"):
        messages_for("<image> twice")


def test_another_models_image_token_is_plain_text():
    assert said(messages_for("<image>", image_token="<im>")) == [("user", [..., "<image>"])]


def test_the_callers_conversation_is_left_as_it_was():
    earlier = [Turn("user", "<image>\nWhat?")]
    messages_for("And?", conversation=earlier)
    assert earlier == [Turn("user", "<image>\nWhat?")]


def test_the_default_template_writes_llava_1_5s_format():
    earlier = [Turn("user", "What is it?"), Turn("assistant", "A cat.")]
    messages = messages_for("Its colour?", system="Be brief.", conversation=earlier)
    assert rendered(messages) == (
        "Be brief. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Its colour? ASSISTANT:"
    )


def test_the_default_template_leaves_the_text_as_it_is():
    text = " <b>&'\"\n{{ x }} "
    assert rendered(messages_for(text)) == f"USER: <image>\n{text} ASSISTANT:"
