"""What lives between forward and backward, by name, and what becomes of it: keep, fp8, recompute, offload (docs/memory.md).

store        ActivationStore, MicrobatchStore: implements model.saved's protocol with a policy for every name
entries      Entry, Slot, Recipe: one saved storage, and how it comes back
offload      OffloadEngine, Offloaded: copies to the host and back behind events
arena        HostArena: host buffers by size class, used again from step to step
copies       the three queues of a device; testing has a simulated one
geometry     views of storages, packed and rebuilt
host_memory  pageable and locked memory, HostMemoryError

Names and policies are declared in `k2train.config.sections.ActivationsConfig`; `k2train.estimate.activations` predicts bytes.
"""
