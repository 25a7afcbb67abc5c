"""What lives between forward and backward, by name, and what becomes of it: keep, fp8, recompute,
offload (docs/memory.md).

store        ActivationStore, MicrobatchStore: implements model.saved's protocol with a policy for
    every name
entries      Entry, Slot, Recipe: one saved storage, and how it comes back
offload      OffloadEngine, Offloaded: copies to the host and back behind events
arena        HostArena, HostMemoryError: host buffers by size class, used again from step to step
geometry     views of storages, packed and rebuilt

Names and policies are declared in `k2train.config.sections.ActivationsConfig`;
`k2train.estimate.activations` predicts bytes.
"""
