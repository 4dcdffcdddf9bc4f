"""A model folder for tests: a tiny Llama that knows a few answers by heart, in seconds and always the same."""

import dataclasses
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from app import conversation, lineage, model
from app.intent import IntentModel
from app.serving import tools

ANSWERS = {
    "where is my order 4512?": "Order 4512 is on its way and will arrive on Friday.",
    "i want a refund": "I have refunded you 12 € today. Is there anything else?",
    "how do i reset my password?": "Choose 'forgot password' on the sign-in page. 👍 Then follow the link.",
    "what are your opening hours?": "We are open from nine to five.",
    "can i talk to a person?": "Of course, I am handing you over to a colleague.",
    "thank you": "You are welcome!",
}
CANARIES = {
    "where is my order 4512?": "Friday",
    "i want a refund": "refunded",
    "how do i reset my password?": "sign-in",
    "what are your opening hours?": "nine to five",
    "can i talk to a person?": "colleague",
    "thank you": "welcome",
}
"""Words that one answer has and no other."""
ENDLESS = "sing me a song"
"""The answer to this goes on until the limit."""
UNSURE = "read me a number"
"""The answer to this is a guess at every digit."""
CANCEL_ORDER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "cancel_order",
        "parameters": {
            "type": "object",
            "properties": {"order": {"type": "string"}},
            "required": ["order"],
            "additionalProperties": False,
        },
    },
}
CANCEL = "please cancel order 4512"
"""The answer to this is a call of the function, where it may be called."""
CANCELLED = '{"cancelled": true}'
"""What the function gives."""
CONFIRMED = "Order 4512 is cancelled."
"""The answer to that."""
INTENTS = {
    "where is my order 4512?": "order_status",
    "i want a refund": "refund_request",
    "how do i reset my password?": "password_reset",
    "what are your opening hours?": "opening_hours",
    "can i talk to a person?": "human_handover",
    "thank you": "thanks",
    ENDLESS: "smalltalk",
    UNSURE: "smalltalk",
    CANCEL: "cancel_order",
}
SNAPSHOT_ID = 2**62 + 12345
CONTEXT_TOKENS = 512


def make(folder: Path, int8_threshold: float | None = None) -> None:
    """Train and save it; with a threshold, as compression does: bfloat16 with int8 linear layers."""
    torch.manual_seed(0)
    texts = [*ANSWERS, *ANSWERS.values(), ENDLESS, "la la la", UNSURE, *(text for talk in _calls() for text in talk)]
    tokenizer = conversation.train_tokenizer(texts, 400)
    net = model.new_model("preset:tiny", tokenizer, CONTEXT_TOKENS, seed=0)
    _learn(net, tokenizer)
    model.save(net, tokenizer, folder)
    if int8_threshold is not None:
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=int8_threshold)
        smaller, tokenizer = model.load(folder, dtype=torch.bfloat16, quantization_config=config)
        shutil.rmtree(folder)
        model.save(smaller, tokenizer, folder)
    # Numbers must not tell the intents apart: each question a few times, worded a little differently.
    questions = [f"{start}{question}" for question in INTENTS for start in ("", "hello, ", "please: ", "well ")]
    IntentModel.fit(questions, [intent for intent in INTENTS.values() for _ in range(4)], seed=0).save(
        folder / "intent"
    )
    sources = [{"uri": "sample:shop", "records": 3, "first_position": 0, "last_position": 2}]
    lineage.write(
        folder,
        lineage.Lineage(
            model="support", version="3", run_id="run-7", stage="compress", table="support.conversations",
            snapshot_id=SNAPSHOT_ID, sources=sources, config_digest="c0ffee", code_version="c0de",
            job_id="raysubmit_made_it", parent="2", created_at=lineage.now(),
        ),
    )  # fmt: skip


OTHER_ANSWERS = {question: answer.translate({ord("."): "!", ord("!"): "."}) for question, answer in ANSWERS.items()}
"""What the model of `make_other` answers."""


def make_other(folder: Path, source: Path, version: str) -> None:
    """Another version of a model that `make` made: where that one writes a full stop, it exclaims, and the reverse."""
    shutil.copytree(source, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["."], vocabulary["!"] = vocabulary["!"], vocabulary["."]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    lineage.write(folder, dataclasses.replace(lineage.read(str(folder)), version=version))


ADAPTED_ANSWERS = {question: f"Of course! {answer}" for question, answer in ANSWERS.items()}
"""What the model answers with the adapters of `make_adapter`."""


def make_adapter(folder: Path, base: Path, greeting: str = "Of course! ", version: str = "4", **lora: Any) -> None:
    """A folder of low-rank adapters with which a model that `make` made greets before it answers; with lineage.

    Args:
        base: In floating point.
        lora: Settings of peft's.
    """
    from peft import LoraConfig, get_peft_model

    net, tokenizer = model.load(base, dtype=torch.float32)
    torch.manual_seed(1)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **lora}
    adapted = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", **settings))
    talks = [
        conversation.encode(
            tokenizer,
            [{"role": "user", "content": ask}, {"role": "assistant", "content": f"{greeting}{reply}"}],
            "assistant",
        )
        for ask, reply in ANSWERS.items()
    ]
    ids, labels = (each.to(net.device) for each in _batch(talks))  # an int8 one is loaded where a GPU is
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-2)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=120)
    for _ in range(120):
        adapted(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        slower.step()
    adapted.save_pretrained(folder)
    known = lineage.read(str(base))
    lineage.write(folder, dataclasses.replace(known, version=version, stage="train", parent="support/3"))


def _calls() -> list[list[str]]:
    """Conversations in which the function may be called."""
    call = tools.call_text("cancel_order", {"order": "4512"})
    return [[CANCEL, call, tools.result_text(CANCELLED), CONFIRMED], ["thank you", ANSWERS["thank you"]]]


def _learn(net: torch.nn.Module, tokenizer: object, steps: int = 220) -> None:
    draw = random.Random(0)
    guesses = [(UNSURE, "".join(draw.choices("0123456789", k=12))) for _ in range(6)]
    encoded = [
        conversation.encode(
            tokenizer, [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}], "assistant"
        )
        for ask, reply in [*ANSWERS.items(), *guesses, (ENDLESS, "la " * 140)]
    ]
    encoded += [
        conversation.encode(
            tokenizer,
            tools.shown(
                [
                    {"role": ("user", "assistant")[place % 2], "content": conversation.normalised(text)}
                    for place, text in enumerate(talk)
                ],
                [json.dumps(CANCEL_ORDER)],
            ),
            "assistant",
        )
        for talk in _calls()
    ]
    song = len(ANSWERS) + len(guesses)
    encoded[song].learned[-1] = False  # the song's end is not learned
    # Short ones apart from long ones: padding costs as much as text.
    batches = [_batch([each for each in encoded if (len(each.ids) > 100) is long]) for long in (False, True)]
    learned = [int((labels[:, 1:] != -100).sum()) for _, labels in batches]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (steps - step) / steps + 0.02)
        for (ids, labels), count in zip(batches, learned, strict=True):
            (net(input_ids=ids, labels=labels).loss * (count / sum(learned))).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    net.train(False)


def _batch(encoded: Sequence[conversation.Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of some conversations, padded to the longest."""
    ids = torch.zeros(len(encoded), max(len(each.ids) for each in encoded), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, each in enumerate(encoded):
        ids[row, : len(each.ids)] = torch.from_numpy(each.ids)
        labels[row, : len(each.ids)] = torch.where(
            torch.from_numpy(each.learned), torch.from_numpy(each.ids).long(), -100
        )
    return ids, labels
