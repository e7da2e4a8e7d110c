"""Ask vLLM with the plugin of peft_calib how sure its draws are; needs nothing but Python.

    python hub_examples/ask_uncertainty.py "Is the sky blue? Answer yes or no:" "Is ice hot? Answer yes or no:"

The server was started with the exported draws and VLLM_PLUGINS=peft_calib; see docs/serving.md.
"""

from __future__ import annotations

import argparse
import json
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen


def uncertainty(url: str, texts: list[str], api_key: str | None = None, timeout: float = 60.0) -> dict[str, Any]:
    """What the server answers: labels, temperature, what decision rules promise, and the figures of each text."""
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    request = Request(f"{url}/uncertainty", json.dumps({"texts": texts}).encode(), headers)
    try:
        with urlopen(request, timeout=timeout) as response:
            return json.load(response)
    except HTTPError as error:
        raise ConnectionError(f"{url} answered {error.code}: {error.read(2000).decode(errors='replace')}") from None
    except (URLError, TimeoutError) as error:
        raise ConnectionError(f"{url} cannot be reached: {error}") from None


def main() -> None:
    """Print one line a text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    args = parser.parse_args()
    try:
        answer = uncertainty(args.url, args.texts)
    except ConnectionError as error:
        raise SystemExit(f"ask_uncertainty.py: {error}") from None
    for text, row in zip(args.texts, answer["data"], strict=True):
        shares = ", ".join(f"{name} {p:.3f}" for name, p in zip(answer["labels"], row["probabilities"], strict=True))
        print(f"{text}\n  {shares}; entropy {row['entropy']:.3f}, disagreement {row['mutual_information']:.3f}")
        if "answered" in row:
            print(f"  {'answered' if row['answered'] else 'passed on'}")
        if "label_set" in row:
            print(f"  one of {{{', '.join(row['label_set'])}}}")
    print(answer["decision"])


if __name__ == "__main__":
    main()
