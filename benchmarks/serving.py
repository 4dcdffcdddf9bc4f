"""Serving against what users run today: the engine, the whole application, and Ray Serve itself.

    python -m benchmarks.serving --part engine --model 7m --users 1 --users 16 --repetitions 3
    python -m benchmarks.serving --part application
    python -m benchmarks.serving --part serve
    python -m benchmarks.serving --part scaling --model 30m
    python -m benchmarks.serving --part adapters --model 7m --users 16

engine       our engine behind uvicorn and nothing else, and peers on the same model folder and the same requests
application  the application on Ray Serve as users deploy it, against the same engine behind uvicorn
serve        Ray Serve around a constant, its defaults against other settings
adapters     one base with eight low-rank adapters beside it, asked without and with them in turn
scaling      two replicas with and without routing by prefix; a burst of eight times the users; from zero replicas

Models are random Llamas in bfloat16, prompts and lengths of replies those of real conversations (../shared/data; the
embedded shop where it is missing). Every server writes greedily and to the same length: the end token's embedding is
zero, so no model of the benchmark ever chooses it. All servers of a comparison run at once and take turns at being
asked, so that they meet the same machine. Each peer has an environment of its own under .rayloop/peers, made at the
first run. Writes benchmarks/results/<date>_<hardware>_serving.md with the parts that ran today.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import measured
from benchmarks.serving_client import OBJECTIVE
from benchmarks.serving_servers import (
    ADAPTERS,
    FOLDER,
    NAMES,
    ROUND_S,
    SHAPES,
    SLOTS,
    VOCABULARY,
    Server,
    adapters_folder,
    compare,
    model_folder,
    requests_files,
    server,
    table,
)


def engine_part(given: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Our engine and its peers: a title and a table a model."""
    for size in given.model:
        with ExitStack() as stack:
            servers = []
            for name in given.only.split(","):
                try:
                    servers.append(stack.enter_context(server(name, size)))
                except (RuntimeError, subprocess.CalledProcessError) as error:
                    print(f"{name} is left out: {error}", flush=True)
            loads = [{"users": users} for users in given.users] + [{"rate": rate} for rate in given.rate]
            found = compare(servers, loads, given.repetitions)
            equal = same_texts(servers, size) if given.texts else []
        yield f"Engine, {size}", [*table(found), *equal]


