"""Which inputs are repeated for K draws, and which rows can be picked."""

import threading

import pytest
import torch
from peft import get_peft_model
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from peft_calib import BayesianLoraConfig, CurveLoraConfig, draws, predict
from peft_calib.tuners.rows import check_packed, count_rows, repeat_rows, select_rows

IDS = torch.tensor([[9, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    "name",
    [
        *["image_grid_thw", "pixel_values", "pixel_values_videos", "video_grid_thw", "image_sizes"],
        *["second_per_grid_ts", "input_features", "feature_attention_mask", "audio_values", "aspect_ratio_ids"],
    ],
)
def test_media_beside_text_are_repeated_whatever_their_number(name):
    for count in (1, 2, 3):
        media = torch.arange(count * 2).view(count, 2)
        repeated = repeat_rows({"input_ids": IDS, name: media}, 2, 2)
        assert torch.equal(repeated[name], torch.cat([media, media]))
        assert len(repeated["input_ids"]) == 4


def test_lists_of_media_are_repeated_as_lists():
    pictures = [torch.zeros(3, 4, 4), torch.ones(3, 2, 2)]
    inputs = {"input_ids": IDS, "pixel_values": pictures, "image_sizes": [(4, 4), (2, 2)], "images": None}
    repeated = repeat_rows(inputs, 3, 2)
    assert [p.shape for p in repeated["pixel_values"]] == [p.shape for p in pictures] * 3
    assert repeated["image_sizes"] == [(4, 4), (2, 2)] * 3 and repeated["images"] is None


def test_what_broadcasts_still_does():
    inputs = {
        "input_ids": IDS,
        "position_ids": torch.arange(3)[None],
        "attention_mask": torch.ones(1, 1, 3, 3),
        "cache_position": torch.arange(3),
    }
    repeated = repeat_rows(inputs, 2, 2)
    assert all(torch.equal(repeated[name], inputs[name]) for name in inputs if name != "input_ids")
    three = {"input_ids": IDS, "position_ids": torch.arange(18).view(3, 2, 3)}
    assert repeat_rows(three, 2, 2)["position_ids"].shape == (3, 4, 3)
    one = {
        "input_ids": IDS[:1],
        "position_ids": torch.arange(9).view(3, 1, 3),
        "attention_mask": torch.ones(1, 1, 3, 3),
    }
    assert repeat_rows(one, 2, 1)["position_ids"].shape == (3, 2, 3)
    assert len(repeat_rows(one, 2, 1)["attention_mask"]) == 2


def test_ends_of_packed_sequences_go_on_counting():
    """Flash attention counts them over all rows: told again from the start, the rows of a second draw had none."""
    ends = torch.tensor([0, 5, 14, 18], dtype=torch.int32)
    packed = {"input_ids": torch.ones(1, 18), "position_ids": torch.arange(18)[None], "max_length_q": 9}
    repeated = repeat_rows(packed | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}, 2, 1)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert repeated[name].tolist() == [0, 5, 14, 18, 23, 32, 36] and repeated[name].dtype == torch.int32
    assert repeated["max_length_q"] == 9 and repeated["position_ids"].shape == (2, 18)


def test_a_packed_row_that_would_be_read_as_one_sequence_is_refused(tiny_decoder):
    """transformers' flash attention looks at positions in a batch of one row only; its kernel is not needed here."""
    model = get_peft_model(tiny_decoder(), BayesianLoraConfig(r=2, target_modules=["q_proj"]))
    packed = {"input_ids": torch.ones(1, 6, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    with torch.no_grad(), draws(model, 2):
        assert len(model(**packed).logits) == 2
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="reads the sequences of a packed row as one"):
            model(**packed)
    ends = {"cu_seq_lens_q": torch.tensor([0, 3, 6])}
    root = model.get_base_model()
    check_packed(root, packed | ends, 1)
    check_packed(root, packed | {"position_ids": torch.arange(6)[None]}, 1)
    check_packed(root, packed | {"attention_mask": torch.ones(1, 6)}, 1)


def test_images_alone_are_rows():
    assert count_rows({"pixel_values": torch.zeros(5, 3, 4, 4)}, "pixel_values") == 5
    assert repeat_rows({"pixel_values": torch.zeros(5, 3, 4, 4)}, 2, 5)["pixel_values"].shape[0] == 10
    assert count_rows({"pixel_values": torch.zeros(8, 12), "input_ids": IDS}, "pixel_values") == 2


def test_rows_are_picked_only_where_each_has_its_images():
    index = torch.tensor([1])
    each = {"input_ids": torch.tensor([[9, 9, 1], [9, 9, 2]]), "pixel_values": torch.arange(8.0).view(4, 2)}
    picked = select_rows(each, 2, index, media_tokens=[9])
    assert picked["pixel_values"].tolist() == [[4, 5], [6, 7]]
    listed = {**each, "pixel_values": [1, 2, 3, 4]}
    assert select_rows(listed, 2, index, media_tokens=[9])["pixel_values"] == [3, 4]
    both_of_one = {"input_ids": torch.tensor([[9, 9, 1], [0, 0, 2]]), "pixel_values": torch.arange(4.0).view(2, 2)}
    for tokens in ([9], []):  # as many images as rows, but not one in each
        with pytest.raises(ValueError, match="do not tell which row"):
            select_rows(both_of_one, 2, index, media_tokens=tokens)
    with pytest.raises(ValueError, match="do not divide"):
        select_rows({**each, "pixel_values": torch.zeros(3, 2)}, 2, index, media_tokens=[9])
    typed = {**each, "mm_token_type_ids": torch.tensor([[1, 1, 0], [1, 1, 0]])}
    assert select_rows(typed, 2, index)["pixel_values"].tolist() == [[4, 5], [6, 7]]


# ----------------------------------------------------------------- models

IMAGE, START, END, PAD = 50, 51, 52, 2


@pytest.fixture(scope="module")
def vision_language():
    text = dict(vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=PAD)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=1, patch_size=2, in_channels=3)
    vision |= dict(spatial_merge_size=1, temporal_patch_size=1)
    ids = dict(image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=END, video_token_id=53)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids))
        config = BayesianLoraConfig(target_modules=["q_proj", "v_proj"], num_train_examples=10, init="random")
        return get_peft_model(base, config).eval()


