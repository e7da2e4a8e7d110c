"""This release, and which releases of PEFT it may be used with, asked without loading that."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

__version__ = "0.1.0"

#: The PEFT releases whose (internal) state-dict hooks the tuners are written and tested against.
MINIMUM_PEFT, BELOW_PEFT = Version("0.21.2"), Version("0.22")


def check_peft_version(installed: str | None = None) -> None:
    """Refuse a PEFT release on which the tuners could save or load wrongly."""
    found = Version(installed or version("peft"))
    if not MINIMUM_PEFT <= found < BELOW_PEFT:
        raise ImportError(
            f"peft_calib is tested with peft >= {MINIMUM_PEFT} and < {BELOW_PEFT}, but peft {found} is installed. Its "
            f'adapters could be saved or loaded wrongly there: pip install "peft>={MINIMUM_PEFT},<{BELOW_PEFT}".'
        )
