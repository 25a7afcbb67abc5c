# %% [markdown]
# # k2train as a library
#
# The same functions that the command line calls. Each cell below is one of the words of `k2train`:
# compose a config, plan it, draw its schedule, train it, read its metrics.
#
# Open this file as a notebook (VS Code and Spyder read the cells, `jupytext --to ipynb` converts
# it), or run it: `python examples/notebook.py`. It writes into `runs/notebook` below the working
# directory and takes well under a minute on two cores.

# %%
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # Before torch: the four ranks below share a core.

from pathlib import Path

from k2train.config.compose import load_config
from k2train.config.schema import Config
from k2train.planner.plan import build_plan
from k2train.schedule import render_text, render_timeline
from k2train.telemetry.metrics import read_metrics
from k2train.trainer.loop import train

folder = Path("runs/notebook")

# %% [markdown]
# ## Compose
# The words are those of the command line. What comes back is frozen, checked and typed, and a
# mistake raises `ConfigError`, which names the key, its value, the rule and a remedy.

# %%
words = [
    "experiment=laptop",  # 2 pipeline stages x 2 expert-parallel ranks, K2's schedule
    "train.device=cpu",
    "world=threads",  # all four ranks in this process
    "train.steps=4",
    "train.seq_len=64",
    "train.microbatch_size=2",
    "train.global_batch_tokens=2048",
    "train.final_eval_tokens=0",
    f"run_dir={folder}",
]
config: Config = load_config(words)

# %% [markdown]
# ## Plan
# Nothing runs yet: the same action lists are proved and simulated.

# %%
plan = build_plan(config, record=True)
print(f"planned step: {plan.step_seconds:.3f} s, bubble {plan.bubble_share:.1%}")
print(render_text(plan.simulation))

# %% [markdown]
# ## Draw

# %%
folder.mkdir(parents=True, exist_ok=True)
render_timeline(plan.simulation, folder / "schedule.png")

# %% [markdown]
# ## Train
# Four ranks as threads of this process take four steps of these lists.

# %%
outcome = train(config, words)

# %% [markdown]
# ## Read

# %%
metrics = read_metrics(outcome.run_dir / "metrics.jsonl")
for line in metrics:
    print(line["step"], f"loss {line['loss']:.3f}", f"largest logit {line['max_logit']:.2f}")
