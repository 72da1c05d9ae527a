"""Times one training step of the reference architecture in plain PyTorch under `torch.compile` (benchmark only).

A model of the specification written from scratch for this benchmark, so that a ratio can be measured on any machine:
rotary before QK norm, ReLU squared, soft-capped logits, no biases; AdamW for the embeddings, Muon with the bfloat16
Newton-Schulz iteration for the matrices; the model and the iteration compiled, everything float32 on CPU.

    python benchmarks/torch_reference.py --depth=4 --batch=16 --seq=256 --vocab=4096

prints one JSON line with the seconds of every timed step. PyTorch is an optional extra of the benchmarks
(`pip install torch`); nothing else of this project imports it.
"""

import argparse
import json
import sys
import time

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    sys.exit("torch_reference: PyTorch is not installed in this Python; `pip install torch` or pass --torch-python")

EPS = torch.finfo(torch.float32).eps


def norm(x):
    return F.rms_norm(x, (x.shape[-1],), eps=EPS)


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Layer(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads

        def linear(n_in, n_out):
            return torch.nn.Linear(n_in, n_out, bias=False)

        self.q, self.k, self.v, self.out = (linear(width, width) for _ in range(4))
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        h = norm(x)
        q, k, v = (w(h).view(B, T, self.heads, C // self.heads) for w in (self.q, self.k, self.v))
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.relu(self.up(norm(x))).square())


class Model(torch.nn.Module):
    def __init__(self, depth, vocab, seq):
        super().__init__()
        width = 64 * depth
        heads = max(1, -(-width // 128))
        self.wte = torch.nn.Embedding(vocab, width)
        self.layers = torch.nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.head = torch.nn.Linear(width, vocab, bias=False)
        half = torch.arange(0, width // heads, 2, dtype=torch.float32) / (width // heads)
        angle = torch.arange(seq, dtype=torch.float32)[:, None] / 10000.0**half
        self.register_buffer("cos", angle.cos().bfloat16()[None, :, None])
        self.register_buffer("sin", angle.sin().bfloat16()[None, :, None])

    def forward(self, ids, targets):
        x = norm(self.wte(ids))
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = 15 * torch.tanh(self.head(norm(x)) / 15)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-1)


@torch.compile
def orthogonalise(update, steps: int):
    x = update.bfloat16()
    if update.size(0) > update.size(1):
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + (2.0315 * gram) @ gram) @ x
    return x.T if update.size(0) > update.size(1) else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr, momentum=0.95))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp_(buffer, group["momentum"])
                scale = max(1, p.size(0) / p.size(1)) ** 0.5
                p.add_(orthogonalise(update, 5), alpha=-group["lr"] * scale)


def main():
    parser = argparse.ArgumentParser(description="Training step of the reference architecture in PyTorch")
    for name, default in dict(depth=4, batch=16, seq=256, vocab=4096, steps=10, warmup=3, threads=0).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--grads_only", action="store_true", help="time loss + gradients, no clipping, no optimizer")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = Model(args.depth, args.vocab, args.seq)
    compiled = model if args.eager else torch.compile(model, dynamic=False)
    s = (64 * args.depth / 768) ** -0.5
    adam = torch.optim.AdamW(
        [dict(params=model.head.parameters(), lr=0.004 * s), dict(params=model.wte.parameters(), lr=0.2 * s)],
        betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True,
    )  # fmt: skip
    muon = Muon(model.layers.parameters(), lr=0.02)
    ids = torch.randint(args.vocab, (args.batch, args.seq + 1))
    seconds = []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        compiled(ids[:, :-1], ids[:, 1:]).backward()
        if not args.grads_only:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            muon.step()
        model.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    record = dict(system=f"torch {torch.__version__}", seconds=seconds[args.warmup :], threads=torch.get_num_threads())
    print(json.dumps(record))


if __name__ == "__main__":
    main()
