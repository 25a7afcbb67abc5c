"""The sections of `benchmarks/gpu.py`, a file each, and what they share.

Each section runs in a process of its own (`child`) and says what it finds through a `Report`.
Everything that touches k2train's operations, models or trainer stands in `adapter`, every
prediction in `predictions`.
"""