def adapters_part(given: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Ours and vLLM with adapters beside a base, asked for the base and for the adapters in turn."""
    for size in given.model:
        with ExitStack() as stack:
            servers = []
            for name in ("ours_adapters", "vllm_adapters"):
                plain = stack.enter_context(server(name, size))
                adapted = replace(plain, name=f"{name}_asked", requests=requests_files(size)["adapters"])
                servers += [plain, adapted]
            found = compare(servers, [{"users": users} for users in given.users], given.repetitions)
            same = _as_peft_writes(servers[1], size)
        yield f"Adapters, {size}", [*table(found), "", same]


def _as_peft_writes(ours: Server, size: str) -> str:
    """How many of some replies are what peft's model writes alone, in bfloat16."""
    import torch
    from peft import PeftModel

    from app import model as models

    count = 2 * ADAPTERS
    texts = ours.ask({"texts": count})["texts"]
    written = {}
    for place in sorted(adapters_folder(model_folder(size)).iterdir()):
        model, tokenizer = models.load(model_folder(size), dtype=torch.bfloat16)
        adapted: Any = PeftModel.from_pretrained(model, place, autocast_adapter_dtype=False)
        for number, request in enumerate(json.loads(ours.requests.read_text())[:count]):
            if request["body"]["model"] == place.name:
                written[number] = _generated(adapted, tokenizer, request)
    same = sum(text.strip() == written[number].strip() for number, text in enumerate(texts))
    return f"Of {count} of our replies asked for one by one, as peft's model writes them in bfloat16: {same}."


def same_texts(servers: Sequence[Server], size: str) -> list[str]:
    """How many of some replies are what `generate` writes alone, in bfloat16, and ours in float32."""
    count = 24
    plain = _plain_texts(model_folder(size), requests_files(size)["ids"], count)
    cells = []
    for each in servers:
        if each.requests.name.endswith("ids.json"):
            texts = each.ask({"texts": count})["texts"]
            same = sum(text.strip() == wanted.strip() for text, wanted in zip(texts, plain, strict=True))
            cells.append(f"{NAMES[each.name]} {same}")
    return [
        "",
        f"Of {count} replies asked for one by one, as plain `generate` writes them in bfloat16: {', '.join(cells)}.",
    ]


def _plain_texts(folder: Path, file: Path, count: int) -> list[str]:
    import torch

    from app import model as models

    model, tokenizer = models.load(folder, dtype=torch.bfloat16)
    return [_generated(model, tokenizer, request) for request in json.loads(file.read_text())[:count]]


def _generated(model: Any, tokenizer: Any, request: dict[str, Any]) -> str:
    """What transformers' own loop writes."""
    import torch

    ids = torch.tensor([request["body"]["prompt"]])
    with torch.inference_mode():
        whole = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=request["tokens"], do_sample=False
        )
    text: str = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("engine", "adapters", "application", "serve", "scaling"), action="append")
    parser.add_argument("--model", choices=tuple(SHAPES), action="append")
    parser.add_argument("--users", type=int, action="append")
    parser.add_argument("--rate", type=float, action="append", default=[], help="Poisson arrivals a second")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument(
        "--only", default="ours,ours_1,ours_2,vllm,static,openvino,transformers", help="servers of part engine"
    )
    parser.add_argument("--setting", action="append", help="some of part serve's settings, and `defaults`")
    parser.add_argument("--variable", action="append", default=[], help="NAME=VALUE, of the application's head")
    parser.add_argument("--no-texts", dest="texts", action="store_false", help="do not compare with plain generate")
    given = parser.parse_args()
    given.users, given.model = given.users or [1, 4, 8, 16, 32], given.model or list(SHAPES)
    FOLDER.mkdir(parents=True, exist_ok=True)
    parts = {"engine": engine_part, "adapters": adapters_part}
    if any(part not in parts for part in given.part or ("all",)):
        from benchmarks import serving_application, serving_scaling

        parts |= {
            "application": serving_application.application_part,
            "serve": serving_application.serve_part,
            "scaling": serving_scaling.scaling_part,
        }
    for part in given.part or parts:
        for title, lines in parts[part](given):
            kept = {"title": title, "heading": measured.heading(), "command": sys.argv[1:], "lines": lines}
            (FOLDER / f"table-{measured.today()}-{title.replace(' ', '_')}.json").write_text(json.dumps(kept))
    report()


def report() -> None:
    """The dated file: today's tables."""
    objective = f"TTFT at most {OBJECTIVE['ttft_s'] * 1e3:.0f} ms and TPOT at most {OBJECTIVE['tpot_s'] * 1e3:.0f} ms"
    lines = [
        "# Serving", "",
        f"Random Llamas of {VOCABULARY:,} tokens' vocabulary, bfloat16, greedy; prompts and lengths of replies of real "
        f"conversations. Every server batches {SLOTS} replies. Runs of {ROUND_S:.0f} s, servers take turns; median "
        f"(range). TTFT, TPOT and ITL as vLLM defines them, seen by the client; goodput: {objective}. The client runs "
        "on the same cores. Others' CPU: what the machine did for others meanwhile, of all cores.",
    ]  # fmt: skip
    for file in sorted(FOLDER.glob(f"table-{measured.today()}-*.json")):
        kept = json.loads(file.read_text())
        command = f"`python -m benchmarks.serving {' '.join(kept['command'])}`"
        lines += ["", f"## {kept['title']}", "", f"{kept['heading']}, {command}", "", *kept["lines"]]
    measured.write("serving", lines)


if __name__ == "__main__":
    main()
