"""The facts of a ledger in forms that need no ledger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..delta.delta import Delta
from ..errors import LedgerError
from ..hparams import LocFTBFHyperParams
from ..utils.files import output_errors

EXPORTS = ("edit", "model", "adapter")


def write_export(
    make: Callable[[], Delta],
    hparams: LocFTBFHyperParams,
    output: str | Path,
    as_: str,
    model: str | Path | None,
) -> Path:
    """Writes a ledger's facts; see `Ledger.export`.

    Args:
        make: Returns them as an edit; called once all else is known to be right.
        hparams: The ledger's settings.
        output: A folder that is new or empty.
        as_: One of `EXPORTS`.
        model: The folder of the base model; where the ledger's was loaded from if `None`.

    Raises:
        LocFTError: It cannot be exported so, or `output` cannot be written.
    """
    if as_ not in EXPORTS:
        raise LedgerError(f"`as={as_}` must be one of {', '.join(EXPORTS)}.")
    folder = hparams.model_name if model is None else model
    if as_ != "edit" and not Path(str(folder)).is_dir():
        raise LedgerError(
            f"`as={as_}` is written from the base model's folder, and `{folder}` is none. Give it "
            "with model=FOLDER."
        )
    delta, trusted = make(), hparams.trust_remote_code
    if as_ == "model":
        delta.apply_to_folder(folder, output, trust_remote_code=trusted)
    elif as_ == "adapter":
        delta.export_adapter(folder, output, trust_remote_code=trusted)
    else:
        path = Path(output) / "edit.safetensors"
        with output_errors(output):
            path.parent.mkdir(parents=True, exist_ok=True)
        delta.save(path)
        return path
    return Path(output)
