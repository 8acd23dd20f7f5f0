"""Times a training step of flash-linear-attention: peer_step.py CONFIG.json ROWS TOKENS

Parameters in f32 under bf16 autocast, AdamW of PyTorch in its fused form, clipping to a norm of 1, output layer and loss fused,
random tokens: what scripts/gpu-step.sh times of ours. Needs a GPU, PyTorch, transformers and flash-linear-attention.
"""
import json
import sys
import time

import fla  # noqa: F401  registers the models
import torch
from transformers import AutoConfig, AutoModelForCausalLM

STEPS = 30


def main():
    fields = json.load(open(sys.argv[1]))
    rows, tokens = int(sys.argv[2]), int(sys.argv[3])
    fields.update(fuse_cross_entropy=False, fuse_linear_cross_entropy=True, use_cache=False)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config).float().cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step():
        ids = torch.randint(config.vocab_size, (rows, tokens), device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss, norm

    start = time.time()
    norms = [step()[1].item()]
    print(f"first step {time.time() - start:.1f} s")
    norms += [step()[1].item() for _ in range(9)]
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.time()
    found = [step() for _ in range(STEPS)]
    torch.cuda.synchronize()
    seconds = (time.time() - start) / STEPS
    norms += [norm.item() for _, norm in found]
    allocated, reserved = (f() / 2**30 for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
    print(
        f"{rows * tokens / seconds:.0f} tokens/s, {1e3 * seconds:.1f} ms a step; peak {allocated:.1f} GiB allocated, "
        f"{reserved:.1f} GiB reserved; loss {found[-1][0].item():.3f}"
    )
    print("norms of the gradient:", " ".join(f"{norm:.1f}" for norm in norms))


main()
