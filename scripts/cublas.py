"""Times the three products of a linear layer by PyTorch (cuBLAS): cublas.py TOKENS,... NxK,...

Each is captured eight times in a graph, as bench-hopper does, so that both are timed without the host.
"""
import statistics
import sys
import time

import torch

CALLS = 8


def seconds(call):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()

    def group(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            graph.replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / count

    group(2)
    count = max(1, min(200, int(0.03 / group(2))))
    return statistics.median(group(count) for _ in range(7)) / CALLS


def main():
    print("cublas tokens N K ms TFLOP/s")
    for shape in sys.argv[2].split(","):
        n, k = map(int, shape.split("x"))
        for m in map(int, sys.argv[1].split(",")):
            x, w, dy = (
                torch.rand(*size, device="cuda").mul(2).sub(1).bfloat16() for size in ((m, k), (n, k), (m, n))
            )
            outputs = [torch.empty(*size, device="cuda", dtype=torch.bfloat16) for size in ((m, n), (m, k), (n, k))]
            for name, left, right, out in (
                ("y", x, w.t(), outputs[0]),
                ("dx", dy, w, outputs[1]),
                ("dW", dy.t(), x, outputs[2]),
            ):
                taken = seconds(lambda: torch.mm(left, right, out=out))
                print(f"cublas-{name} {m} {n} {k} {taken * 1e3:.4f} {2 * m * n * k / taken / 1e12:.0f}", flush=True)


main()
