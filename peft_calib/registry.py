"""The one place that touches PEFT's type registry.

PEFT keeps its methods in a closed enum (`PeftType`) and three mappings. `register_tuner` adds a true member to the
enum and then goes through PEFT's own `register_peft_method`, so that everything that works for a built-in method
(`get_peft_model`, JSON configs, `AutoPeftModel*`, pickling, spawned workers) works for ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from .internals.peft import extend_peft_types, wrap_method_reading
from .versions import check_peft_version


def ensure_peft_type(name: str) -> PeftType:
    """Return the `PeftType` member called `name`, adding it to the enum when it is new."""
    if name in PeftType.__members__:
        return PeftType[name]
    return extend_peft_types(name)


def name_damaged_configs() -> None:
    """Have PEFT name the file when an `adapter_config.json` of any method is damaged.

    PEFT reads the file, to learn its method, before any code of a method is asked.
    """
    read = PeftConfig.from_json_file.__func__
    if getattr(read, "names_the_file", False):
        return

    def from_json_file(cls: type[PeftConfig], path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        try:
            content = read(cls, path_json_file, **kwargs)
        except json.JSONDecodeError as error:
            raise json.JSONDecodeError(f"{path_json_file} is damaged: {error.msg}", error.doc, error.pos) from error
        except (UnicodeDecodeError, RecursionError, TypeError) as error:
            raise ValueError(f"{path_json_file} is damaged: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path_json_file} is damaged: it holds a {type(content).__name__}, not a mapping")
        method = content.get("peft_type")
        if "peft_type" in content and not (isinstance(method, str) and method in PEFT_TYPE_TO_CONFIG_MAPPING):
            raise ValueError(
                f"{path_json_file}: peft_type is {method!r}, which is no method known here. Restore the file, or "
                "import the package that the method comes from."
            )
        return content

    def naming(find: Callable[..., str]) -> Callable[..., str]:
        def get_peft_type(cls: type[PeftConfig], model_id: str, **kwargs: Any) -> str:
            try:
                return find(cls, model_id, **kwargs)
            except KeyError as error:
                raise ValueError(
                    f"The adapter_config.json of {model_id} does not name its method: {error}."
                ) from error

        return get_peft_type

    wrap_method_reading(naming)
    from_json_file.__doc__, from_json_file.names_the_file = read.__doc__, True  # type: ignore[attr-defined]
    PeftConfig.from_json_file = classmethod(from_json_file)  # type: ignore[method-assign,assignment]


def register_tuner(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> PeftType:
    """Make a tuner known to PEFT under `name`; calling it again with the same classes changes nothing.

    Args:
        name: Upper-case name, e.g. `"HYPERLORA"`.
        config_cls: Its configuration class.
        model_cls: Its `BaseTuner` subclass.

    Returns:
        The enum member.

    Raises:
        ImportError: If PEFT is outside the tested range or its enum cannot be extended.
        RuntimeError: If another package has taken the name.
    """
    check_peft_version()
    name_damaged_configs()
    peft_type = ensure_peft_type(name)
    taken = (PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type), PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type))
    if taken == (None, None):
        register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls)
    elif not all(_same_class(old, new) for old, new in zip(taken, (config_cls, model_cls), strict=True)):
        raise RuntimeError(
            f"The PEFT method {name} is already registered by {taken[0]} and {taken[1]}, so {config_cls} and "
            f"{model_cls} cannot be added under that name. Uninstall the other package, import only one of the two in "
            "a process, or register under another name."
        )
    else:  # the module was reloaded: its classes are new objects of the same name
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    return peft_type


def _same_class(old: type | None, new: type) -> bool:
    return old is not None and (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)
