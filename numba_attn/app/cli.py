"""The command line: `numba-attn demo`, `numba-attn info`, `numba-attn compile`, `numba-attn bench`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from numba_attn.app.terminal import Output, OutputFailed

VARIABLES = ("NUMBA", "OMP_", "KMP_", "TBB_", "MKL_NUM", "OPENBLAS_NUM", "GOMP_")  # what changes speed or threads

DTYPES = ("float32", "float64", "float16", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Bad arguments end with a message and exit status 2, an output that cannot be written with 1."""
    if sys.stdout is None:  # standard output was closed before Python started
        print("numba-attn: standard output is closed", file=sys.stderr)
        return 1
    output = Output(sys.stdout)
    try:
        with contextlib.redirect_stdout(output):
            try:
                args = _parser().parse_args(argv)
                return args.command(args, args.parser)
            finally:
                output.flush()
    except KeyboardInterrupt:
        return 130
    except OutputFailed as why:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())  # for what Python still writes at its end
        print(f"numba-attn: standard output cannot be written to: {why}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="numba-attn", description="Attention for NumPy, compiled by Numba.")
    parser.add_argument("--version", action="version", version=_version("numba-attn"))
    commands = parser.add_subparsers(required=True, metavar="{demo,info,compile,bench}")

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function, parser=sub)
        return sub

    demo = command(
        "demo", _demo, "classify handwritten digits by attention, then run a long sequence beside dense NumPy"
    )
    demo.add_argument("--plot", metavar="FILE.png", help="draw what one digit attends to")
    demo.add_argument("--quick", action="store_true", help="2,048 tokens instead of 16,384")

    command("info", _info, "versions, threads, SIMD width, tiles and cache folder: what a bug report needs")

    ahead = command(
        "compile", _compile, "fill the kernel cache ahead of time, for this CPU or the one that NUMBA_CPU_NAME names"
    )
    ahead.add_argument(
        "passes", nargs="*", type=_one_of("forward", "backward", "jvp"), metavar="PASS",
        help="of forward, backward (with the forward pass of attention_vjp) and jvp (default: all three)",
    )  # fmt: skip
    ahead.add_argument(
        "--dtype", nargs="+", type=_one_of(*DTYPES), metavar="DTYPE", dest="dtypes", default=DTYPES,
        help=f"of {', '.join(DTYPES)} (default: all)",
    )  # fmt: skip

    bench = command("bench", _bench, "time one shape against NumPy and the installed peers, a process each, in turns")
    bench.add_argument("--batch", type=_positive, help="default: 1")
    bench.add_argument("--heads", type=_positive, help="default: 8")
    bench.add_argument("--kv-heads", type=_positive, help="a divisor of --heads (default: --heads)")
    bench.add_argument("--q-len", type=_positive, help="default: 1024, and with --backend cuda a table of shapes")
    bench.add_argument("--kv-len", type=_positive, help="default: --q-len")
    bench.add_argument("--dim", type=_positive, help="head size (default: 64)")
    bench.add_argument("--dtype", choices=DTYPES, help="default: float32")
    bench.add_argument("--causal", action="store_true", default=None, help="aligned bottom right")
    bench.add_argument(
        "--window", type=_positive, metavar="KEYS", help="a query sees its last KEYS keys; implies --causal"
    )
    bench.add_argument("--backward", action="store_true", default=None, help="out and the gradients of q, k and v")
    bench.add_argument(
        "--backend", choices=("cpu", "cuda"), default="cpu", help="cuda: this machine's GPU, beside torch"
    )
    bench.add_argument("--rounds", type=_positive, help="turns of each library; the median counts (default: 5)")
    bench.add_argument("--seconds", type=_seconds, default=0.4, help="length of a turn")
    bench.add_argument("--threads", type=_positive, help="default: numba.get_num_threads()")
    bench.add_argument("--libraries", metavar="A,B", help="default: all that are installed")
    bench.add_argument(
        "--peak", action="store_true", help="instead: the fraction of this machine's FMA peak, in one process"
    )
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number of at least 1, not {text!r}")
    return value


