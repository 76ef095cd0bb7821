"""Against the editors that the paper compares with, through EasyEdit's own code (table 3).

    EASYEDIT_HOME=... python benchmarks/paper/methods.py --config-name smollm2-135m data=FILE.json \
        n=20 output=methods

It is `locft compare` with the paper's methods and a capability, and takes all of its arguments.
Table, JSON and picture are that command's. Methods that EasyEdit lacks are rows that say so.
"""

import argparse
import sys

from locft_easyedit.__main__ import main
from locft_easyedit.evaluation.capability.metrics import OWN_TASKS

OWN = {
    "methods": "[LocFT-BF,LocFT-BF+,FT,MEMIT,RECT,WISE,AlphaEdit,RLEdit,UltraEdit]",
    "capability": f"[{','.join(OWN_TASKS)}]",
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    _, given = parser.parse_known_args()
    if not given:
        parser.error("give what `locft compare` needs; see `locft compare --help`.")
    named = {argument.partition("=")[0] for argument in given}
    own = [f"{key}={value}" for key, value in OWN.items() if key not in named]
    sys.exit(main(["compare", *own, *given]))
