"""Servers of one model folder, alike in front: a POST of {"prompt": token ids or "messages", "max_tokens"} is answered
with server-sent events, greedily, to exactly so many tokens (the models of the benchmark never choose their end token).

    python -m benchmarks.peers.serving engine FOLDER PORT      # our engine behind uvicorn and nothing else
    python -m benchmarks.peers.serving engine FOLDER PORT 2    # two such processes, which share the port
    RAYLOOP_BENCH_DEVICE=cuda python -m benchmarks.peers.serving engine FOLDER PORT    # on a GPU
    python -m benchmarks.peers.serving adapters FOLDER PORT    # our engine, beside it the adapters in FOLDER-adapters
    python -m benchmarks.peers.serving static FOLDER PORT      # model.generate over up to 16 requests at once
    python -m benchmarks.peers.serving openvino FOLDER PORT    # openvino-genai's continuous batching

static: what waits is batched when the batch before is done, padded on the left, and written to the length of its
longest reply; a reply comes as one chunk. openvino: a model converted by optimum-cli, prefix caching on, greedy.
"""

import asyncio
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SLOTS, CONTEXT_TOKENS = 16, 512
DEVICE = os.environ.get("RAYLOOP_BENCH_DEVICE", "cpu")
Say = Callable[[str | None], None]
"""Takes text, and None at the end."""
Submit = Callable[[dict[str, Any], Say], None]


def application(submit: Submit) -> Any:
    """An ASGI application, with nothing between uvicorn and the model."""

    async def app(scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[..., Any]) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if body:
            loop, said = asyncio.get_running_loop(), asyncio.Queue[str | None]()
            submit(json.loads(body), lambda text: loop.call_soon_threadsafe(said.put_nowait, text))
            while (text := await said.get()) is not None:
                event = json.dumps({"choices": [{"index": 0, "text": text}]})
                await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    return app


def _loaded(folder: Path) -> Any:
    """Model and tokenizer, loaded in a thread that ends, as the product does."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from app import model as models

    dtype = getattr(torch, json.loads((folder / "config.json").read_text())["dtype"])
    with ThreadPoolExecutor(1) as loader:
        return loader.submit(models.load, folder, dtype=dtype, device_map={"": DEVICE}).result()


def adapters(folder: Path) -> Submit:
    """Ours; a request whose `model` is one of the adapters' names gets that."""
    beside = folder.with_name(f"{folder.name}-adapters")
    return engine(folder, {place.name: place for place in sorted(beside.iterdir())})


def engine(folder: Path, beside: Mapping[str, Path] | None = None) -> Submit:
    """Ours."""
    from app.conversation import prompt_ids
    from app.serving.adapters import Adapters
    from app.serving.engine import Engine
    from app.serving.reply import Reply
    from app.serving.schema import Delta, Event, Sampling
    from app.settings.serving import ServingConfig

    sys.setswitchinterval(0.001)  # as the product's deployment has it
    model, tokenizer = _loaded(folder)
    prefixes_bytes = ServingConfig().prefix_cache_bytes
    beside = beside or {}
    made = Engine(model, tokenizer, SLOTS, CONTEXT_TOKENS, 1_000, prefixes_bytes, adapters=Adapters(model, beside))
    greedy = Sampling(None, 0.0, 1.0, None, ())

    def text_of(ids: Sequence[int]) -> str:
        text: str = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def submit(body: dict[str, Any], say: Say) -> None:
        def deliver(event: Event) -> None:
            say(event.text if isinstance(event, Delta) else None)

        prompt = body.get("prompt") or prompt_ids(tokenizer, body["messages"])
        adapter = body["model"] if body.get("model") in beside else ""
        replies = [Reply(prompt, greedy, body["max_tokens"], deliver, text_of, adapter=adapter)]
        made.prepare(replies)
        made.submit(replies)

    return submit


def static(folder: Path) -> Submit:
    """transformers' generate, one batch after another."""
    import torch

    waiting: queue.Queue[tuple[dict[str, Any], Say]] = queue.Queue()

    def work() -> None:
        model, tokenizer = _loaded(folder)
        pad = tokenizer.pad_token_id
        while True:
            batch = [waiting.get()]
            while len(batch) < SLOTS and not waiting.empty():
                batch.append(waiting.get())
            prompts = [body["prompt"] for body, _ in batch]
            longest = max(map(len, prompts))
            ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            most = max(body["max_tokens"] for body, _ in batch)
            with torch.inference_mode():
                whole = model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False)
            for (body, say), reply in zip(batch, whole[:, longest:].tolist(), strict=True):
                say(tokenizer.decode(reply[: body["max_tokens"]], skip_special_tokens=True) or " ")
                say(None)

    threading.Thread(target=work, daemon=True).start()
    return lambda body, say: waiting.put((body, say))


def openvino(folder: Path) -> Submit:
    """openvino-genai."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai
    from transformers import AutoTokenizer

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.enable_prefix_caching, scheduler.cache_size = SLOTS, True, 1
    pipe = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    waiting: queue.Queue[tuple[dict[str, Any], Say]] = queue.Queue()

    def work() -> None:
        running: dict[int, tuple[Any, Say, list[int], int]] = {}
        number = 0
        while True:
            while not waiting.empty() or not running:
                body, say = waiting.get()
                config = genai.GenerationConfig(max_new_tokens=body["max_tokens"], ignore_eos=True, do_sample=False)
                handle = pipe.add_request(number, ov.Tensor(np.array([body["prompt"]], np.int64)), config)
                running[number] = handle, say, [], body["max_tokens"]
                number += 1
            pipe.step()
            for key, (handle, say, ids, most) in list(running.items()):
                before = tokenizer.decode(ids[-8:], skip_special_tokens=True)
                new = [
                    token
                    for out in (handle.read().values() if handle.can_read() else ())
                    for token in out.generated_ids
                ]
                if new:
                    text = tokenizer.decode([*ids[-8:], *new], skip_special_tokens=True)[len(before) :]
                    ids += new
                    if text:
                        say(text)
                if len(ids) >= most:
                    say(None)
                    del running[key]

    threading.Thread(target=work, daemon=True).start()
    return lambda body, say: waiting.put((body, say))


def main() -> None:
    import uvicorn

    kind, folder, port, *processes = sys.argv[1:]
    # The kernel gives each connection to one of the processes that listen.
    others = [subprocess.Popen([sys.executable, "-m", "benchmarks.peers.serving", kind, folder, port, "1"])
              for _ in range(int(processes[0]) - 1)] if processes else []  # fmt: skip
    made = {"engine": engine, "adapters": adapters, "static": static, "openvino": openvino}[kind](Path(folder))
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listening.bind(("127.0.0.1", int(port)))
    try:
        uvicorn.Server(uvicorn.Config(application(made), log_level="warning", access_log=False)).run([listening])
    finally:
        for other in others:
            other.terminate()


if __name__ == "__main__":
    main()
