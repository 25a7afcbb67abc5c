"""stub"""
import torch
class Offloaded:
    def __init__(self, ts): self.h=[t.clone() for t in ts]; self.r=None
    def reload(self): self.r=tuple(t.clone() for t in self.h)
    def tensors(self): assert self.r is not None, "read before its RELOAD"; return self.r
    def drop(self): pass
class OffloadEngine:
    def __init__(self, device, arena): pass
    def offload(self, ts): return Offloaded(ts)
