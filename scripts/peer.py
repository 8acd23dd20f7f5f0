"""Times operators of flash-linear-attention and PyTorch's flash attention: peer.py OPERATOR,... BxTxHxKxV,...

OPERATOR is retention, simple_gla, gla, gsa (64 slots), rwkv6, ssd (Mamba2), delta_rule, gated_delta_rule, kda, rwkv7 or attention. The problems are those of
bench-hopper: bf16, log decays log sigmoid(x) of normal numbers. Medians of groups of calls with one wait each, as bench-hopper takes them; what is added into a tensor's
gradient is not timed. Needs a GPU, PyTorch and flash-linear-attention.
"""
import statistics
import sys
import time

import torch
import torch.nn.functional as F


def seconds(call):
    def group(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    # The first calls compile and tune.
    group(2)
    count = max(1, min(200, int(0.03 / group(2))))
    return statistics.median(group(count) for _ in range(7))


def leaf(x):
    return x.detach().requires_grad_()


def problem(name, b, t, h, dk, dv):
    q, k, v = (leaf(torch.randn(b, t, h, d, device="cuda").bfloat16()) for d in (dk, dk, dv))
    if name == "attention":
        return lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True), (q, k, v)
    if name == "retention":
        from fla.ops.retention import chunk_retention

        return lambda: chunk_retention(q, k, v)[0], (q, k, v)
    if name == "simple_gla":
        from fla.ops.simple_gla import chunk_simple_gla

        g = leaf(F.logsigmoid(torch.randn(b, t, h, device="cuda")))
        return lambda: chunk_simple_gla(q, k, v, g)[0], (q, k, v, g)
    if name == "gla":
        from fla.ops.gla import chunk_gla

        g = leaf(F.logsigmoid(torch.randn(b, t, h, dk, device="cuda")).bfloat16())
        return lambda: chunk_gla(q, k, v, g)[0], (q, k, v, g)
    if name == "gsa":
        from fla.ops.gsa import chunk_gsa

        s = leaf(torch.randn(b, t, h, 64, device="cuda").softmax(-1).bfloat16())
        g = leaf(F.logsigmoid(torch.randn(b, t, h, 64, device="cuda")))
        return lambda: chunk_gsa(q, k, v, s, g)[0], (q, k, v, s, g)
    if name == "rwkv6":
        from fla.ops.rwkv6 import chunk_rwkv6

        w = leaf(F.logsigmoid(torch.randn(b, t, h, dk, device="cuda")).bfloat16())
        u = leaf(torch.randn(h, dk, device="cuda"))
        return lambda: chunk_rwkv6(q, k, v, w, u, scale=1.0)[0], (q, k, v, w, u)
    if name == "ssd":
        from fla.ops.simple_gla import chunk_simple_gla

        # One group of B and C, which the peer's operator takes repeated for every head, and the D term.
        q, k = (leaf(torch.randn(b, t, 1, dk, device="cuda").bfloat16()) for _ in range(2))
        delta = leaf(F.softplus(torch.randn(b, t, h, device="cuda")))
        a, d = leaf(-F.softplus(torch.randn(h, device="cuda"))), leaf(torch.randn(h, device="cuda"))

        def mamba2():
            keys, queries = (x.expand(b, t, h, dk) for x in (k, q))
            o = chunk_simple_gla(queries, keys, (v * delta[..., None]).bfloat16(), delta * a, scale=1.0)[0]
            return (o + d[:, None] * v).bfloat16()

        return mamba2, (q, k, v, delta, a, d)
    if name in ("delta_rule", "gated_delta_rule", "kda"):
        k = leaf(F.normalize(k.detach().float(), dim=-1).bfloat16())
        beta = leaf(torch.rand(b, t, h, device="cuda"))
    if name == "delta_rule":
        from fla.ops.delta_rule import chunk_delta_rule

        return lambda: chunk_delta_rule(q, k, v, beta)[0], (q, k, v, beta)
    if name == "gated_delta_rule":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        g = leaf(F.logsigmoid(torch.randn(b, t, h, device="cuda")))
        return lambda: chunk_gated_delta_rule(q, k, v, g, beta)[0], (q, k, v, g, beta)
    if name == "kda":
        from fla.ops.kda import chunk_kda

        g = leaf(F.logsigmoid(torch.randn(b, t, h, dk, device="cuda")))
        return lambda: chunk_kda(q, k, v, g, beta)[0], (q, k, v, g, beta)
    if name == "rwkv7":
        from fla.ops.rwkv7 import chunk_rwkv7

        kk = F.normalize(torch.randn(b, t, h, dk, device="cuda"), dim=-1)
        removed, added = leaf((-kk).bfloat16()), leaf((kk * torch.rand_like(kk)).bfloat16())
        w = leaf((-0.6065 * torch.rand(b, t, h, dk, device="cuda")).bfloat16())
        return lambda: chunk_rwkv7(q, w, k, v, removed, added)[0], (q, w, k, v, removed, added)
    sys.exit(f"error: no operator {name}; see the top of this file")


def main():
    print("operator B T H K V forward_ms both_ms peak_GiB")
    for name in sys.argv[1].split(","):
        for shape in sys.argv[2].split(","):
            size = tuple(map(int, shape.split("x")))
            forward, leaves = problem(name, *size)
            grad = torch.randn_like(forward())

            def both():
                # Gradients start from nothing each time.
                for x in leaves:
                    x.grad = None
                forward().backward(grad)

            one, two = seconds(forward), seconds(both)
            torch.cuda.reset_peak_memory_stats()
            both()
            peak = torch.cuda.max_memory_allocated() / 2**30
            print(f"peer-{name} {' '.join(map(str, size))} {one * 1e3:.3f} {two * 1e3:.3f} {peak:.2f}", flush=True)


main()
