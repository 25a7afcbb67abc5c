"""k2train: the training system of Kimi K2, planned, simulated and run from one action list."""

__version__ = "0.1.0"