def _one_of(*names: str) -> Callable[[str], str]:
    def checked(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"takes {', '.join(names)}, not {text!r}")
        return text

    return checked


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError(f"takes a number of seconds above 0 and below 3600, not {text!r}")
    return value


def _demo(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from numba_attn.app import demo

    if args.plot and (problem := demo.check_plot(args.plot)):
        parser.error(problem)
    demo.run(args.plot, args.quick)
    return 0


def _info(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    for name, value in info().items():
        print(f"{name:<18} {value}")
    return 0


def info() -> dict[str, str]:
    """What `numba-attn info` prints: a name and a text a line."""
    import numba_attn.cpu

    call = _try_a_call()  # first, so that the thread layer and the kernels are known
    lines = {"numba_attn": numba_attn.__version__, "python": f"{platform.python_version()} {sys.executable}"}
    lines["platform"] = platform.platform()
    for name in ("numpy", "numba", "llvmlite", "tbb", "ml_dtypes"):
        lines[name] = _version(name)
    lines |= {name: _text(value) for name, value in numba_attn.cpu.describe().items()}
    lines["a small call"] = call
    lines["AMX"] = _amx()
    lines["CUDA"] = _cuda()
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    lines["environment"] = (
        " ".join(f"{name}={value}" for name, value in variables.items()) or "none that matters is set"
    )
    return lines


def _try_a_call() -> str:
    """One call large enough for threads. A failure is one line of the report, which goes on."""
    try:
        import numpy as np

        import numba_attn

        q, k, v = np.random.default_rng(0).standard_normal((3, 1, 8, 512, 64), dtype=np.float32)
        start = time.perf_counter()
        out = numba_attn.attention(q, k, v)
        seconds = time.perf_counter() - start
        error = np.abs(out - numba_attn.reference.attention(q, k, v)).max()
        return f"first {seconds:.3f} s, error {error:.1e}"
    except Exception as why:
        return f"failed, {type(why).__name__}: {why}"


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {inner}" for name, inner in value.items()) or "none"
    if isinstance(value, list):
        return ("\n" + " " * 19).join(map(_text, value)) or "none yet in this process"
    return str(value)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    from numba_attn.cuda.host import driver

    versions = f"numba-cuda {_version('numba-cuda')}"
    try:
        device = driver.current()
    except RuntimeError as why:
        return f"{versions}; {why}"
    return f"{versions}; {device.name}, compute capability {device.cc[0]}.{device.cc[1]}"


def _amx() -> str:
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    found = [name for name in ("amx-tile", "amx-bf16", "amx-int8", "amx-fp16") if features.get(name)]
    return f"{', '.join(found)}; not used in this release" if found else "no"


def _compile(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import numba

    if numba.config.DISABLE_JIT:
        parser.error("NUMBA_DISABLE_JIT is set, with which nothing is compiled: unset it")
    from numba_attn.app.terminal import Progress, seconds_text, table
    from numba_attn.cpu.launch import ahead

    kernels = ahead.kernels(args.passes or ("forward", "backward", "jvp"), args.dtypes)
    try:
        with Progress(len(kernels)) as progress:
            folder, compiled = ahead.fill(kernels, progress.step)
    except (RuntimeWarning, OSError) as why:  # without a cache folder there is nothing to fill
        print(f"numba-attn compile: {str(why).removeprefix('numba_attn: ')}", file=sys.stderr)
        return 1
    print(table(["kernel", "time", ""], [[name, seconds_text(seconds), how] for name, seconds, how in compiled]))
    print(f"in {folder}")
    return 0


def _bench_cuda(args: argparse.Namespace, parser: argparse.ArgumentParser, cases: list[Any]) -> int:
    from numba_attn.cuda.host import driver

    if args.peak or args.json or args.libraries or args.threads or args.rounds:
        parser.error("--backend cuda takes no --peak, --json, --libraries, --threads or --rounds")
    try:
        device = driver.current()
    except RuntimeError as why:
        parser.error(f"--backend cuda: {why}")
    from numba_attn.app import bench_cuda as bench

    print(bench.report(device, cases or bench.CASES, args.seconds))
    return 0


def _bench(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import numba

    from numba_attn.app import bench
    from numba_attn.app.terminal import Progress, seconds_text, table

    given = {f.name: x for f in dataclasses.fields(bench.Case) if (x := getattr(args, f.name)) is not None}
    shape: dict[str, Any] = {"heads": 8, "q_len": 1024, "dim": 64} | given
    shape = {"kv_heads": shape["heads"], "kv_len": shape["q_len"]} | shape
    heads, kv_heads = shape["heads"], shape["kv_heads"]
    if heads % kv_heads:
        parser.error(f"--kv-heads must divide --heads: {heads} heads do not share {kv_heads} key heads evenly")
    if args.dtype == "bfloat16" and importlib.util.find_spec("ml_dtypes") is None:
        parser.error(f"--dtype bfloat16 needs ml_dtypes: {sys.executable} -m pip install ml_dtypes")
    if args.threads and args.threads > numba.config.NUMBA_NUM_THREADS:
        parser.error(f"--threads takes at most {numba.config.NUMBA_NUM_THREADS} here (NUMBA_NUM_THREADS)")
    default = [name for name in bench.installed() if args.window or name != "torch-flex"]  # it is for windows
    libraries = args.libraries.split(",") if args.libraries else default
    if unknown := [name for name in libraries if name not in bench.installed()]:
        parser.error(f"--libraries: {unknown[0]!r} is not among those found here: {', '.join(bench.installed())}")
    case = bench.Case(**shape)
    if args.backend == "cuda":
        if given and not args.q_len:
            parser.error("--backend cuda takes a shape together with --q-len; without one it times a table of its own")
        return _bench_cuda(args, parser, [case] if given else [])
    threads = args.threads or numba.get_num_threads()
    rounds = args.rounds or 5
    options = {"rounds": rounds, "seconds": args.seconds, "threads": threads}

    if args.peak:
        if args.libraries:
            parser.error("--peak times this library alone: it takes no --libraries")
        with Progress(2 * rounds) as progress:
            peak = bench.fraction_of_peak(case, **options, on_step=progress.step)
        if args.json:
            print(json.dumps({"case": str(case), "threads": threads, **vars(peak)}))
        else:
            print(f"{case}, {threads} threads, medians of {rounds} rounds in one process")
            print(f"FMA loop {peak.peak / 1e9:8.1f} GFLOP/s\nkernel   {peak.kernel / 1e9:8.1f} GFLOP/s")
            print(f"fraction {100 * peak.fraction:8.1f} %")
        return 0

    with Progress(rounds * len(libraries)) as progress:
        (result,) = bench.compare([case], libraries, **options, on_step=progress.step)
    if args.json:
        print(
            json.dumps({"case": str(case), "threads": threads, **vars(result), "ratio": result.ratio()}, default=vars)
        )
        return 0
    rows = [
        [name, seconds_text(s), f"{case.flops() / s / 1e9:.1f}", f"{result.error[name]:.1e}"]
        for name, s in sorted(result.seconds.items(), key=lambda item: item[1])
    ]
    print(f"{case}, {threads} threads, medians of {rounds} rounds of {args.seconds:g} s\n")
    print(table(["", "time", "GFLOP/s", "max error"], rows))
    for name, why in result.missing.items():
        print(f"{name}: not timed, {why}")
    if (ratio := result.ratio()) is not None:
        print(f"\nnumba_attn is {ratio:.2f} times as fast as the fastest peer")
    return 0
