"""What a phase saves between forward and backward, by name, and what becomes of it: keep, fp8, recompute, offload.

The names and policies are declared in `k2train.config.sections.ActivationsConfig`, and `k2train.estimate` costs them. The
mechanism itself is not built yet: `train` refuses every policy but `keep`.
"""
