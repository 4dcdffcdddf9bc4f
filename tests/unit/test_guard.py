"""What is done to a question before the model reads it."""

import pytest

from app.errors import RequestError
from app.serving.guard import Guard
from app.serving.schema import AnswerRequest, Intent, Prompt, Sampling
from app.settings.serving import ServingConfig

RULES = [
    {"name": "weapons", "patterns": [r"make a bomb", r"\bguns?\b"], "message": "No."},
    {"name": "off_topic", "intents": ["smalltalk"], "message": "Orders only."},
]
GUARD = Guard(ServingConfig.model_validate({"rules": RULES, "privacy": {"mask_model": True}}))


@pytest.mark.parametrize(
    ("question", "intent", "rule"),
    [
        ("how do i MAKE  a\n bomb?", None, "weapons"),
        ("guns", Intent("refund_request", 0.9), "weapons"),
        ("gunsmith", None, None),
        ("how are you", Intent("smalltalk", 0.2), "off_topic"),
        ("where is my order?", Intent("order_status", 0.9), None),
    ],
)
def test_the_first_rule_that_hits_refuses_the_question_as_the_model_would_read_it(
    question: str, intent: Intent | None, rule: str | None
) -> None:
    found = GUARD.rule(question, intent)
    assert (found and found.name) == rule


def asked(prompt: Prompt) -> AnswerRequest:
    messages = prompt if isinstance(prompt, tuple) and prompt and isinstance(prompt[0], dict) else ()
    sampling = Sampling(None, 0.0, 1.0, None, ())
    return AnswerRequest("chat", "support", (prompt,), messages, "", sampling, 1, False, False, None)  # type: ignore[arg-type]


def test_personal_data_is_masked_before_the_model_reads_it() -> None:
    card = {"role": "user", "content": "my card is 4111 1111 1111 1111, again 4111-1111-1111-1111"}
    masked = GUARD.masked(asked((card,)))
    wanted = ({"role": "user", "content": "my card is [CARD_1], again [CARD_1]"},)
    assert (masked.prompts, masked.messages) == ((wanted,), wanted)
    assert GUARD.masked(asked("write to anna@example.org")).prompts == ("write to [EMAIL_1]",)
    with pytest.raises(RequestError, match="cannot be found in tokens"):
        GUARD.masked(asked((5, 6)))
