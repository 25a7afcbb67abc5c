"""Where everything meets: build a run, take a step, loop over steps, evaluate, save and resume.

Public names: `train(config, words)` (loop), `build_run` (build), `Batch`, `read_batch` (batch),
`train_step` (step).
"""
