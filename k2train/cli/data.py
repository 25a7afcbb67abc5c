"""`k2train data build` makes an indexed dataset from text files; `k2train data show` says what
one holds."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from k2train.config.compose import load_config
from k2train.config.data import DataBuildConfig
from k2train.config.errors import ConfigError, nearest
from k2train.config.help import render_help
from k2train.data.build import SHOWN_BAD_LINES, BuildReport, Progress, build_dataset, describe
from k2train.data.show import ShowConfig, describe_dataset
from k2train.telemetry.progress import ProgressDisplay, open_progress

USAGE = """usage: k2train data build 'input=[FILE,DIR,...]' output=PREFIX [key=value ...]
       k2train data show PREFIX [key=value ...]

  build  make an indexed dataset from .txt, .jsonl, .parquet and .gz files
  show   print what a dataset holds

`k2train data build --help` and `k2train data show --help` explain every key."""

BUILD_USAGE = "k2train data build 'input=[FILE,DIR,...]' output=PREFIX [key=value ...]"
SHOW_USAGE = "k2train data show PREFIX [key=value ...]"


def run(args: list[str]) -> int:
    """`build` or `show`, then their arguments."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    commands = {"build": _build, "show": _show}
    if args[0] not in commands:
        raise ConfigError("data", args[0], "is no command of `k2train data`", nearest(args[0], commands))
    return commands[args[0]](args[1:])


def _build(args: list[str]) -> int:
    if any(word in ("-h", "--help") for word in args):
        print(render_help(DataBuildConfig, "Make an indexed dataset from text files.", BUILD_USAGE))
        return 0
    config = load_config(args, root=DataBuildConfig, config_name="data_build")
    with _terminate_as_interrupt(), ExitStack() as stack:
        report = build_dataset(config, _Display(stack))
    for line in report_lines(report):
        print(line)
    return 0


def report_lines(report: BuildReport) -> Iterator[str]:
    """The end of a build: what was written, and every bad line's count with the first of them
    named."""
    facts = report.sidecar
    if report.bad_file is not None:
        yield f"{facts.num_bad_lines} malformed lines left out, all listed in {report.bad_file}"
        yield from (f"  {describe(bad)}" for bad in report.bad_lines)
        if facts.num_bad_lines > SHOWN_BAD_LINES:
            yield f"  and {facts.num_bad_lines - SHOWN_BAD_LINES} more"
    yield (
        f"{report.prefix}: {facts.num_documents} documents, {facts.num_tokens} tokens, {facts.num_bytes} bytes of text "
        f"({facts.num_bytes / facts.num_tokens:.2f} a token) from {report.num_files} files; "
        f"tokenizer {facts.tokenizer}, vocabulary {facts.vocab_size}"
    )
    yield f"train on it with 'data.blend=[{{prefix: {report.prefix}}}]' and the same data.tokenizer"


def _show(args: list[str]) -> int:
    if any(word in ("-h", "--help") for word in args):
        print(render_help(ShowConfig, "Print what a dataset holds.", SHOW_USAGE))
        return 0
    words = [word if "=" in word else f"prefix={word}" for word in args]
    for line in describe_dataset(load_config(words, root=ShowConfig, config_name="data_show")):
        print(line)
    return 0


class _Display(Progress):
    """A bar or plain lines, in MiB of input."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._display: ProgressDisplay | None = None
        self._bytes = 0

    def begin(self, num_files: int, input_bytes: int) -> None:
        title = f"{num_files} files, MiB"
        self._display = self._stack.enter_context(open_progress("auto", title, max(1, input_bytes >> 20)))

    def advance(self, input_bytes: int, num_documents: int, num_tokens: int) -> None:
        assert self._display is not None  # begin comes first
        before, self._bytes = self._bytes, self._bytes + input_bytes
        self._display.advance(
            (self._bytes >> 20) - (before >> 20), f"{num_documents} documents, {num_tokens} tokens"
        )


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a build as Ctrl-C does, so that what it has staged is removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