def pictures_in_text(*images_of_row):
    rows = [([START] + [IMAGE] * 4 + [END]) * n + [5, 6, 7] for n in images_of_row]
    tokens = torch.tensor([[PAD] * (max(map(len, rows)) - len(row)) + row for row in rows])
    images = sum(images_of_row)
    return {
        "input_ids": tokens,
        "attention_mask": (tokens != PAD).long(),
        "mm_token_type_ids": (tokens == IMAGE).long(),
        "pixel_values": torch.randn(4 * images, 12, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * images),
    }


@pytest.mark.parametrize("images", [(1,), (2,), (1, 1), (0, 2), (1, 0), (0, 1, 0), (3, 0, 1)])
def test_draws_of_a_batch_with_pictures_are_single_draws(vision_language, images):
    batch, alone = pictures_in_text(*images), []
    for k in range(3):
        with torch.no_grad(), draws(vision_language, 1, first=k):
            alone.append(vision_language(**batch).logits[:, -1].softmax(-1))
    found = predict(vision_language, batch, num_samples=3).sample_probabilities
    torch.testing.assert_close(found, torch.stack(alone), rtol=0, atol=1e-5)


def test_adaptive_draws_pick_rows_with_their_pictures(vision_language):
    options = {"num_samples": "auto", "max_samples": 8, "tolerance": 1e-3, "antithetic": False}
    found = predict(vision_language, pictures_in_text(1, 1, 1), **options)
    fixed = predict(vision_language, pictures_in_text(1, 1, 1), num_samples=8).sample_probabilities
    for row, count in enumerate(found.draws_per_row.tolist()):
        torch.testing.assert_close(found.sample_probabilities[:count, row], fixed[:count, row], rtol=0, atol=1e-5)


def head_without_padding(name, config=None):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "llama":
            sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2)
            base = LlamaForSequenceClassification(LlamaConfig(**sizes, num_attention_heads=2, num_labels=3))
        else:
            base = GPT2ForSequenceClassification(
                GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=40, num_labels=3)
            )
    assert base.config.pad_token_id is None
    targets = ["q_proj", "v_proj"] if name == "llama" else ["c_attn"]
    config = config or BayesianLoraConfig(num_train_examples=10, init="random", target_modules=targets, init_sd=0.5)
    return get_peft_model(base, config).eval()


ONE = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
TWO = {"input_ids": torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]])}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_row_without_a_padding_token(name):
    model, alone = head_without_padding(name), []
    for k in range(3):
        with torch.no_grad(), draws(model, 1, first=k):
            alone.append(model(**ONE).logits)
    with torch.no_grad(), draws(model, 3):
        together = model(**ONE).logits
        embedded = model(inputs_embeds=model.get_input_embeddings()(ONE["input_ids"])).logits
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)
    torch.testing.assert_close(embedded, torch.cat(alone), rtol=0, atol=1e-6)
    for how in ("sample", "late"):
        found = predict(model, ONE, how=how, num_samples=3).sample_probabilities
        torch.testing.assert_close(found, torch.stack(alone).softmax(-1), rtol=0, atol=1e-6)
    assert predict(model, ONE, num_samples="auto", max_samples=4).probabilities.shape == (1, 3)
    for call in (lambda: model(**TWO), lambda: predict(model, TWO, num_samples=2)):
        with pytest.raises(ValueError, match="no padding token"):  # several rows of the caller's stay refused
            call()
    assert model.config.pad_token_id is None


def test_two_points_of_a_curve_at_batch_size_one():
    model = head_without_padding("llama", CurveLoraConfig(jsd_weight=0.2, target_modules=["q_proj"])).train()
    output = model(**ONE, labels=torch.tensor([1]))
    output.loss.backward()
    assert output.logits.shape == (1, 3) and torch.isfinite(output.loss)
    assert model.config.pad_token_id is None
    with pytest.raises(ValueError, match="no padding token"):
        model(**TWO, labels=torch.tensor([1, 0]))
    assert model.config.pad_token_id is None


def test_the_refusal_is_not_lent_to_other_threads():
    model, faults = head_without_padding("llama"), []

    def sample():
        for _ in range(40):
            with torch.no_grad(), draws(model, 3):
                if len(model(**ONE).logits) != 3:
                    faults.append("rows")

    thread = threading.Thread(target=sample)
    thread.start()
    refused = 0
    while thread.is_alive():
        with torch.no_grad(), pytest.raises(ValueError, match="no padding token"):
            model(**TWO)
        refused += 1
    thread.join()
    assert refused and not faults and model.config.pad_token_id is None
