"""What the names in brackets mean of errors that are no rules: a problem's `rule` is a row of the table, or of this.

A test holds it to the source: every name that a Problem has is here or there.
"""

from __future__ import annotations

MESSAGES = {
    # exit code 2
    "bad-path": "A name cannot be a path on this system: it is too long, or `~somebody` names no user here.",
    "bad-value": "A key has a value of another kind or size than it takes; `ftune explain KEY` says which.",
    "duplicate-key": "A key stands twice in one section. YAML readers would take one of the two in silence.",
    "missing-key": "A key without a default is not there.",
    "override": "An argument of `--set` is not section.key=value, or its value cannot be read as YAML.",
    "recipe-file": "The recipe's file is not there, is a directory, or is not UTF-8 text.",
    "recipe-mapping": "A recipe given from Python holds something that YAML cannot write.",
    "unknown-key": "No section, or not this one, has a key of that name.",
    "no-shards": "`--max-shard-size` was given for a format that writes all weights into one file.",
    "unknown-method": "There is no optimizer, tuning, objective or format of that name.",
    "allow-name": "`ftune plan --fit --allow` names nothing that could be given up.",
    "recipe-edit": "A value cannot be changed in the recipe's text without rewriting more of it (aliases, tags).",
    "gpu-name": "`--gpu` names no GPU that ftune knows, or several with different memory.",
    "unknown-configuration": "A model is planned for whose config.json is neither in a directory nor in the catalogue.",
    "unknown-finding": "`data.audit_ignore` names something that the audit of the rows never finds.",
    "not-packed": "`ftune preview --packing` was asked for rows that are never packed, such as preferences.",
    "no-eval": "`ftune preview --part eval` was asked for, and `data.eval` names nothing.",
    "preview-write": "The page of `ftune preview --html` cannot be written there.",
    "template-changed": "The chat template or tokenizer of a finished model is no longer the one it was trained with.",
    "format-not-learned": "The rows are in a format that this objective does not learn from.",
    "unknown-name": "`ftune explain` was asked for a name that nothing has.",
    "unknown-recipe": "No recipe of that name comes with ftune; `ftune init --list` shows those that do.",
    "yaml": "The recipe is not YAML, or holds what has no meaning in a recipe (tags, several documents).",
    "adapter-rounding": "An adapter that makes up for what rounding took was put on a base that is not rounded so.",
    "adapter-differs": "The recipe gives an adapter that is trained on another shape or scale than it was made with.",
    "adapter-folder": "`tuning.adapter` names a folder without an adapter, or one that fits only a base that was "
    "changed for it.",
    "attention-unsupported": "The model has no code for the `model.attn_implementation` that is set.",
    "base-quantised": "The model's weights are stored in few bits: they can carry an adapter, but be neither trained "
    "themselves nor merged with.",
    "adapter-groups": "The adapter is none over the groups of this quantised base.",
    "codes-damaged": "The file with the quantised weights of a run cannot be read, or is not what was written.",
    "codes-differ": "The recipe asks for other bits or groups than an already quantised model has.",
    "codes-do-not-fit": "Quantised weights belong to another model than the one that was loaded.",
    "gptq-format": "A GPTQ model is stored in a way that ftune does not read.",
    "hqq-format": "An HQQ model is stored in a way that ftune does not read, or groups its weights so that no adapter "
    "merges into it.",
    "gptq-inputs": "GPTQ weighs errors by what a layer reads, and that is not fit for it.",
    "group-size": "Inputs of a layer are quantised in groups of equal size, so that it has to divide them.",
    "resume-base": "A checkpoint's adapter was trained upon other quantised weights than the run directory holds.",
    "torchao-groups": "Groups of inputs that are not neighbours cannot be written for torchao.",
    "rebuild-device": "Random numbers differ between kinds of device: a run is rebuilt on the kind it was made on.",
    "zeroth-order-calibration": "No weight could be chosen: the calibration batches gave no gradients.",
    "zeroth-order-log": "The log of steps of a zeroth-order run is damaged, or does not go with the weights.",
    "zeroth-order-mask": "The run that `mask` names did not choose among these weights.",
    "zeroth-order-reads": "A trained weight is read elsewhere than in its own layer, so that it cannot be perturbed.",
    "zeroth-order-rest": "The weights that do not move cannot be held in few bits as `rest_bits` asks.",
    "layers-not-found": "The model has no list of layers, which a method that trains layer by layer needs.",
    "lisa-layers": "`tuning.activated_layers` is more than the model has.",
    "sweep-unfinished": "The run is shorter than one sweep of a method that moves weights in turn: some never move.",
    "lora-options": "PEFT refuses these options of lora together.",
    "shared-weight": "`tuning.target_modules` names a layer whose weight is another's too: an adapter folded into one "
    "would be in both.",
    "lora-targets": "The model has no layers of the names in `tuning.target_modules` or its neighbours.",
    "max-length": "Rows are longer than the positions the model knows.",
    "model-directory": "`model.model_name_or_path` names a folder that is not there, or a file.",
    "no-input": "`ftune chat` has no standard input to read questions from.",
    "eva-batches": "The batches are not of single texts, or hold too few learned tokens for EVA's directions.",
    "loftq-weights": "LoftQ finds no unquantised weights of that name in the model's files.",
    "no-tokenizer": "The model's folder holds no tokenizer that can be read.",
    "not-a-causal-lm": "The model does not continue text: it is an encoder, translates, or classifies.",
    "gguf-architecture": "llama.cpp would compute something else with this model, or ftune does not write it as GGUF.",
    "gguf-tokenizer": "llama.cpp has no name for the way that this tokenizer splits text.",
    "not-mergeable": "The adapter adds to the model's input and not to its weights: there is nothing to fold it into.",
    "no-codes": "Only a run that trained upon codes (qalora) can be written in the same codes.",
    "not-an-adapter": "`ftune merge` was given a run that trained whole weights: there is nothing to fold in.",
    "output-exists": "What would be written exists already; ftune overwrites nothing.",
    "output-unwritable": "The place to write to is closed to this user, or its disk is full.",
    "packing-mixes-rows": "Rows packed into one sequence would see each other in this model, so it cannot be trained "
    "with `data.packing: true`.",
    "remote-code": "The model comes with Python code that would be run; `model.trust_remote_code: true` allows it.",
    "template-refuses": "The chat template raised an error on these turns.",
    "unknown-architecture": "The installed transformers has no code for this kind of model.",
    "unknown-model": "There is no model of that name on this disk or on the hub, or what is there is no model.",
    "vocabulary": "The tokenizer writes tokens for which the model has no embedding.",
    "weights-do-not-fit": "The weight files have other names or sizes than the model's config.json says.",
    # exit code 3
    "cache": "Converted models cannot be written to ftune's cache folder; `ftune doctor` shows where it is.",
    "disk-room": "The disk cannot hold the checkpoints and the result of the run.",
    "out-of-memory": "There is no room for the model, or for a step of it, on the GPU or in this machine.",
    "plan-too-large": "The plan of a run says that its largest batch cannot fit; `--force` trains all the same.",
    # exit code 4
    "ambiguous-format": "The first row fits several formats: `data.format` has to say which.",
    "data-empty": "A data file has no bytes, or a directory of data no files.",
    "data-file": "A data file, or the chat template's, is not there or may not be read.",
    "data-overlap": "A file is both trained and evaluated on: a low evaluation loss would only say that it was learned "
    "by heart.",
    "no-chat-template": "Rows are conversations, and neither the model nor the recipe says how to write one.",
    "no-rows": "The training data hold no rows.",
    "not-plain-text": "The objective learns plain text, and the rows are something else.",
    "nothing-to-learn": "No row has a token that counts in the loss.",
    "slow-tokenizer": "The tokenizer does not say which letters a token stands for, so answers cannot be told from the "
    "rest.",
    "too-few-rows": "There are fewer rows than are to be held out for evaluation.",
    "unknown-format": "No format fits the first row, or none has the name in `data.format`.",
    "unreadable-data": "A data file cannot be read as what its ending says.",
    "unreadable-row": "A row is not what its format says; the message names the file and the row.",
    "unreadable-template": "The file of the chat template cannot be read as text.",
    # exit code 5
    "disk-full": "The disk filled up while something was written; nothing half-written was left.",
    "interrupted": "The run was stopped by the user; `ftune resume` goes on with it.",
    "loss-not-finite": "The loss is infinite or not a number: weights or activations overflowed.",
    "trace-failed": "A training step of this model cannot be followed without its weights, so its memory is not known.",
    "merge-broken": "PEFT cannot fold this adapter into its base.",
    "export-differs": "The merged or exported model says something else than the run's; it was not kept.",
    "base-differs": "The base of an adapter has other weights than those the adapter was trained on.",
    "dtype-range": "A weight is larger than the type that was asked for can hold.",
    "pickle-weights": "Weights are stored as Python pickles, which may run code; ftune exports safetensors alone.",
    "no-finished-model": "The run directory holds no model yet: the run is not over.",
    "no-run": "The folder is not a run directory.",
    "output-dir": "`training.output_dir` holds other files or another run, is in use, or cannot be written.",
    "report-directory": "The folder is not a run directory.",
    "report-write": "The report cannot be written into the run directory.",
    "resume-changed": "A resumed run was told other settings for what it has already learned.",
    "resume-data": "The data of a run have changed since it began: rows would not come in the same order.",
    "resume-directory": "The folder is not a run directory.",
    "resume-finished": "The run is finished, and was not told to train longer.",
    "resume-ranks": "The run was saved by another number of processes: batches would be drawn in another order.",
    "run-damaged": "A run's run.json cannot be read.",
    "weights-damaged": "A weight file is cut short, or not what its name says.",
    "worker": "A process that prepares batches failed; the text is its own.",
}
"""One or two sentences on each name, by the exit code it mostly comes with."""


def message_list() -> str:
    """Return every name as Markdown, for the documentation."""
    rows = [f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in sorted(MESSAGES.items())]
    return "\n".join(["| name | meaning |", "|---|---|", *rows])
