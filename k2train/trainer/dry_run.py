"""One microbatch of made-up numbers through every virtual stage of this rank before the first step,
then forgotten.

Kernels are loaded when they are first launched, and to lock host memory takes milliseconds; both
stop a device's streams. In a step they must not happen: a receive that is posted there already
occupies the device, waiting for a neighbour that may be waiting for this rank. So the first launch
of every kernel of forward and backward, and every host buffer, comes here, where no message between
stages is under way.

Letters: B sequences, S tokens of one.

How large the buffers are depends on how many tokens chose this rank's experts. They are reserved
for the numbers of the dry microbatch, each rounded up to its size class; a later microbatch that
exceeds one makes a larger buffer in mid-step.
"""

from __future__ import annotations

from collections import Counter

import torch

from k2train.activations.store import ActivationStore, MicrobatchStore
from k2train.model.context import MicrobatchContext, Statistics
from k2train.model.dispatcher import Results
from k2train.model.loss import CrossEntropy
from k2train.model.phase import Grads, Tensors
from k2train.ops.dtypes import DTYPES
from k2train.runtime.passes import backward_steps, finish, forward_steps
from k2train.trainer.batch import Microbatches
from k2train.trainer.build import Run
from k2train.trainer.step import step_inputs


@torch.no_grad()
def dry_run(run: Run) -> None:
    """Load kernels and reserve host memory. Changes no parameter, no state and no random number of
    the run.

    Every rank must call it, between two steps and with no all-gather of parameters under way: the
    all-to-alls of one forward and one backward on each virtual stage. Raises HostMemoryError where
    the buffers do not fit.
    """
    generator = torch.Generator().manual_seed(run.config.train.seed)
    train = run.config.train
    shape = (train.microbatch_size, train.seq_len + 1)
    batch = run.device.upload(torch.randint(run.config.model.vocab_size, shape, generator=generator))
    tokens = batch[:, :-1]
    made_up = Microbatches([tokens], [CrossEntropy(batch[:, 1:], 1.0 / train.global_batch_tokens)])
    for virtual_stage in run.models:
        inputs = step_inputs(run, made_up, Statistics())
        context = inputs.make_context(virtual_stage, 0)
        outputs, records = _forward(run, virtual_stage, tokens, context, generator)
        _through_host(run.activations, virtual_stage, context)
        _backward(run, virtual_stage, outputs, context, records)
    run.optimizer.gradients.zero()
    if run.activations is not None:
        run.activations.engine.reset_counters()
        run.activations.engine.arena.reset_peak()


def _forward(
    run: Run,
    virtual_stage: int,
    tokens_BS: torch.Tensor,
    context: MicrobatchContext,
    generator: torch.Generator,
) -> tuple[Tensors, list[object]]:
    """Outputs and records of a forward; its input are the tokens, or hidden states of unit
    variance."""
    inputs: Tensors = (tokens_BS,)
    if run.training.routes[virtual_stage].previous is not None:
        shape = (tokens_BS.numel(), run.config.model.hidden_size)
        hidden = torch.randn(shape, generator=generator).to(DTYPES[run.config.train.dtype])
        inputs = (run.device.upload(hidden),)
    records: list[object] = []
    results = finish(forward_steps(run.models[virtual_stage].phases, Results(inputs), context, records))
    context.saved.forward_done()
    return results.on(run.device.current), records


def _through_host(store: ActivationStore | None, virtual_stage: int, context: MicrobatchContext) -> None:
    """Reserve buffers for as many microbatches as the schedule has on the host at once, and use
    them once."""
    microbatches = 0 if store is None else store.peak_offloaded.get(virtual_stage, 0)
    if store is None or not microbatches:
        return
    assert isinstance(context.saved, MicrobatchStore)
    sizes = Counter(context.saved.sizes_to_offload())
    store.engine.arena.reserve({size: count * microbatches for size, count in sizes.items()})
    context.saved.offload()
    context.saved.reload()


def _backward(
    run: Run, virtual_stage: int, outputs: Tensors, context: MicrobatchContext, records: list[object]
) -> None:
    """The backward and the put-off weight gradients, whose sums the caller forgets."""
    last = run.training.routes[virtual_stage].next is None
    gradients: Grads = (None,) if last else tuple(torch.zeros_like(output) for output in outputs)
    results = finish(backward_steps(run.models[virtual_stage].phases, Results(gradients), context, records))
    results.on(run.device.current)
    run.training.queue.drain(context.key, run.optimizer.gradients)
