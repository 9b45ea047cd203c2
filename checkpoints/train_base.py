"""Train the bundled byte-level LLaMA on the standard library's source text, from scratch, on a CPU.

    python checkpoints/train_base.py --steps 2000 --output python/freqrank/bundled/base

Seeded; the schedule is a function of the step alone, so `--steps N` repeats a run on the same machine and Python.
The log, one JSON object a line, goes to --log. The weights with the lowest validation loss are those of the last step:
the learning rate falls linearly to zero.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from freqrank.data import stdlib_bytes, windows
from transformers import LlamaConfig, LlamaForCausalLM


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=160,
        intermediate_size=416,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al., 2024), in fp32 and batched by shape.

    torch.optim.Muon iterates in bf16, which on a CPU without bf16 arithmetic takes longer than the model's own step.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                x = torch.stack(updates)
                if shape[0] > shape[1]:
                    x = x.mT
                x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
                for _ in range(5):
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                if shape[0] > shape[1]:
                    x = x.mT
                for p, update in zip(params, x, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    was_training = model.training
    model.eval()
    losses = [model(chunk, labels=chunk).loss.item() for chunk in ids.split(8)]
    model.train(was_training)
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--decay", type=float, default=0.5, help="fraction of the steps over which the rate falls to 0")
    parser.add_argument("--minutes", type=float, default=None, help="choose --steps so that training takes this long")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--muon-lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("python/freqrank/bundled/base"))
    parser.add_argument("--log", type=Path, default=Path("checkpoints/train_base.jsonl"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config())
    text = stdlib_bytes("train")
    validation = windows(stdlib_bytes("validation"), args.context, 64, seed=1)

    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(matrices, lr=args.muon_lr),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [args.muon_lr, args.lr]
    generator = torch.Generator().manual_seed(args.seed)
    offsets = torch.arange(args.context)

    def run(step: int, steps: int) -> float:
        factor = min(1.0, (step + 1) / 100) * min(1.0, (1 - step / steps) / args.decay)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        batch = text[torch.randint(0, text.numel() - args.context, (args.batch, 1), generator=generator) + offsets]
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    args.log.parent.mkdir(parents=True, exist_ok=True)
    with args.log.open("w") as log:

        def write(**row: object) -> None:
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)

        write(
            seed=args.seed,
            context=args.context,
            batch=args.batch,
            lr=args.lr,
            muon_lr=args.muon_lr,
            steps=None if args.minutes else args.steps,
            decay=args.decay,
            parameters=sum(p.numel() for p in model.parameters()),
            train_bytes=text.numel(),
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            threads=torch.get_num_threads(),
        )
        steps, start, step, smooth = args.steps, time.perf_counter(), 0, None
        while step < steps:
            loss = run(step, steps)
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            step += 1
            if args.minutes and step == 20:
                steps = max(100, int(args.minutes * 60 / ((time.perf_counter() - start) / step)))
                write(steps=steps)
            if step % 50 == 0 or step == steps:
                seconds = round(time.perf_counter() - start, 1)
                row = {"step": step, "seconds": seconds, "train": round(smooth, 4)}
                if step % 500 == 0 or step == steps:
                    row["validation"] = round(held_out_loss(model, validation), 4)
                write(**row)

        model = model.to(torch.bfloat16)
        model.save_pretrained(args.output)
        rounded = held_out_loss(model.float(), validation)
        write(saved=str(args.output), validation_after_bf16=round(rounded, 4))


if __name__ == "__main__":
    main()
