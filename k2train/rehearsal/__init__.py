"""One rank of a real config at real size, with no device and no peers: the trainer's own program on
tensors without memory.

What a GPU would find is found here: a tensor on the wrong device, a forgotten buffer, a peak the
plan did not see, a host wait in the wrong place. Nothing is computed, so losses and gradients say
nothing.

`stub` must run before torch is imported; the rest of the room imports torch.
"""
