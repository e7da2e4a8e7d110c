"""Tiny random stand-ins for the hub models that PEFT's suites name, saved under the same relative paths.

A suite that asks for `peft-internal-testing/tiny-random-OPTForCausalLM` then finds a folder of that name in the
current directory, and neither the suite nor the libraries need to be patched.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

VOCABULARY, WIDTH, HEADS, LAYERS, POSITIONS = 1152, 32, 4, 3, 256
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
#: The suites feed the tokens 1 and 2, so the padding token, whose embedding is zero, must be another.
IDS = dict(vocab_size=VOCABULARY, bos_token_id=0, pad_token_id=3, eos_token_id=4)

_DECODER = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=48, **IDS)
_LLAMA = dict(_DECODER, num_key_value_heads=2, max_position_embeddings=POSITIONS)
_GPT = dict(n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS, **IDS)
_BERT = dict(_DECODER, max_position_embeddings=POSITIONS)
_DEBERTA = dict(_BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=True)
_OPT = dict(
    hidden_size=WIDTH,
    word_embed_proj_dim=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    ffn_dim=48,
    max_position_embeddings=POSITIONS,
    **IDS,
)
_BART = dict(
    d_model=WIDTH,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=POSITIONS,
    decoder_start_token_id=4,
    forced_eos_token_id=4,
    **IDS,
)
_T5 = dict(d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=HEADS, decoder_start_token_id=3, **IDS)
# twelve layers, as the real one: a suite counts the adapted modules
_OPT_125M = dict(_OPT, hidden_size=128, word_embed_proj_dim=128, ffn_dim=256, num_hidden_layers=12)

_PEFT, _TRL, _HF = "peft-internal-testing", "trl-internal-testing", "hf-internal-testing"
#: relative path: (model class, configuration class, its arguments)
MODELS = {
    f"{_PEFT}/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", _OPT),
    f"{_PEFT}/opt-125m": ("OPTForCausalLM", "OPTConfig", _OPT_125M),
    f"{_PEFT}/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    f"{_HF}/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    f"{_PEFT}/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", dict(_GPT, rotary_dim=4)),
    f"{_TRL}/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    f"{_TRL}/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", "LlamaConfig", _LLAMA),
    f"{_HF}/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", _LLAMA),
    f"{_PEFT}/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    f"{_HF}/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", "Gemma3TextConfig", dict(_LLAMA, head_dim=8)),
    f"{_PEFT}/tiny-random-BertModel": ("BertModel", "BertConfig", _BERT),
    f"{_PEFT}/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", "BertConfig", _BERT),
    f"{_PEFT}/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", _BERT),
    f"{_PEFT}/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _BERT,
    ),
    f"{_PEFT}/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", _DEBERTA),
    f"{_PEFT}/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", _DEBERTA),
    f"{_PEFT}/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", "BartConfig", _BART),
    f"{_PEFT}/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", "T5Config", _T5),
}
#: A saved LoRA adapter that the configuration suite reads.
ADAPTER = f"{_PEFT}/tiny-opt-lora-revision"


def build(folder: Path) -> Path:
    """Build all models once.

    Args:
        folder: Cache folder.

    Returns:
        The folder to run the suites in; a new transformers version gets a new one.
    """
    root = folder / f"models-transformers-{transformers.__version__}"
    if (root / "complete").exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    tokenizer = _tokenizer()
    for name, (model_class, config_class, settings) in MODELS.items():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    base = transformers.AutoModelForCausalLM.from_pretrained(root / f"{_PEFT}/tiny-random-OPTForCausalLM")
    get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"])).save_pretrained(root / ADAPTER)
    (root / "complete").touch()
    return root


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = [SPECIAL["bos_token"], "one", "two", SPECIAL["pad_token"], SPECIAL["eos_token"], SPECIAL["unk_token"]]
    words += [f"w{index}" for index in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
