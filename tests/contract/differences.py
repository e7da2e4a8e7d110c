"""Where an adapter of this package does otherwise than PEFT's LoRA on the same base: all of it, with the reason.

`docs/bases.md` shows this list, and a test holds the page to it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes:
        what: What one does.
        lora: What PEFT's LoRA does.
        ours: What ours does.
        why: The reason.
        shown_by: The test that shows it, as `file::function`.
    """

    what: str
    lora: str
    ours: str
    why: str
    shown_by: str


DIFFERENCES: dict[str, Difference] = {
    "weights read without a call": Difference(
        "adapt a map whose parent reads its weight itself (`x_proj`, `dt_proj`, `out_proj` of Mamba; WavLM's)",
        "refuses `out_proj` of Mamba, adapts the others without effect where the weight is read",
        "refused, with the names to leave out",
        "the layer around it is never called there, so it would train nothing",
        "tests/contract/test_bases.py::test_a_map_that_nobody_calls_is_refused",
    ),
    "rows shared by functions": Difference(
        "ask K draws of a base whose rows share what a map is applied to (relative positions of DeBERTa), or train K "
        "members on it",
        "has one function",
        "K passes instead of one; not with gradient checkpointing",
        "K functions make K tables, for which the model has no place in one pass",
        "tests/contract/test_bases.py::test_members_train_where_rows_share_a_table",
    ),
    "embeddings and convolutions": Difference(
        "adapt an embedding or a convolution",
        "adapts it",
        "refused, with the way out: train it whole (`modules_to_save`)",
        "a law answers with factors of linear maps of a slot's two sizes",
        "tests/tuners/test_state.py::test_conv_target_is_refused",
    ),
    "torch's attention": Difference(
        "adapt `out_proj` of `torch.nn.MultiheadAttention`",
        "merges and unmerges around each call",
        "refused",
        "its weight is read without a call; draws cannot be merged into one weight",
        "tests/tuners/test_state.py::test_target_inside_multihead_attention_is_refused",
    ),
    "pickled weights": Difference(
        "load `adapter_model.bin`",
        "loads it",
        "refused",
        "a pickle runs what is written in it; safetensors only",
        "tests/tuners/test_state.py::test_pickled_weights_are_refused",
    ),
    "tensors of many layers": Difference(
        "adapt fewer layers (`layers_to_transform`)",
        "has fewer tensors",
        "has smaller ones",
        "a law keeps the parameters of maps of one shape in one tensor, and is asked once for all layers",
        "tests/contract/test_peft_contract.py::test_layers_to_transform_reduces_the_parameters",
    ),
    "weights of a head": Difference(
        "read the weight of a head trained whole (`modules_to_save.default.weight`)",
        "has one",
        "of members an `AttributeError`, which says where they are",
        "each member has a head of its own, whose tensors are the law's",
        "tests/tuners/ensemble_lora/test_members.py::test_a_head_of_members_has_no_weight_of_its_own",
    ),
    "biases of another configuration": Difference(
        'load biases of the base model into an adapter that trains none (`bias="none"`)',
        "overwrites the base model's, which the adapter's file will not have",
        "trains them from then on, says so and saves them; refused beside another adapter, and from a file",
        "they would be lost when it is saved, or change what other adapters of the model answer",
        "tests/contract/test_peft_doors.py::test_biases_that_are_loaded_are_trained_and_saved",
    ),
    "mixed types": Difference(
        "put it beside another type with `get_peft_model(..., mixed=True)`",
        "goes with five other types",
        "refused by PEFT; several laws, or a law and a LoRA, go on one base by `add_adapter` of transformers",
        "PEFT lists the types of `PeftMixedModel` in its code",
        "tests/contract/test_peft_contract.py::test_a_stock_lora_beside_it_is_refused_by_peft_mixed_model",
    ),
    "options of LoRA alone": Difference(
        "set `use_dora`, `target_parameters`, `init_lora_weights`, `use_qalora` and others of `LoraConfig`",
        "has them",
        "refused by name, with the reason or the name they have here",
        "they change one pair of factors, or how it starts; a law makes its factors itself",
        "tests/contract/test_peft_doors.py::test_options_of_lora_alone_are_refused_by_name",
    ),
    "weighted sums": Difference(
        "call `add_weighted_adapter`",
        'adds factors (`"cat"` exactly, `"linear"` with cross terms)',
        'refused; exports are added by PEFT, exactly with `combination_type="cat"`',
        "laws cannot be added, only what they answer",
        "tests/contract/test_peft_doors.py::test_laws_are_not_added",
    ),
    "scale for a while": Difference(
        "use `rescale_adapter_scale`",
        "scales LoRA's layers",
        "refused by PEFT where there is no LoRA",
        "it looks for LoRA's own layers; set `lora_alpha`, and say so by `accept_edits`",
        "tests/contract/test_peft_doors.py::test_only_a_lora_is_rescaled",
    ),
    "hot swap": Difference(
        "use `hotswap_adapter`",
        "swaps LoRAs without trained heads",
        "draws are swapped as the LoRAs that they are exported to; heads by `load_adapter` and `set_adapter`; a law "
        "is refused",
        "PEFT swaps LoRA's tensors only",
        "tests/contract/test_peft_doors.py::test_draws_are_swapped_while_serving",
    ),
    "offloaded with its base": Difference(
        "offload the whole model, adapter and all (`cpu_offload`, `disk_offload`)",
        "predicts; is not saved",
        "refused at the first forward; offload the base model and add the adapter then (a LoRA answers NaN there), or "
        "give the law a device in the `device_map`",
        "a law is asked once for all layers and holds tensors of its own, which offloading replaces in each call",
        "tests/contract/test_offload.py::test_a_law_that_is_offloaded_is_refused",
    ),
}
