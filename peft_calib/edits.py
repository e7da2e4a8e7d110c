"""The switch for people who change a saved adapter on purpose."""

from __future__ import annotations

import json
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .files import write_atomically
from .identity import ADAPTER_MENDS, Identity, config_of, stamp_weights
from .json_files import read_json
from .tuners.config import CalibLoraConfig
from .tuners.sealing import embeddings_beside, record_of


def accept_edits(folder: str | Path) -> str:
    """Make the adapter in a folder, as it is now, the one that is recorded there.

    An adapter whose configuration or tensors are not those that were saved is refused when it is loaded. Whoever
    edits `lora_alpha`, `eval_t` or a tensor on purpose calls this once afterwards. What was fitted or measured with
    the adapter before (a temperature, an evaluation) stays refused: it belongs to the other adapter.

    Args:
        folder: Of a saved adapter of this package.

    Returns:
        The new digest.

    Raises:
        FileNotFoundError: If the folder holds no adapter.
        ValueError: If its files are damaged, or it is an adapter of another package.

    Example:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from peft_calib import HyperLoraConfig
        >>> from torch import nn
        >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), HyperLoraConfig(target_modules=["0"]))
        >>> folder = Path(tempfile.mkdtemp())
        >>> model.save_pretrained(folder)
        >>> config = json.loads((folder / "adapter_config.json").read_text())
        >>> _ = (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 32}))
        >>> HyperLoraConfig.from_pretrained(folder)
        Traceback (most recent call last):
        ...
        ValueError: adapter_config.json: lora_alpha is 32, but the adapter was saved with 8. ...
        >>> digest = accept_edits(folder)
        >>> HyperLoraConfig.from_pretrained(folder).lora_alpha
        32
    """
    folder = Path(folder)
    fields = read_json(folder / CONFIG_NAME, ADAPTER_MENDS)
    config = config_of(fields)
    if not isinstance(config, CalibLoraConfig):
        raise ValueError(f"{folder} holds a {config.peft_type} adapter of PEFT's own, which carries no record.")
    if config.slot_table is not None:
        config.slot_table = [[*row[:4], config.scaling_of(row[0])] for row in config.slot_table]
    identity = Identity.of_folder(folder, config)
    config.identity = record_of(identity)
    record = {**config.identity, "embeddings": embeddings_beside(config, folder) or {}}
    content = {**fields.content, "slot_table": config.slot_table, "identity": record}
    write_atomically(folder / CONFIG_NAME, json.dumps(content, indent=2, sort_keys=True))
    stamp_weights(folder / SAFETENSORS_WEIGHTS_NAME, identity.digest)
    return identity.digest
