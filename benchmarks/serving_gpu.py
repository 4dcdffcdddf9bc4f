"""The transformers engine on a GPU: a model of 1.2 billion weights, 1 to 64 users, bfloat16 and int8.

    python -m benchmarks.serving_gpu --prepare      # where the conversations are: tokenizer and requests
    python -m benchmarks.serving_gpu --out found    # where the GPU is
    python -m benchmarks.serving_gpu --out found --only application    # there, with a Ray head
    python -m benchmarks.serving_gpu --report found/serving_gpu.json more/serving_gpu.json

A random Llama of the shape of Llama 3.2 1B (its config.json: 2,048 x 16 layers, 32 heads on 8, 8,192, 128,256 tokens),
prompts and lengths of replies of real conversations, greedy, in one process, each user asking again at once. Beside it
`generate` over static batches and transformers' own continuous batching, which is given all requests at the beginning.
int8 is bitsandbytes' LLM.int8(), with and without looking for outliers; without them its passes can be recorded.
Adapters: eight of rank 8 on all linear layers. application: the whole application on Ray Serve against the same engine
behind uvicorn and nothing else, streamed over HTTP.
"""

import argparse
import gc
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import BitsAndBytesConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from app import model as models
from app.serving import fixed_passes
from app.serving.adapters import Adapters
from app.serving.engine import Engine
from app.serving.reply import Reply
from app.serving.schema import Delta, Event, Finished, Refused, Sampling
from app.storage import resolve
from benchmarks import measured
from benchmarks.serving_servers import ADAPTERS, HOME, Server, adapters_folder, compare, free_port, started

FOLDER = Path(resolve(".rayloop")) / "bench-serving" / "gpu"
SHAPES = {"1b": (2_048, 16, 32, 8, 8_192, 128_256), "tiny": (64, 2, 4, 2, 128, 4_096)}
SLOTS, CONTEXT_TOKENS = 64, 512
GREEDY = Sampling(None, 0.0, 1.0, None, ())
ADAPTED = "bfloat16, 8 adapters"
"""Kinds of engine whose name begins so have them."""
Request = tuple[list[int], int]
Figures = dict[str, float]


def prepare() -> None:
    """What is made where the conversations are."""
    from benchmarks.serving_servers import model_folder, requests_files

    FOLDER.mkdir(parents=True, exist_ok=True)
    models.load_tokenizer(model_folder("7m")).save_pretrained(FOLDER)
    files = requests_files("7m")
    rows = json.loads(files["ids"].read_text())
    wanted = [[row["body"]["prompt"], row["tokens"]] for row in rows][:1_000]
    (FOLDER / "requests.json").write_text(json.dumps(wanted))
    (FOLDER / "messages.json").write_text(json.dumps(json.loads(files["messages"].read_text())[:1_000]))


