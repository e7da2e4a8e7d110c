"""Registration with PEFT: a true enum member, once, in every process, and never over somebody else's."""

import copy
import importlib
import json
import multiprocessing
import pickle
import subprocess
import sys

import pytest
from peft import LoraConfig, PeftConfig, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_calib
from peft_calib import HyperLoraConfig, HyperLoraModel
from peft_calib.registry import ensure_peft_type, register_tuner
from peft_calib.versions import check_peft_version

NAME = "HYPERLORA"


def test_member_is_a_true_member():
    member = PeftType.HYPERLORA
    assert PeftType(NAME) is PeftType[NAME] is getattr(PeftType, NAME) is member
    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert (member.name, member.value) == (NAME, NAME)
    assert member == NAME
    assert hash(member) == hash(NAME)
    assert {NAME: 1}[member] == {member: 1}[NAME] == 1
    assert member in PeftType
    assert list(PeftType).count(member) == 1
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__)
    assert str(member).partition(".")[2] == NAME  # get_model_status splits there
    assert json.loads(json.dumps(member)) == NAME
    assert copy.copy(member) is copy.deepcopy(member) is member


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_member_pickles(protocol):
    assert pickle.loads(pickle.dumps(PeftType.HYPERLORA, protocol)) is PeftType.HYPERLORA


def test_stock_members_are_untouched():
    code = "from peft import PeftType; before = [(m, m.value) for m in PeftType]; import peft_calib;"
    code += "assert [(m, m.value) for m in PeftType][:len(before)] == before"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mappings_by_member_and_by_string():
    for key in (PeftType.HYPERLORA, NAME):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is HyperLoraConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[key] is HyperLoraModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == "hyperlora_" == HyperLoraModel.prefix


def test_registering_again_changes_nothing():
    before = list(PeftType)
    assert register_tuner(NAME, HyperLoraConfig, HyperLoraModel) is PeftType.HYPERLORA
    assert list(PeftType) == before


def test_survives_reload():
    module = importlib.import_module("peft_calib.tuners.hyper_lora")
    try:
        importlib.reload(module)
        assert PEFT_TYPE_TO_CONFIG_MAPPING[NAME].__name__ == "HyperLoraConfig"
        assert list(PeftType).count(PeftType.HYPERLORA) == 1
    finally:
        register_tuner(NAME, HyperLoraConfig, HyperLoraModel)


def test_clash_is_refused():
    class Foreign(PeftConfig):
        pass

    with pytest.raises(RuntimeError, match=r"HYPERLORA is already registered by .* Uninstall the other package"):
        register_tuner(NAME, Foreign, HyperLoraModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[NAME] is HyperLoraConfig


def test_known_name_is_returned_not_added():
    assert ensure_peft_type("LORA") is PeftType.LORA


@pytest.mark.parametrize("version", ["0.20.0", "0.21.1", "0.22.0", "1.0"])
def test_untested_peft_is_refused_at_import(version):
    with pytest.raises(ImportError, match=r"tested with peft >= 0.21.2 .* pip install"):
        check_peft_version(version)


def test_json_round_trip(tmp_path):
    HyperLoraConfig(r=3, target_modules=["query"]).save_pretrained(tmp_path)
    for loaded in (PeftConfig.from_pretrained(tmp_path), HyperLoraConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, HyperLoraConfig)
        assert loaded.r == 3
        assert loaded.peft_type is PeftType.HYPERLORA
    with open(tmp_path / "adapter_config.json") as file:
        assert isinstance(get_peft_config(json.load(file)), HyperLoraConfig)


def test_without_the_import_loading_names_the_type(tmp_path):
    HyperLoraConfig(target_modules=["query"]).save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "KeyError: 'HYPERLORA'" in run.stderr


def _type_of_config(config):
    return config.peft_type.value, type(config).__name__


def test_config_travels_to_a_spawned_process():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        # a pool starts a process that dies again and again
        found = pool.apply_async(_type_of_config, (HyperLoraConfig(),)).get(timeout=240)
    assert found == (NAME, "HyperLoraConfig")


def test_stock_lora_unharmed():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig
    assert peft_calib.__version__
