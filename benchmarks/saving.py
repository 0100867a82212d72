"""What a checkpoint costs in private memory, ours and Trainer's, with weights and state on disk.

    python -m benchmarks.saving [--layers 4] [--width 1024] [--chunks 4] [--json]

A random Llama in bf16 whose weights are views of one memory-mapped file, AdamW's state in
memory-mapped slabs, saved in the middle of a visit. Peaks of the process' anonymous memory
(RssAnon: what cannot be dropped or written back) above where it stood before. Linux only.
"""

import argparse
import ctypes
import gc
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from chunkft import ChunkedOptimizer
from chunkft.train import state_files, weights
from chunkft.train.saving import StreamingTrainer

MIB = 2**20


def anonymous() -> int:
    """Bytes of the process' private memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def peak(work: Callable[[], object]) -> tuple[float, float]:
    """MiB above the start at the highest point of `work`, and its seconds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would be used first, unseen
    before, seen, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    try:
        work()
    finally:
        seconds = time.perf_counter() - begin
        done.set()
        watcher.join()
    return max(seen) / MIB, seconds


def mapped_model(layers: int, width: int, file: Path) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to(dtype=torch.bfloat16)  # pyright: ignore[reportCallIssue]
    size = sum(p.numel() for p in model.parameters())
    flat = torch.from_file(str(file), shared=True, size=size, dtype=torch.bfloat16)
    start = 0
    for name, old in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        view = flat[start : start + old.numel()].view(old.shape)
        view.normal_(std=0.02)
        start += old.numel()
        model.get_submodule(owner).register_parameter(attribute, nn.Parameter(view))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def trained(model: LlamaForCausalLM, chunks: int, store: Path, steps: int) -> ChunkedOptimizer:
    optimizer = ChunkedOptimizer(
        model, torch.optim.AdamW, lr=1e-4, chunks=chunks, interval=2, layout="spread", store=store
    )
    ids = torch.arange(32).view(1, -1)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return optimizer


def measure(layers: int, width: int, chunks: int, folder: Path) -> dict[str, float]:
    model = mapped_model(layers, width, folder / "weights")
    model.config.use_cache = False
    optimizer = trained(model, chunks, folder / "store", 2 * chunks + 1)
    found = {
        "weights MiB": weights.nbytes(model) / MIB,
        "state MiB": state_files.nbytes(optimizer) / MIB,
    }
    for name, kind in (("ours", StreamingTrainer), ("Trainer's", Trainer)):
        args = TrainingArguments(
            str(folder / name), report_to=[], use_cpu=True, save_strategy="no", logging_steps=1
        )
        trainer = kind(model=model, args=args, optimizers=(optimizer, None))  # pyright: ignore[reportArgumentType]
        trainer.create_scheduler(10, optimizer)
        found[f"save, {name}"], found[f"save seconds, {name}"] = peak(
            lambda trainer=trainer: trainer._save_checkpoint(model, None)
        )
    optimizer.detach()
    state = folder / "ours" / "checkpoint-0" / state_files.FOLDER
    for k, name in ((chunks, "same K"), (chunks + 1, "K + 1")):
        again = trained(model, k, folder / "store", 0)
        found[f"load, {name}"], found[f"load seconds, {name}"] = peak(
            lambda again=again: again.load_state_dict(state_files.load(state))
        )
        again.detach()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--folder", default=None, help="where the files go (default: a temporary)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(options.layers, options.width, options.chunks, Path(folder))
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<28}{value:>10.1f}{'' if 'seconds' in name else ' MiB'}")


if __name__ == "__main__":
    main()
