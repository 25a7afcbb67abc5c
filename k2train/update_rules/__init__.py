"""Update rules: what an optimizer keeps, needs, costs and does. Each file of `rules/` is one."""