def wait_until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    """Or fail."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {within_s:.0f} s")
        time.sleep(0.005)


class Crowd:
    """Users of an engine in this process."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        sampling: Sampling = GREEDY,
        adapters: Sequence[str] = ("",),
    ) -> None:
        self._engine, self._requests, self._sampling, self._adapters = engine, requests, sampling, adapters
        self._next, self._ended = 0, False
        self.done: list[tuple[float, Reply, Finished]] = []
        self.failures: list[Refused] = []

    def ask(self) -> None:
        """One more question, and another one as soon as it is answered."""
        prompt, tokens = self._requests[self._next % len(self._requests)]
        adapter = self._adapters[self._next % len(self._adapters)]
        self._next += 1

        def deliver(event: Event) -> None:
            if isinstance(event, Finished):
                self.done.append((time.monotonic(), reply, event))
                if not self._ended:
                    self.ask()
            elif isinstance(event, Refused):
                self.failures.append(event)

        reply = Reply(prompt, self._sampling, tokens, deliver, lambda ids: "x" * len(ids), adapter=adapter)
        self._engine.prepare([reply])
        self._engine.submit([reply])

    def figures(self, users: int, warm_s: float, seconds: float) -> Figures:
        """Of a while, after another one."""
        for _ in range(users):
            self.ask()
        time.sleep(warm_s)
        begin_s = time.monotonic()
        time.sleep(seconds)
        end_s = time.monotonic()
        self._ended = True
        wait_until(lambda: not self._engine.slots_in_use)
        assert not self.failures, self.failures[0]
        some = [(reply, end) for when_s, reply, end in self.done if begin_s <= when_s <= end_s]
        waits = sorted(end.time_to_first_token_s for _, end in some)
        taken = [
            (when_s - reply.first_token_s) / (end.completion_tokens - 1)
            for when_s, reply, end in self.done
            if begin_s <= when_s <= end_s and end.completion_tokens > 1
        ]
        return {
            "tokens_per_s": sum(end.completion_tokens for _, end in some) / seconds,
            "requests_per_s": len(some) / seconds,
            "ttft_ms": waits[len(waits) // 2] * 1e3,
            "ttft_p99_ms": waits[int(len(waits) * 0.99)] * 1e3,
            "tpot_ms": median(taken) * 1e3,
        }


def replies(
    engine: Engine, requests: Sequence[Request], sampling: Sampling, together: bool, adapters: Sequence[str] = ("",)
) -> list[list[int]]:
    """Their tokens, asked for one by one or all at once, with these adapters in turn."""
    made: list[Reply] = []
    all_ended: list[threading.Event] = []
    for number, (prompt, tokens) in enumerate(requests):
        ended = threading.Event()
        all_ended.append(ended)

        def deliver(event: Event, ended: threading.Event = ended) -> None:
            if not isinstance(event, Delta):
                ended.set()

        adapter = adapters[number % len(adapters)]
        made.append(Reply(prompt, sampling, tokens, deliver, lambda ids: "x" * len(ids), adapter=adapter))
        engine.prepare(made[-1:])
        engine.submit(made[-1:])
        if not together:
            assert ended.wait(30)
    wait_until(lambda: all(ended.is_set() for ended in all_ended))
    return [reply.tokens for reply in made]


def generated(model: Any, requests: Sequence[Request]) -> list[list[int]]:
    """Their tokens as `generate` writes them, one by one."""
    found = []
    for prompt, tokens in requests:
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode():
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
        found.append(whole[0, ids.shape[1] :].tolist())
    return found


def static(model: Any, requests: Sequence[Request], users: int, rounds: int) -> Figures:
    """`generate` over batches of so many, each to the length of its longest reply; tokens that were asked for count."""
    counted, begun_s = 0, 0.0
    for number in range(rounds + 1):
        if number == 1:  # the first one warms up
            torch.cuda.synchronize() if model.device.type == "cuda" else None
            begun_s = time.monotonic()
        batch = [requests[(number * users + place) % len(requests)] for place in range(users)]
        longest = max(len(prompt) for prompt, _ in batch)
        pad = model.config.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt, _ in batch], device=model.device)
        mask = torch.tensor(
            [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in batch], device=model.device
        )
        most = max(tokens for _, tokens in batch)
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False)
        counted += sum(tokens for _, tokens in batch) if number else 0
    torch.cuda.synchronize() if model.device.type == "cuda" else None
    return {"tokens_per_s": counted / (time.monotonic() - begun_s)}


def continuous(model: Any, requests: Sequence[Request], count: int) -> Figures:
    """transformers' continuous batching, given so many requests at the beginning."""
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=96)
    manager = model.init_continuous_batching(generation_config=config)
    manager.start()
    found: Figures = {}
    for some in (requests[:SLOTS], requests[SLOTS : SLOTS + count]):  # the first ones warm up
        begun_s = time.monotonic()
        for prompt, tokens in some:
            manager.add_request(prompt, max_new_tokens=tokens, eos_token_id=-1)
        counted = 0
        for _ in some:
            result = manager.get_result(timeout=20)
            if result is None:
                raise RuntimeError("a reply did not come within 20 s")
            counted += len(result.generated_tokens)
        found = {"tokens_per_s": counted / (time.monotonic() - begun_s)}
    manager.stop(block=True, timeout=20)
    return found


