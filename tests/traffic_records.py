"""Traffic as serving logs it, with a customer's secret in every text."""

import dataclasses
import re
from typing import Any

from app.traffic import Exchange, Feedback

SECRET = "my card is 4111 1111 1111 1111, write to anna@example.com"


def of_the_secret(text: str) -> list[str]:
    """The parts of SECRET that stand in the text: more than "4111", which ids and times hold by chance."""
    return re.findall(r"my card|1111[ -]?1111|anna@", text)


def exchange(number: int, **changes: Any) -> Exchange:
    answered = Exchange(
        response_id=f"chatcmpl-w-1-{number}",
        received_at=f"2026-01-01T00:00:{number % 60:02d}+00:00",
        variant="champion",
        model_version="support/3",
        messages=[{"role": "user", "content": SECRET}],
        reply=SECRET,
        intent="track_order",
        intent_confidence=0.9,
        handover=None,
        finish_reason="stop",
        prompt_tokens=10,
        completion_tokens=5,
        time_to_first_token_s=0.1,
        end_to_end_s=0.5,
        stream=False,
        user_hash=None,
        status="ok",
    )
    return dataclasses.replace(answered, **changes)


def feedback(number: int, at: int = 0, **changes: Any) -> Feedback:
    said = Feedback(
        response_id=f"chatcmpl-w-1-{number}",
        received_at=f"2026-01-01T01:00:{at:02d}+00:00",
        rating=None,
        intent=None,
        comment=SECRET,
    )
    return dataclasses.replace(said, **changes)
