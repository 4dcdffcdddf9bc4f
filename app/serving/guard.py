"""What is done to a question before the model reads it: personal data is masked, declared rules refuse it."""

import re
from collections.abc import Sequence
from dataclasses import replace

from app.conversation import Message, normalised
from app.errors import RequestError
from app.privacy import Detector, Mask, mask_messages
from app.serving.schema import AnswerRequest, Intent, Prompt
from app.settings.serving import RuleConfig, ServingConfig


class Guard:
    """The configuration's rules, ready to be applied.

    Raises:
        ConfigError: The detector of personal data cannot be made.
    """

    def __init__(self, config: ServingConfig) -> None:
        self._rules = [
            (rule, [re.compile(pattern, re.IGNORECASE) for pattern in rule.patterns]) for rule in config.rules
        ]
        self._detector = Detector.of(config.privacy.detector)
        self.needs_intent = any(rule.intents for rule in config.rules)

    def rule(self, question: str, intent: Intent | None) -> RuleConfig | None:
        """The first rule that refuses a question."""
        question = normalised(question)  # as the model reads it
        for rule, patterns in self._rules:
            if any(pattern.search(question) for pattern in patterns) or (intent and intent.label in rule.intents):
                return rule
        return None

    def masked(self, asked: AnswerRequest) -> AnswerRequest:
        """The request as the model may read it, where personal data is not for it.

        Raises:
            RequestError: 400, its prompt is tokens, in which nothing can be found.
        """
        prompts = tuple(self._masked(prompt) for prompt in asked.prompts)
        messages, _ = mask_messages(asked.messages, self._detector)
        return replace(asked, prompts=prompts, messages=tuple(messages))

    def _masked(self, prompt: Prompt) -> Prompt:
        if isinstance(prompt, str):
            return Mask(self._detector, [prompt]).text(prompt)
        messages = _messages(prompt)
        if not messages:
            what = "prompt must be text: personal data is masked here, which cannot be found in tokens"
            raise RequestError(400, what, "invalid_value", "prompt")
        return tuple(mask_messages(messages, self._detector)[0])


def _messages(prompt: Sequence[Message | int]) -> list[Message]:
    return [part for part in prompt if not isinstance(part, int)]
