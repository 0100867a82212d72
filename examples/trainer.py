"""ChunkedOptimizer in transformers' Trainer: one line more. `python examples/trainer.py`."""

import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from chunkft import ChunkedOptimizer


def main(steps: int = 120) -> float:
    """Train a small Llama to count; returns the training loss."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2,
        )
    )  # fmt: skip
    rows = [[(start + i) % 32 for i in range(16)] for start in range(32)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    optimizer = ChunkedOptimizer(
        model, torch.optim.AdamW, lr=1e-2, chunks=4, interval=2, layout="spread", max_grad_norm=1.0
    )
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        max_grad_norm=0.0,  # the optimizer clips: Trainer would not see its gradients
        per_device_train_batch_size=8,
        use_cpu=not torch.accelerator.is_available(),
        report_to=[],
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None))
    loss = trainer.train().training_loss
    optimizer.detach()
    return loss


if __name__ == "__main__":
    main()
