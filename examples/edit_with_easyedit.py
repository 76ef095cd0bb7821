"""LocFT-BF in a script of one's own: one line more than for any other method of EasyEdit."""

import locft_easyedit  # noqa: F401, I001

from easyeditor import BaseEditor, LocFTBFHyperParams

hparams = LocFTBFHyperParams.from_hparams("hparams/LocFT-BF/smollm2-135m.yaml")
editor = BaseEditor.from_hparams(hparams)
metrics, edited_model, original_weights = editor.batch_edit(
    prompts=["The capital city of France is", "The author of Don Quixote is"],
    target_new=["Lyon", "Agatha Christie"],
    ground_truth=["Paris", "Miguel de Cervantes"],
    rephrase_prompts=["France has its capital in", "Don Quixote was written by"],
    sequential_edit=True,
)
for entry in metrics:
    print(
        entry["requested_rewrite"]["prompt"],
        "| rewrite_acc",
        entry["pre"]["rewrite_acc"],
        "->",
        entry["post"]["rewrite_acc"],
    )
