"""Times operators of flash-linear-attention and PyTorch's flash attention: peer.py [--warm[=I/N]] OPERATOR,... BxTxHxKxV,...

The problems are those of bench-hopper: bf16, log decays log sigmoid(x) of normal numbers. A line of JSON for each, which `report operators`
takes: medians of milliseconds over groups of calls with one wait each, as bench-hopper takes them, and the most bytes that
tensors held at once, inputs and gradients included. What is added into a tensor's gradient is not timed. `--warm` only compiles, without choosing
among the variants of a kernel, of which I/N is every Nth: run it for many operators side by side before one process
tunes and times alone.
Needs a GPU, PyTorch and flash-linear-attention.
"""
import json
import statistics
import sys
import time
import zlib

import torch
import torch.nn.functional as F
import triton

SLOTS = 64
WARM = next((x.partition("=")[2] or "0/1" for x in sys.argv if x.startswith("--warm")), None)


def tune_quickly():
    """Variants of a kernel are measured for 30 ms each, or when warming up, compiled and not launched."""
    driver = triton.runtime.driver.active
    benchmarker = driver.get_benchmarker()
    driver.get_benchmarker = lambda: lambda call, quantiles=None: benchmarker(call, warmup=6, rep=24, quantiles=quantiles)
    if not WARM:
        return
    part, parts = map(int, WARM.split("/"))
    tuner = triton.runtime.autotuner.Autotuner

    class Unknown(Exception):
        pass

    def unknown():
        raise Unknown

    def compile_some(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args))
        configs, key = self.configs, ()
        if len(configs) > 1:
            given = {name: x for name, x in {**self.nargs, **kwargs}.items() if name in self.arg_names}
            key = [given[name] for name in self.keys if name in given]
            key = tuple(key + [str(x.dtype) for x in given.values() if hasattr(x, "dtype")])
            configs = self.prune_configs(kwargs)
            try:
                # What was chosen before is all that is needed.
                self.check_disk_cache(key, configs, unknown)
                configs = [self.cache[key]]
            except Unknown:
                pass
        # The first variants of all kernels are not all one process's.
        turn = zlib.crc32(f"{self.base_fn.__name__} {key}".encode())
        for config in (config for i, config in enumerate(configs) if (i + turn) % parts == part):
            try:
                self.fn.run(*args, **{**kwargs, **config.all_kwargs(), "warmup": True})
            except Exception as error:
                # Variants that do not fit the device are no failures.
                print(f"{self.base_fn.__name__}: {type(error).__name__}", file=sys.stderr)
        self.nargs = None

    tuner.run = compile_some


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


def attention(x):
    q, k, v = x.qkv()
    return lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True), (q, k, v)


def retention(x):
    from fla.ops.retention import chunk_retention

    q, k, v = x.qkv()
    return lambda: chunk_retention(q, k, v)[0], (q, k, v)


def linear_attn(x):
    from fla.ops.linear_attn import chunk_linear_attn

    q, k, v = x.qkv()
    return lambda: chunk_linear_attn(q, k, v, normalize=False)[0], (q, k, v)


def simple_gla(x):
    from fla.ops.simple_gla import chunk_simple_gla

    (q, k, v), g = x.qkv(), x.gate()
    return lambda: chunk_simple_gla(q, k, v, g)[0], (q, k, v, g)


def ssd(x):
    from fla.ops.simple_gla import chunk_simple_gla

    # One group of B and C, which the peer's operator takes repeated for every head, and the D term.
    q, k, v = x.normal(x.k, heads=1), x.normal(x.k, heads=1), x.normal(x.v)
    delta = leaf(F.softplus(torch.randn(x.b, x.t, x.h, device="cuda")))
    a, d = leaf(-F.softplus(torch.randn(x.h, device="cuda"))), leaf(torch.randn(x.h, device="cuda"))

    def mamba2():
        keys, queries = (y.expand(x.b, x.t, x.h, x.k) for y in (k, q))
        o = chunk_simple_gla(queries, keys, (v * delta[..., None]).bfloat16(), delta * a, scale=1.0)[0]
        return (o + d[:, None] * v).bfloat16()

    return mamba2, (q, k, v, delta, a, d)


def gla(x):
    from fla.ops.gla import chunk_gla

    (q, k, v), g = x.qkv(), x.gate(x.k)
    return lambda: chunk_gla(q, k, v, g)[0], (q, k, v, g)


def rwkv6(x):
    from fla.ops.rwkv6 import chunk_rwkv6

    (q, k, v), w = x.qkv(), x.gate(x.k)
    u = leaf(torch.randn(x.h, x.k, device="cuda"))
    return lambda: chunk_rwkv6(q, k, v, w, u, scale=1.0)[0], (q, k, v, w, u)


def gsa(x):
    from fla.ops.gsa import chunk_gsa

    q, k, v = x.qkv()
    s = leaf(torch.randn(x.b, x.t, x.h, SLOTS, device="cuda").softmax(-1).bfloat16())
    g = leaf(F.logsigmoid(torch.randn(x.b, x.t, x.h, SLOTS, device="cuda")))
    return lambda: chunk_gsa(q, k, v, s, g)[0], (q, k, v, s, g)


