"""What a run tells the world: metrics.jsonl, TensorBoard and Weights & Biases, progress, tables,
pictures.

Imports without torch. Public names: `MetricsFile`, `read_metrics` (metrics), `open_sinks` (sinks),
`open_progress`, `Rhythm` (progress), `new_table`, `fact_table`, `show` (tables), `draw_loss_curve`
(plot).
"""
