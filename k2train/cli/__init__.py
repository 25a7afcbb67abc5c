"""The program: one module a command, each with `run(args) -> int`; `main` dispatches and turns
errors into exit statuses.
"""
