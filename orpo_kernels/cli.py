"""The command line: `orpo-kernels train | report | estimate | profile | selftest | env`.

Importing this, `--help` and `--version` load nothing beyond the package; each command imports what
it needs when it runs.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from orpo_kernels.version import __version__

BAD_INPUT = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments; those of the process if None.

    Returns:
        Exit status: 0, 1 if a self-test failed, 2 for input that cannot be used, 130 if
        interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    quiet()
    names = ", ".join(_COMMANDS)
    parser = argparse.ArgumentParser(
        prog="orpo-kernels",
        description="ORPO fine-tuning without logits.",
        epilog="\n".join(f"  {name:<9} {text}" for name, (_, text) in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"orpo-kernels {__version__}")
    parser.add_argument("command", choices=list(_COMMANDS), metavar="command", help=names)
    try:
        # The command's own words are left alone: `train --help` is not `--help`.
        command = parser.parse_args(words[:1]).command
        run, _ = _COMMANDS[command]
        return run(words[1:])
    except SystemExit as stop:  # argparse has printed already
        return stop.code if isinstance(stop.code, int) else BAD_INPUT


def quiet() -> None:
    """Keep to themselves what libraries say to their developers; before these are imported."""
    # bitsandbytes recommends a package on every start without a GPU; it works without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")


def _train(words: Sequence[str]) -> int:
    try:
        from orpo_kernels.training import launch, options
    except ImportError as error:
        return _refuse(f"training needs more libraries: pip install 'orpo_kernels[hf]' ({error})")
    if any(word in ("-h", "--help") for word in words):
        options.make_parser().print_help()
        return 0
    try:
        launch.run(options.parse_options(words))
    except options.OptionError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        sys.stderr.write(
            "\ninterrupted; the last complete checkpoint in the output folder is kept, the same "
            "command with --resume continues from it\n"
        )
        return INTERRUPTED
    return 0


def _report(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="orpo-kernels report",
        description="Print the table of a finished run and draw its report.png again; of several "
        "runs, draw chosen and rejected log-probs side by side.",
    )
    parser.add_argument("folder", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--output", type=Path, help="PNG to write (FOLDER/report.png; report.png)")
    options = parser.parse_args(words)
    from orpo_kernels.training import report

    folders: list[Path] = options.folder
    output = options.output or (folders[0] if len(folders) == 1 else Path()) / report.PLOT_FILE
    try:
        for folder in folders:
            report.read_history(folder)
            if (folder / report.METRICS_FILE).is_file():
                sys.stdout.write(f"{folder}\n{report.table(report.read_metrics(folder))}\n")
        sys.stdout.write(report.draw(folders, output) + "\n")
    except (OSError, ValueError) as error:
        return _refuse(str(error))
    return 0


def _estimate(words: Sequence[str]) -> int:
    try:
        from orpo_kernels.training import estimate_table

        return estimate_table.main(words)
    except ImportError as error:
        return _refuse(f"{error}; pip install 'orpo_kernels[hf]'")
    except ValueError as error:
        return _refuse(str(error))


def _profile(words: Sequence[str]) -> int:
    try:
        from orpo_kernels.training import profile_table
    except ImportError as error:
        return _refuse(f"{error}; pip install 'orpo_kernels[hf]'")
    try:
        return profile_table.main(words)
    except ValueError as error:
        return _refuse(str(error))


def _selftest(words: Sequence[str]) -> int:
    collects = gc.isenabled()
    gc.disable()  # it takes a fifth of the time, most of it while torch is imported
    try:
        from orpo_kernels import selftest

        gc.freeze()  # what is there is not gone through when the process ends, in half a second
        return selftest.main(list(words))
    finally:
        if collects:
            gc.enable()


def _env(words: Sequence[str]) -> int:
    from orpo_kernels import environment

    return environment.main(list(words))


def _refuse(message: str) -> int:
    sys.stderr.write(f"orpo-kernels: {message}\n")
    return BAD_INPUT


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (_train, "fine-tune a model: CONFIG.yaml [--option value ...]"),
    "report": (_report, "table and picture of finished runs: FOLDER [FOLDER ...]"),
    "estimate": (_estimate, "memory of a run before it is started"),
    "profile": (_profile, "where a step's time and memory go on this machine"),
    "selftest": (_selftest, "check the kernels on this machine"),
    "env": (_env, "versions, device, backends and patches, for a bug report"),
}
