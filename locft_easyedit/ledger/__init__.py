"""A ledger: facts that are added to a model, replaced and taken out again, one commit at a time.

The design in short. A ledger is a folder:

- `log.jsonl`: one JSON line an event (`init`, `add`, `retract`), each with the hash of the line
  before it. It is the one truth: which facts are in, since when, from where, and the hash of the
  trained matrices after each event. `log.copy.jsonl` is the same again, to mend it with.
- `state-N.safetensors`: the matrices after event N, as an edit (see `delta`) of the base model. A
  few are kept; others are made anew from the one before them.
- `prefix-*.safetensors`: hidden states of the facts of a commit, where the trained part begins.
  They are constants, so that old facts can be replayed and checked without the frozen layers.
- `filters-*.safetensors`: with `preserve`, what was measured of the base model.

An event is a function of the log before it: the matrices after it follow from those before it, the
active facts in their order, and the settings; nothing else is drawn on. So a command that was
killed is begun again and ends in the same bits, a state that was dropped is made anew, and `exact`
takes a fact out as if it had never been in. The line in the log is the commit: it is written last,
after the state's file is on the disk.

Several processes do all of this together: each runs the texts that are its own, and rank 0 alone
reads and writes the folder. An event is then a function of their number as well.

Reading order: `log` (the chain) -> `facts` (what the log says) -> `binding` (to which model) ->
`states` (matrices on disk) -> `texts` (facts as tokens, with replay) -> `recording` (their states)
-> `trainer` (train, check, repair) -> `retraction` (back to the base's own answer) -> `changes`
(what an event does) -> `bound_model` (the matrices of any event) -> `ledger` (the commands).
"""
