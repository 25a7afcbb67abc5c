"""What a run tells the world: metrics.jsonl, TensorBoard and Weights & Biases, progress on the terminal, pictures.

Imports without torch. Public names: `MetricsFile`, `read_metrics` (metrics), `open_sinks` (sinks), `Progress`
(progress), `draw_loss_curve` (plot).
"""