def abc(x):
    from fla.ops.abc import chunk_abc

    (q, k, v), s = x.qkv(), x.normal(SLOTS)
    return lambda: chunk_abc(q, k, v, s)[0], (q, k, v, s)


def delta_rule(x):
    from fla.ops.delta_rule import chunk_delta_rule

    q, k, v, beta = x.unit(), x.unit(), x.normal(x.v), x.beta()
    return lambda: chunk_delta_rule(q, k, v, beta)[0], (q, k, v, beta)


def gated_delta_rule(x):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, g, beta = x.unit(), x.unit(), x.normal(x.v), x.gate(), x.beta()
    return lambda: chunk_gated_delta_rule(q, k, v, g, beta)[0], (q, k, v, g, beta)


def kda(x):
    from fla.ops.kda import chunk_kda

    q, k, v, g, beta = x.unit(), x.unit(), x.normal(x.v), x.gate(x.k), x.beta()
    return lambda: chunk_kda(q, k, v, g, beta)[0], (q, k, v, g, beta)


def removal(x):
    kk = F.normalize(torch.randn(x.b, x.t, x.h, x.k, device="cuda"), dim=-1)
    return leaf((-kk).bfloat16()), leaf((kk * torch.rand_like(kk)).bfloat16())


def rwkv7(x):
    from fla.ops.rwkv7 import chunk_rwkv7

    (q, k, v), (a, b) = (x.unit(), x.unit(), x.normal(x.v)), removal(x)
    bound = -0.6065306597126334
    w = leaf((bound * torch.rand(x.b, x.t, x.h, x.k, device="cuda")).bfloat16())
    # As the peer's layer calls it.
    options = dict(scale=1.0, safe_gate=True, lower_bound=bound, chunk_size=64)
    return lambda: chunk_rwkv7(q, w, k, v, a, b, **options)[0], (q, w, k, v, a, b)


def dplr(x):
    from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule

    (q, k, v), (a, b), g = (x.unit(), x.unit(), x.normal(x.v)), removal(x), x.gate(x.k)
    return lambda: chunk_dplr_delta_rule(q, k, v, a, b, g)[0], (q, k, v, a, b, g)


OPERATORS = {
    f.__name__: f
    for f in (
        attention, retention, linear_attn, simple_gla, ssd, gla, rwkv6, gsa, abc,
        delta_rule, gated_delta_rule, kda, rwkv7, dplr,
    )
}


class Size:
    """A problem's size, and its random inputs."""

    def __init__(self, b, t, h, k, v, key_heads=None):
        self.b, self.t, self.h, self.k, self.v = b, t, h, k, v
        self.key_heads = key_heads or h

    def normal(self, width, heads=None):
        return leaf(torch.randn(self.b, self.t, heads or self.h, width, device="cuda").bfloat16())

    def unit(self):
        return leaf(F.normalize(torch.randn(self.b, self.t, self.key_heads, self.k, device="cuda"), dim=-1).bfloat16())

    def qkv(self):
        return self.normal(self.k), self.normal(self.k), self.normal(self.v)

    def gate(self, width=None):
        if width is None:
            return leaf(F.logsigmoid(torch.randn(self.b, self.t, self.h, device="cuda")))
        return leaf(F.logsigmoid(torch.randn(self.b, self.t, self.h, width, device="cuda")).bfloat16())

    def beta(self):
        return leaf(torch.rand(self.b, self.t, self.h, device="cuda").bfloat16())


def measure(name, size):
    forward, leaves = OPERATORS[name](Size(*size))
    grad = torch.randn_like(forward())

    def both():
        # Gradients start from nothing each time.
        for x in leaves:
            x.grad = None
        forward().backward(grad)

    if WARM:
        both()
        torch.cuda.synchronize()
        return {}
    one, two = seconds(forward), seconds(both)
    torch.cuda.reset_peak_memory_stats()
    both()
    return {"forward_ms": one * 1e3, "both_ms": two * 1e3, "peak_bytes": torch.cuda.max_memory_allocated()}


def main():
    names, shapes = [x for x in sys.argv[1:] if not x.startswith("-")]
    tune_quickly()
    every = ",".join(name for name in OPERATORS if name != "attention")
    names = names.replace("all", every).split(",")
    for name in names:
        if name not in OPERATORS:
            sys.exit(f"error: no operator {name}; there are {', '.join(OPERATORS)}")
    for name in names:
        for shape in shapes.split(","):
            heads = shape.split("x")[2].partition("/")
            size = list(map(int, shape.replace(heads[0] + "/", "", 1).split("x") if heads[1] else shape.split("x")))
            keys = int(heads[0])
            row = {"operator": name, "engine": "peer", "shape": size, "key_heads": keys, "device": torch.cuda.get_device_name()}
            try:
                start = time.time()
                row |= measure(name, [*size, keys])
                print(f"{name} {shape}: {time.time() - start:.1f} s", file=sys.stderr, flush=True)
            except Exception as error:
                row["failed"] = repr(error)[:300]
            if "failed" in row or not WARM:
                print(json.dumps(row), flush=True)
            torch.cuda.empty_cache()


main()