def passes_ms(engine: Engine) -> dict[str, float]:
    """How long a pass of each shape takes."""
    passes: Any = engine._passes
    found = {}
    for kind, shapes in (("step", passes._steps), ("read", passes._reads)):
        for length, one in sorted(shapes.items()):
            with torch.inference_mode():
                for _ in range(3):
                    one._run()
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                for _ in range(50):
                    one._run()
                end.record()
                torch.cuda.synchronize()
            found[f"{kind}_{length}"] = begin.elapsed_time(end) / 50
    return found


def application(folder: Path, device: str, users: Sequence[int], repetitions: int) -> Iterator[tuple[str, Any]]:
    """What the application on a Ray head does, and the bare engine over HTTP, by name; they take turns."""
    from benchmarks.serving_application import LOW_RATE, MODEL, deployed, head, price, variant_of

    bodies = json.loads((FOLDER / "messages.json").read_text())
    for each in bodies:
        each["body"]["model"] = MODEL
    requests = FOLDER / "application.json"
    requests.write_text(json.dumps(bodies))
    port, gpus = free_port(), int(device == "cuda")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.serving", "engine", str(folder), str(port)]
    environment = {
        **os.environ,
        "RAYLOOP_BENCH_DEVICE": device,
        "PYTHONPATH": f"{HOME}:{os.environ.get('PYTHONPATH', '')}",
    }
    with head("gpu", {}) as ray, started(command, environment, port, "bare") as pid:
        settings = {"variants": [variant_of(folder)], "language_model": {"gpus": gpus, "cpus": 2}}
        served = deployed(ray, settings, requests)
        bare = Server("ours_1", pid, f"http://127.0.0.1:{port}/v1/chat/completions", {}, requests)
        loads: list[dict[str, Any]] = [{"users": number} for number in users] + [{"rate": LOW_RATE}]
        measurements = compare([bare, served], loads, repetitions)
    for load, server, runs in measurements:
        what = "the application on Ray Serve" if server is served else "the engine behind uvicorn"
        names = {"ttft_ms": "ttft_s_p50", "ttft_p99_ms": "ttft_s_p99", "tpot_ms": "tpot_s_p50"}
        same = ("tokens_per_s", "requests_per_s")
        yield (
            f"{what}: {load['users']} users" if "users" in load else f"{what}: {load['rate']:g} arrivals/s",
            [{n: run[n] for n in same} | {n: run[their] * 1e3 for n, their in names.items()} for run in runs],
        )
    yield "what the application costs", price(measurements)


def copy_tb_per_s() -> float:
    """Of the GPU's memory, bytes read and written."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    target.copy_(source)
    begin.record()
    for _ in range(20):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 20 * 2 * source.nbytes / begin.elapsed_time(end) / 1e9


def profile(engine: Engine, requests: Sequence[Request], file: Path) -> None:
    """What takes the time of a while with all users."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        Crowd(engine, requests).figures(SLOTS, 0.2, 0.5)
    averages = found.key_averages()
    tables = [
        averages.table(sort_by=by, row_limit=25, max_name_column_width=70)
        for by in ("self_cuda_time_total", "self_cpu_time_total")
    ]
    file.write_text("\n".join(tables))


def plain_model(shape: str, device: str) -> LlamaForCausalLM:
    """A random one that never chooses its end token, nor, greedily, another one that is no text."""
    tokenizer = models.load_tokenizer(FOLDER)
    hidden, layers, heads, groups, feed_forward, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=hidden // heads, intermediate_size=feed_forward,
        max_position_embeddings=2_048, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        net = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        net.get_input_embeddings().weight[list(tokenizer.added_tokens_decoder)] = 0
        net.get_input_embeddings().weight[len(tokenizer) :] *= 0.5
    net.train(False)
    return net


