"""EasyEdit's own YAMLs as the base for methods that `published` has no table of.

They lie in a clone of EasyEdit alone, made for models of 7B parameters; what depends on the model
is set anew (see `peer_hparams`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ...errors import LocFTError
from ...modeling.places import LayerList
from ...utils.parsing import did_you_mean
from .published import ALIASES, PEERS, scaled_layers

# The YAMLs that are looked for, and the layers of the models that they are made for.
_FILES = {
    "llama3-8b.yaml": 32,
    "llama3-8b-instruct.yaml": 32,
    "llama-7b.yaml": 32,
    "qwen2.5-7b.yaml": 28,
    "llama3.2-3b.yaml": 28,
}
# What can be told before anything is run.
_NOT_HERE = {
    "IKE": "puts demonstrations before each prompt and edits no model, so that nothing can be "
    "measured here.",
    "AdaLoRA": "needs `total_step` in peft, which EasyEdit does not give. Compare LoRA.",
    **dict.fromkeys(
        ("MEND", "SERAC", "MALMEN", "KE"),
        "needs a network that was trained for this model before.",
    ),
    "UnKE": "is run by a script of EasyEdit's own, on its own data: it is no method of the editor.",
    **dict.fromkeys(("RECT", "RLEdit"), "is not in EasyEdit."),
}
_PARAMETER = re.compile(r".*\.layers(?:\[(?P<bracketed>\d+)\]|\.(?P<dotted>\d+))\.(?P<rest>.+)")


class MethodUnavailableError(LocFTError):
    """The installed EasyEdit does not have a method, or nothing to run it with here."""


def easyedit_folder() -> Path | None:
    """Returns the clone of EasyEdit that is named in the environment, if one is."""
    home = os.environ.get("EASYEDIT_HOME")
    return Path(home).expanduser().resolve() if home else None


def known_method(name: str) -> str:
    """Returns EasyEdit's spelling of a method's name, whatever its case; the name itself if none.

    `FT-M` is what EasyEdit's FT does with the objective that it has here.
    """
    found = {known.casefold(): known for known in (*_in_the_clone(), *_NOT_HERE, *PEERS)}
    found |= {alias.casefold(): name for alias, name in ALIASES.items()}
    return found.get(str(name).casefold(), str(name))


def check_method(name: str) -> None:
    """Checks that a name may be that of a method.

    Raises:
        LocFTError: It is none, and much like one.
    """
    known = [*_in_the_clone(), *_NOT_HERE, *PEERS]
    hint = did_you_mean(name, known, "")
    if name not in known and hint:
        raise LocFTError(f"There is no method `{name}`. {hint}")


def check_runs(method: str) -> None:
    """Checks that a method is none of those of which it is known that they cannot be run here.

    Raises:
        MethodUnavailableError: It is; says why.
    """
    if method in _NOT_HERE:
        raise MethodUnavailableError(f"{method} {_NOT_HERE[method]}")


def published_yaml(method: str) -> tuple[Path, int]:
    """Returns EasyEdit's YAML for a method, and the number of layers of the model it is made for.

    Raises:
        MethodUnavailableError: There is none; says why.
    """
    check_runs(method)
    home = easyedit_folder()
    if home is None:
        raise MethodUnavailableError(
            f"{method}: EasyEdit's values for it are in a clone of its current source. Clone it "
            f"and set EASYEDIT_HOME to the clone, or give a YAML: peers.{method}.hparams=FILE."
        )
    for name, n_layers in _FILES.items():
        path = home / "hparams" / method / name
        if path.is_file():
            return path, n_layers
    raise MethodUnavailableError(
        f"{method}: EasyEdit has no values for it in {home / 'hparams' / method} (looked for "
        f"{', '.join(_FILES)}). Give a YAML: peers.{method}.hparams=FILE."
    )


def scaled_parameters(
    names: list[str], stack: LayerList, n_layers: int, outputs: Mapping[str, str]
) -> list[str]:
    """Returns parameters of a published YAML at the same depth of another model.

    Args:
        names: For example `model.layers[27].mlp.down_proj.weight`, or with `.27.`.
        stack: The model's layers.
        n_layers: Layers of the model that the YAML is made for.
        outputs: Names of modules in a published layer that are others in this model's.
    """
    found = [_PARAMETER.fullmatch(name) for name in names]
    groups: dict[str, list[int]] = {}
    for match in found:
        if match is not None:
            i = int(match["bracketed"] or match["dotted"])
            groups.setdefault(match["rest"], []).append(i)
    bracketed = any(match is not None and match["bracketed"] for match in found)
    result = [name for name, match in zip(names, found, strict=True) if match is None]
    for rest, layers in groups.items():
        own = rest
        for theirs, ours in outputs.items():
            own = own.replace(theirs, ours)
        for i in scaled_layers(layers, len(stack.layers), n_layers):
            where = f"[{i}]" if bracketed else f".{i}"
            result.append(f"{stack.path}{where}.{own}")
    return result


def _in_the_clone() -> list[str]:
    home = easyedit_folder()
    folder = None if home is None else home / "hparams"
    if folder is None or not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir())
