"""Where the hparams YAMLs are: `hparams/LocFT-BF/` in a checkout, beside this file in a wheel."""

from __future__ import annotations

from pathlib import Path

from .hparams_rules import ALG_NAME


def hparams_folder() -> Path:
    """Returns the folder of the YAMLs that come with this library."""
    here = Path(__file__).resolve().parent
    checkout = here.parent / "hparams" / ALG_NAME
    return checkout if checkout.is_dir() else here / "hparams_yaml" / ALG_NAME
