"""Hydra configs to frozen dataclasses, in one place, with errors a user can act on.

Public names: `load_config`, `expand_sweep`, `compose_dict` (compose); `Config` and its sections
(schema, model, sections, optim, data); `ConfigError` (errors); `from_dict`, `to_dict` (convert);
`render_help` (help). Imports without torch.
"""
