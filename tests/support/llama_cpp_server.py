"""A server of llama.cpp in a process of its own, and base models in its format.

python llama_cpp_server.py [--f16-cache] [--flash-attention] BASE.gguf DRAW-0.gguf ...

prints the address and serves until it is ended; without options in 32 bits throughout, with both as llama.cpp does by
itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np


@contextmanager
def serving(base: Path, adapters: Sequence[Path], *options: str) -> Iterator[str]:
    """The address of a server, as long as the block lasts."""
    command = [sys.executable, __file__, *options, str(base), *map(str, adapters)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    watch = threading.Timer(60, process.kill)  # one that does not start ends its output
    watch.start()
    try:
        address = next((line for line in process.stdout if line.startswith("http")), "")
        watch.cancel()
        assert address, "llama.cpp's server did not start"
        yield address.strip()
    finally:
        watch.cancel()
        process.kill()
        process.wait()


def ask(url: str, ids: list[int], adapter: int, count: int, reuse: bool = False) -> dict[int, float]:
    """Log-probability of each next token after a prompt, with one adapter in place.

    `reuse` lets the server take what it kept of earlier prompts, whatever adapter that was computed with.
    """
    scales = [{"id": k, "scale": float(k == adapter)} for k in range(count)]  # those left out keep their scale
    body = {"prompt": ids, "n_predict": 1, "n_probs": 100_000, "temperature": 0, "lora": scales, "cache_prompt": reuse}
    request = Request(f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
    listed = json.loads(urlopen(request, timeout=60).read())["completion_probabilities"][0]["top_logprobs"]
    return {entry["id"]: entry["logprob"] for entry in listed}


def write_base(model, file: Path) -> None:
    """A small Llama, Qwen2 or Qwen3 in 32 bits; its tokens have no texts worth reading."""
    import gguf

    config, name = model.config, model.config.model_type
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    known = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head = config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"\u2581{number}" for number in range(3, config.vocab_size))])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3, *[1] * (config.vocab_size - 3)])
    for key, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        array = tensor.float().numpy()
        if name == "llama" and heads is not None:
            # llama.cpp turns neighbouring rows against each other, transformers rows half a head apart
            rows = np.arange(len(array)).reshape(heads, 2, -1).transpose(0, 2, 1).ravel()
            array = array[rows]
        writer.add_tensor(known.get_name(key, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def written_in_32_bits(source: Path, file: Path) -> Iterator[Path]:
    """A quantised model with its weights as they are read, as long as the block lasts: it is large."""
    import gguf

    reader, array = gguf.GGUFReader(source), gguf.GGUFValueType.ARRAY
    writer = gguf.GGUFWriter(file, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, sub_type=field.types[-1] if kind == array else None)
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(weights, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    yield file
    file.unlink()


def main(*arguments: str) -> None:
    """Serve until ended."""
    import xllamacpp

    options = [word for word in arguments if word.startswith("--")]
    base, *adapters = (word for word in arguments if word not in options)
    params = xllamacpp.CommonParams()
    params.model.path = base
    params.n_ctx, params.n_parallel, params.port, params.warmup = 512, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if "--f16-cache" not in options:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if "--flash-attention" not in options:
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    found = []
    for path in adapters:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = path, 0.0
        found.append(info)
    params.lora_adapters = found
    server = xllamacpp.Server(params)  # which ends when nobody holds it
    print(f"\n{server.listening_address}", flush=True)  # on a line of its own: llama.cpp logs there, too
    time.sleep(3600)


if __name__ == "__main__":
    main(*sys.argv[1:])
