"""What the authors' port into a training framework may owe its generalization to (table 8).

    python benchmarks/paper/port.py --data zsre.json counterfact.json --output port

The port trains and asks in the model's chat template, averages the loss by token, and its rate
rises and falls; AdamW without weight decay is Adam. Each is tried alone and all together: a file
comes as it is, and with its prompts and rephrase prompts in the chat template, so that it is asked
as it is trained.
"""

from study import Study, by_file, changes, loaded, percent, rewritten, verdict

from locft_easyedit.data.forms import ChatTemplate

IN_CHAT = "_in_chat"
VARIANTS = {
    "edit": "loss_average=edit",
    "token": "loss_average=token",
    "cosine": "lr_schedule=cosine",
    "token_cosine": "loss_average=token,lr_schedule=cosine",
}
POINTS = 3  # of generalization; less is within the spread over seeds


def with_chat(options, folder):
    """Writes each file in chat form, beside the file itself; returns the paths."""
    _, tokenizer = loaded(options)
    template = ChatTemplate(tokenizer)
    first = tokenizer.bos_token if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else ""

    def asked(prompt):
        return template.ask(prompt).removeprefix(first or "")  # the tokenizer puts it there again

    def change_(requests):
        for request in requests:
            for key in ("prompt", "rephrase_prompt"):
                if request.get(key):
                    request[key] = asked(request[key])

    return rewritten(options, folder, IN_CHAT, change_)


def claim(rows):
    files, said = dict(by_file(rows)), []
    for name, plain in files.items():
        in_chat = {row["variant"]: row for row in files.get(f"{name}{IN_CHAT}", [])}
        of = {row["variant"]: row for row in plain}
        if name.endswith(IN_CHAT) or "edit" not in of:
            continue
        others = {key: row for key, row in of.items() if key != "edit"}
        others |= {f"chat, {key}": row for key, row in in_chat.items()}
        for what, row in others.items():
            more = percent(row, "generalization") - percent(of["edit"], "generalization")
            said.append(f"{name}, published to {what}: {changes(of['edit'], row)}. "
                        f"{verdict(more > POINTS)}.")  # fmt: skip
    return said


STUDY = Study(
    doc=__doc__,
    title="what the port does otherwise",
    paper="at equal reliability the port generalizes better: CounterFact 33 to 72 % and 12 to "
    "42 %, WikiBigEdit 74 to 88 % and 53 to 83 % in two models (table 8).",
    variants=VARIANTS,
    axis="",
    x=lambda row: row["variant"],
    claim=claim,
    made=with_chat,
)

if __name__ == "__main__":
    STUDY.main()
