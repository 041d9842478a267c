"""The stages of a run, a file each: the folder NAME that a run has is made by NAME.py.

A file says its stage's name and cost (`ldalign.run.stage`) and holds the function that makes it;
`ldalign.run.plan` says the stage's place. A stage reads the folders of the stages before it and
writes its own; `manifest.run_stage` skips what is done and refuses what was made from something
else. A stage's parents are what its output depends on: contents (hashes of rows, model folders,
files of earlier stages) and config keys by their own names, so that a refusal names the key. Not
among them is what only moves work about and changes the last bits at most: micro_tokens,
batch_rows, checkpointing, shard_ranks, whole, checkpoint.*, the number of ranks. All ranks call the
functions NAME_stage.
"""