def engines(shape: str, device: str, scratch: Path, only: Sequence[str]) -> Iterator[tuple[str, Callable[[], Engine]]]:
    """By name, what makes each."""
    tokenizer = models.load_tokenizer(FOLDER)

    def made(model: Any, adapters: Adapters | None = None) -> Engine:
        passes = fixed_passes.FixedPasses
        limits = (SLOTS, CONTEXT_TOKENS, 1_000)
        return Engine(model, tokenizer, *limits, prefix_cache_bytes=0, passes=passes, adapters=adapters)

    def with_adapters() -> Engine:
        folders = {place.name: place for place in sorted(adapters_folder(scratch).iterdir())}
        model = plain_model(shape, device)
        return made(model, Adapters(model, folders))

    def without_graphs(model: Any) -> Engine:
        recorder = fixed_passes._recorder
        fixed_passes._recorder = lambda model: lambda run: run
        try:
            return made(model)
        finally:
            fixed_passes._recorder = recorder

    def int8(threshold: float) -> Any:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
        return models.load(scratch, quantization_config=config, device_map={"": 0}, dtype=torch.bfloat16)[0]

    kinds: dict[str, Callable[[], Engine]] = {"bfloat16, recorded": lambda: made(plain_model(shape, device))}
    if device == "cuda":
        kinds["int8, recorded"] = lambda: made(int8(0.0))
    kinds[f"{ADAPTED}, recorded"] = with_adapters
    kinds["bfloat16, not recorded"] = lambda: without_graphs(plain_model(shape, device))
    if device == "cuda":
        kinds["int8, outliers apart, not recorded"] = lambda: made(int8(6.0))
    models.save(plain_model(shape, device), tokenizer, scratch)
    for name, make in kinds.items():
        if not only or any(name.startswith(one) for one in only):
            yield name, make


