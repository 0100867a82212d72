"""Memory and speed on one CUDA device: chunk, exact, streamed weights, LoRA, dense AdamW.

    python -m benchmarks.gpu [--minutes 9] [--only llama-2-7b] [--output FILE] [--lines FILE]

Llama-2-7B, Llama-3-8B and Llama-3-70B by shape, random weights made on the device: nothing is
downloaded, and torch and transformers are enough. Each case runs in a process of its own, so its
peaks are its own, and running out of memory or time is a row of the table. Cases come by worth;
those that no longer fit into `--minutes` are said to be skipped. Meanwhile other processes work out
what the plan says, on fake tensors, on the CPU. gpu_case.py says what the columns are.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_case import Case, Skipped, peak_flops, predict, run
from benchmarks.methods import provenance

Row = dict[str, Any]
LEAST, MOST = 25.0, 180.0  # seconds: less is no use to a case, and more no case may take
NO_TIME = "no time left"
LEAN: Row = {"chunks": 128, "block": 4 * 2**20, "offload": True}
LARGE: Row = {**LEAN, "chunks": 256, "few": 1, "steps": 1}
FAST: Row = {"chunks": 64, "checkpointing": False}
VISIT: Row = {"interval": 20, "few": 2, "steps": 20}
STREAMED: Row = {**LEAN, "streamed": True}
SHARED: Row = {**LARGE, "few": 2, "steps": 2, "layout": "stream", "ranks": 2, "shard": True}
SHARED_SMALL: Row = {**SHARED, "chunks": 64}
CASES = [
    Case("llama-2-7b", 1, "chunk", **LEAN),
    Case("llama-2-7b", 1, "chunk", **STREAMED),
    Case("llama-2-7b", 1, "chunk", **FAST),
    Case("llama-2-7b", 1, "chunk", **FAST, **VISIT),
    Case("llama-2-7b", 1, "lora", checkpointing=False),
    Case("llama-2-7b", 1, "adamw"),
    Case("llama-2-7b", 8, "chunk"),
    Case("llama-2-7b", 8, "lora"),
    Case("llama-3-70b", 1, "chunk", **LARGE),
    Case("llama-3-70b", 1, "chunk", **SHARED),
    Case("llama-3-8b", 1, "chunk", **SHARED_SMALL),
    Case("llama-3-8b", 1, "chunk", **LEAN),
    Case("llama-3-8b", 1, "chunk", **STREAMED),
    Case("llama-2-7b", 1, "exact", steps=3),
    Case("llama-2-7b", 8, "chunk", **STREAMED),
    Case("llama-3-8b", 8, "chunk"),
    Case("llama-3-8b", 8, "chunk", **STREAMED),
    Case("llama-2-7b", 1, "adamw-8bit"),
    Case("llama-2-7b", 1, "chunk", **FAST, layout="stream"),
    Case("llama-3-8b", 1, "lora", checkpointing=False),
    Case("llama-3-8b", 8, "lora"),
    Case("llama-3-8b", 1, "exact", steps=3),
    Case("llama-2-7b", 8, "exact", steps=3),
    Case("llama-3-8b", 1, "adamw-8bit"),
    Case("llama-2-7b", 8, "adamw-8bit"),
    Case("llama-3-8b", 8, "exact", steps=3),
    Case("llama-3-8b", 8, "adamw-8bit"),
]


def rows(cases: Sequence[Case], minutes: float, device: str = "cuda") -> Iterator[Row]:
    """The row of each case, in turn, once it and its plan are done; all within `minutes`."""
    deadline = time.monotonic() + 60 * minutes

    def left() -> float:
        return deadline - time.monotonic()

    # a plan takes a core for some 20 s; those of the first cases are wanted first
    pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 3))
    try:
        planned = [
            pool.submit(lambda c: child("predict", c, "cpu", left()), case) for case in cases
        ]
        ran: deque[tuple[Case, Row, Future[Row]]] = deque()
        for case, plan in zip(cases, planned, strict=True):
            enough = left() >= min(LEAST, 30 * minutes)
            found: Row = {"skipped": f"{NO_TIME} of {minutes:g} minutes"}
            if enough:
                found = child("run", case, device, min(MOST, left()))
            ran.append((case, found, plan))
            while ran and (ran[0][2].done() or "seconds" not in ran[0][1]):
                yield _with_plan(*ran.popleft(), left())
        for row in ran:
            yield _with_plan(*row, left())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _with_plan(case: Case, found: Row, plan: Future[Row], seconds: float) -> Row:
    if "seconds" not in found:
        return told(case, found, {})
    try:
        return told(case, found, plan.result(max(0.0, seconds)))
    except TimeoutError:
        return told(case, found, {"skipped": NO_TIME})


def told(case: Case, found: Row, plan: Row) -> Row:
    """The JSON line of a case: what was asked, found and planned."""
    row = {**asdict(case), "name": case.name, **found}
    row["planned_gib"] = plan.get("planned_gib")
    row["plan_missing"] = plan.get("skipped", plan.get("failed"))
    row["plan_error"] = row["hfu"] = None
    if row["planned_gib"] and found.get("allocated_gib"):
        row["plan_error"] = row["planned_gib"] / found["allocated_gib"] - 1
    rate = peak_flops(str(found.get("device")))
    if rate and "step_flop" in plan:
        row["hfu"] = plan["step_flop"] / found["seconds"] / rate
    return row


def child(what: str, case: Case, device: str, seconds: float) -> Row:
    """`run` or `predict` in a process of its own, ended after `seconds`; what it says of itself."""
    if seconds <= 0:
        return {"skipped": NO_TIME}
    words = [sys.executable, "-m", "benchmarks.gpu", "--device", device]
    try:
        done = subprocess.run(
            [*words, f"--{what}", json.dumps(asdict(case))],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:.0f} s"}
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode == 0 and last.startswith("{"):
        return json.loads(last)
    why = done.stderr.strip().rpartition("\n")[2] or "it said nothing"
    killed = ", killed, for want of host memory perhaps" if done.returncode == -9 else ""
    return {"failed": f"exit code {done.returncode}{killed}: {why[:200]}"}


def answer(work: Any) -> Row:
    """What a child prints: the result of `work`, or why there is none."""
    try:
        return work()
    except Skipped as reason:
        return {"skipped": str(reason)}
    except torch.OutOfMemoryError as error:
        return {"failed": f"out of memory: {str(error).partition('. ')[0]}"}
    except Exception as error:  # whatever it was, the other cases run
        return {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}


def table(found: Sequence[Row]) -> str:
    """The rows as Markdown; amounts in GiB."""
    lines = [
        "| model | rows x tokens | method | allocated | reserved | process | pinned host | "
        "s a step (worst) | tokens/s | MFU | HFU | planned (error) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def number(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    for row in found:
        start = f"| {row['model']} | {row['batch']} x {row['seq']} | {row['name']} |"
        if "seconds" not in row:
            why = next(f"{key}: {row[key]}" for key in ("skipped", "failed") if key in row)
            lines.append(f"{start} {why.replace('|', '/')} |" + " |" * 8)
            continue
        kinds = ("allocated", "reserved", "process", "pinned")
        cells = [number(row.get(f"{kind}_gib")) for kind in kinds]
        cells += [f"{row['seconds']:.3f} ({row['worst']:.3f})", f"{row['tokens_per_second']:.0f}"]
        cells += [number(row["mfu"], ".1%"), number(row["hfu"], ".1%")]
        plan = number(row["planned_gib"])
        cells.append(plan if row["plan_error"] is None else f"{plan} ({row['plan_error']:+.1%})")
        lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join(lines)


def report(found: Sequence[Row], command: str) -> str:
    """The results file."""
    cards = sorted({row["device"] for row in found if "device" in row}) or ["nothing ran"]
    return (
        f"# Memory and speed on one GPU: {', '.join(cards)}\n\n"
        f"`{command}` {provenance()}.\n"
        "bf16 weights, random; AdamW fused, fp32 masters (adamw: fp32 weights, autocast); T=1, so\n"
        "that state moves in every step, unless another T is named; GiB at their peaks.\n"
        "MFU counts what dense training needs, HFU what was computed "
        f"(benchmarks/gpu_case.py).\n\n{table(found)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all cases [9]")
    parser.add_argument("--only", default="", help="cases whose model and name contain this")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--lines", type=Path, default=Path("runs/gpu.jsonl"), help="JSON lines")
    for name in ("--device", "--run", "--predict"):  # between the parent and its children
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        case = Case(**json.loads(options.run))
        print(json.dumps(answer(partial(run, case, options.device))), flush=True)
    elif options.predict:
        print(json.dumps(answer(partial(predict, Case(**json.loads(options.predict))))), flush=True)
    elif not torch.cuda.is_available():
        sys.exit(
            f"benchmarks.gpu needs a CUDA device, and torch {torch.__version__} finds none; "
            f"`chunkft plan` says what a card would hold"
        )
    else:
        _run_all(options)


def _run_all(options: argparse.Namespace) -> None:
    chosen = [case for case in CASES if options.only in f"{case.model} {case.name}"]
    options.lines.parent.mkdir(parents=True, exist_ok=True)
    found: list[Row] = []
    for row in rows(chosen, options.minutes):
        found.append(row)
        line = json.dumps(row)
        print(line, flush=True)
        with options.lines.open("a") as file:  # a run that is killed keeps its lines
            file.write(line + "\n")
    text = report(found, " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]))
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)


if __name__ == "__main__":
    main()
