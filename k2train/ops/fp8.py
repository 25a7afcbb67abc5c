"""stub"""
from __future__ import annotations
import dataclasses, torch
@dataclasses.dataclass(frozen=True)
class Fp8Tensor:
    codes: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    @property
    def tensors(self): return self.codes, self.scales
    def with_tensors(self, t): return Fp8Tensor(t[0], t[1], self.shape, self.dtype)
def quantise(x, non_finite_tiles=None):
    w = x.shape[-1]; r = x.reshape(-1, w).float(); p = -w % 128
    t = torch.nn.functional.pad(r, (0, p)).view(r.shape[0], -1, 128)
    s = (t.abs().amax(-1) / 448).clamp_min(1.2e-38)
    c = (t / s[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).view(r.shape[0], -1)[:, :w].contiguous()
    return Fp8Tensor(c, s, tuple(x.shape), x.dtype)
def dequantise(q):
    w = q.shape[-1]
    return (q.codes.view(torch.float8_e4m3fn).float() * q.scales.repeat_interleave(128, 1)[:, :w]).to(q.dtype).view(q.shape)
