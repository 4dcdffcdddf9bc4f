"""What is wrong with a body is found quickly and told in few words: one that is parsed keeps all others waiting."""

import time

import pytest

from app.errors import RequestError
from app.serving.limits import estimated_tokens
from app.serving.requests import parse_chat
from app.settings.serving import ServingConfig
from tests.attacks import ATTACKS

CONFIG = ServingConfig()
PARSED = {name: body for name, (body, statuses) in ATTACKS.items() if statuses == {400}}


@pytest.mark.parametrize("name", PARSED)
def test_what_is_wrong_is_found_quickly_and_told_in_few_words(name: str) -> None:
    assert len(PARSED[name]) <= CONFIG.max_body_bytes, "it would not be parsed"
    took_s = []
    for _ in range(3):  # the quickest: a busy machine's cores are slower
        begun_s = time.thread_time()
        with pytest.raises(RequestError) as told:
            parse_chat(PARSED[name], CONFIG)
        took_s.append(time.thread_time() - begun_s)
    assert min(took_s) < 0.25
    assert told.value.status == 400
    assert len(str(told.value)) + len(told.value.param or "") < 700


@pytest.mark.parametrize("name", PARSED)
def test_an_estimate_takes_no_time(name: str) -> None:
    begun_s = time.thread_time()
    estimated_tokens(PARSED[name], CONFIG, True)
    assert time.thread_time() - begun_s < 0.1