def report(files: Sequence[Path]) -> None:
    """The dated table of what runs have measured where the GPU is."""
    found: dict[str, Any] = {}
    for file in files:
        found |= json.loads(file.read_text())
    lines = [
        "# Serving on a GPU", "",
        f"{measured.today()}, commit {found.get('commit', measured.commit())}, one {found['gpu']} (copies "
        f"{found['copy_tb_per_s']:.2f} TB/s), torch {found['torch']}, `python -m benchmarks.serving_gpu`", "",
        (__doc__ or "").split("\n\n")[2].replace("\n", " "), "",
        "| engine | users | output tokens/s | requests/s | TTFT ms, p50 / p99 | TPOT ms |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    others = []
    for name, value in found.items():
        what, _, users = name.partition(": ")
        if isinstance(value, dict):
            value = [value] if "tokens_per_s" in value else value
        if not isinstance(value, list) or not isinstance(value[0], dict):
            others.append(f"- {name}: {json.dumps(value)}")
            continue
        rates = [one["tokens_per_s"] for one in value]
        cells = [what, users.removesuffix(" users") or "all at once"]
        cells.append(f"{median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})")
        if "ttft_ms" in value[0]:
            middle = {key: median(one[key] for one in value) for key in value[0]}
            cells += [f"{middle['requests_per_s']:,.1f}", f"{middle['ttft_ms']:.1f} / {middle['ttft_p99_ms']:.1f}"]
            cells += [f"{middle['tpot_ms']:.1f}"]
        lines.append(f"| {' | '.join([*cells, *['-'] * (6 - len(cells))])} |")
    text = "\n".join([*lines, "", *others]) + "\n"
    print(text)
    gpu = found["gpu"].split()[-1].lower()
    (measured.RESULTS / f"{measured.today()}_{gpu}_serving.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--users", type=int, action="append")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--report", type=Path, nargs="+", help="the serving_gpu.json of runs: write their table")
    given = parser.parse_args()
    if given.report:
        report(given.report)
        return
    if given.prepare:
        prepare()
        return
    given.out.mkdir(parents=True, exist_ok=True)
    requests = [tuple(one) for one in json.loads((FOLDER / "requests.json").read_text())]
    random.Random(0).shuffle(requests)
    found: dict[str, Any] = {
        "commit": measured.commit(),
        "torch": torch.__version__,
        "users": given.users or [1, 4, 16, 64],
    }
    on_gpu = given.device == "cuda"
    if on_gpu:
        found |= {"gpu": torch.cuda.get_device_name(), "copy_tb_per_s": copy_tb_per_s()}

    def keep(name: str, value: Any) -> None:
        found[name] = value
        print(name, json.dumps(value), flush=True)
        (given.out / "serving_gpu.json").write_text(json.dumps(found, indent=1))

    scratch = Path("/tmp/rayloop-bench-1b")
    if given.only == ["application"]:
        models.save(plain_model(given.shape, given.device), models.load_tokenizer(FOLDER), scratch)
        for name, value in application(scratch, given.device, given.users or [16], given.repetitions):
            keep(name, value)
        return
    for name, make in engines(given.shape, given.device, scratch, given.only):
        try:
            begun_s = time.monotonic()
            engine = make()
            keep(f"{name}: loaded", time.monotonic() - begun_s)
            adapters = ["", *(f"adapter-{n}" for n in range(ADAPTERS))] if name.startswith(ADAPTED) else [""]
            for users in found["users"]:
                crowds = [Crowd(engine, requests, adapters=adapters) for _ in range(given.repetitions)]
                keep(f"{name}: {users} users", [crowd.figures(users, 0.7, given.seconds) for crowd in crowds])
            check = requests[:24]
            warm = Sampling(None, 1.0, 0.95, 7, ())
            for what, sampling in (("greedy", GREEDY), ("seeded", warm)):
                alone = replies(engine, check, sampling, False, adapters)
                company = replies(engine, check + requests[24:80], sampling, True, adapters)[: len(check)]
                same = sum(map(list.__eq__, alone, company))
                keep(f"{name}: {what} replies that are the same in company, of {len(check)}", same)
                if what == "greedy":
                    greedy = alone
            if on_gpu:
                keep(f"{name}: passes, ms", passes_ms(engine))
                keep(f"{name}: GPU memory, GB", torch.cuda.max_memory_allocated() / 1e9)
            if name == "bfloat16, recorded":
                sampled = Sampling(None, 1.0, 1.0, None, ())
                keep(
                    f"{name}: 64 users, temperature 1", Crowd(engine, requests, sampled).figures(64, 0.7, given.seconds)
                )
                if on_gpu:
                    profile(engine, requests, given.out / "profile.txt")
                engine.stop()
                plain = generated(plain_model(given.shape, given.device), check)
                same = sum(map(list.__eq__, greedy, plain))
                keep(f"{name}: greedy replies that are generate's, of {len(check)}", same)
            else:
                engine.stop()
        except Exception as error:  # what else was measured is kept
            keep(f"{name}: failed", f"{type(error).__name__}: {error}")
        engine = None  # type: ignore[assignment]  # its memory is for the next one
        gc.collect()
        torch.cuda.empty_cache() if on_gpu else None
    if not given.only or "peers" in given.only:
        model = plain_model(given.shape, given.device)
        for users in found["users"]:
            keep(
                f"generate, static: {users} users",
                [static(model, requests, users, 1) for _ in range(given.repetitions)],
            )
        try:
            keep("transformers, continuous batching", [continuous(model, requests, 256)])
        except Exception as error:  # as above; it is told in the table
            keep("transformers, continuous batching: failed", f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
