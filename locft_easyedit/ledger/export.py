"""The facts of a ledger in forms that need no ledger."""

from __future__ import annotations

from pathlib import Path

from ..delta.delta import Delta
from ..errors import LedgerError
from ..hparams import LocFTBFHyperParams
from ..utils.files import output_errors

EXPORTS = ("edit", "model", "adapter")


def check_export(hparams: LocFTBFHyperParams, as_: str, model: str | Path | None) -> str:
    """Returns the folder of the base model that an export is written from, if it is.

    Args:
        hparams: The ledger's settings.
        as_: One of `EXPORTS`.
        model: The folder of the base model; where the ledger's was loaded from if `None`.

    Raises:
        LedgerError: It cannot be exported so.
    """
    if as_ not in EXPORTS:
        raise LedgerError(f"`as={as_}` must be one of {', '.join(EXPORTS)}.")
    folder = str(hparams.model_name if model is None else model)
    if as_ != "edit" and not Path(folder).is_dir():
        raise LedgerError(
            f"`as={as_}` is written from the base model's folder, and `{folder}` is none. Give it "
            "with model=FOLDER."
        )
    return folder


def write_export(
    delta: Delta, output: str | Path, as_: str, folder: str, trust_remote_code: bool
) -> Path:
    """Writes a ledger's facts; see `Ledger.export`.

    Args:
        delta: The facts as an edit.
        output: A folder that is new or empty.
        as_: One of `EXPORTS`.
        folder: What `check_export` gave.
        trust_remote_code: Allow the folder's own code.

    Raises:
        LocFTError: `output` cannot be written.
    """
    if as_ == "model":
        delta.apply_to_folder(folder, output, trust_remote_code=trust_remote_code)
    elif as_ == "adapter":
        delta.export_adapter(folder, output, trust_remote_code=trust_remote_code)
    else:
        path = Path(output) / "edit.safetensors"
        with output_errors(output):
            path.parent.mkdir(parents=True, exist_ok=True)
        delta.save(path)
        return path
    return Path(output)
