"""What the program knows of a device: streams, events, copies, pinned memory, and reads by the
host.

Everything that runs beside the computation (offload, host-resident states, exchanges of tokens) is
written against `protocol.Device` and so runs, unchanged, on CUDA, on a CPU, in a simulation that
reorders whatever may be reordered, and in a rehearsal where tensors have no memory.
"""
