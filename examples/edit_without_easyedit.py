"""Edit any causal language model of transformers in place, undo it, and keep it as a file."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from locft_easyedit import Delta, LocFTBFHyperParams, edit_model, make_requests

FOLDER = "models/SmolLM2-135M-Instruct"  # `make demo` puts it there

model = AutoModelForCausalLM.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
hparams = LocFTBFHyperParams(
    layers=[27], rewrite_module_tmp="model.layers.{}.mlp.down_proj.weight", lr=4e-3
)
prompts = ["The capital city of France is", "The author of Don Quixote is"]
result = edit_model(model, tokenizer, make_requests(prompts, ["Lyon", "Agatha Christie"]), hparams)


def answer(prompt):
    ids = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=6, do_sample=False)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


print("loss by epoch:", [round(loss, 3) for loss in result.losses])
for prompt in prompts:
    print("edited:  ", prompt, answer(prompt))
with result.switched_off(model):  # the original, in the same model
    for prompt in prompts:
        print("original:", prompt, answer(prompt))

Delta.from_result(result, model, hparams).save("edit.safetensors")
Delta.load("edit.safetensors").revert_(model)  # in any later program as well; bit for bit
for prompt in prompts:
    print("reverted:", prompt, answer(prompt))
