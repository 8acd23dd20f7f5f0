//! Times what has kernels for Hopper, and refuses to print a time for a wrong answer.
//!
//! `bench-hopper support [OPERATOR,…]`, `bench-hopper linear TOKENS,… N×K,…` and `bench-hopper OPERATOR B×T×H×K×V,…`, with `retention`,
//! `simple_gla`, `gla` (with `:mma` on the kernels for any NVIDIA GPU since Ampere), or one whose kernels are the portable ones: `gsa`, `rwkv6`, `ssd`, `delta_rule`, `gated_delta_rule`, `kda`, `rwkv7`; see `scripts/bench-hopper.sh`.

mod delta;
mod family;
mod linear;
mod recurrence;
mod support;

use std::process::ExitCode;
use std::time::Instant;

use burn::tensor::Device;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let device = Device::cuda(0);
    if !burn_fla_ops::bridge::is_hopper(&device) {
        eprintln!("error: no Hopper GPU here");
        return ExitCode::FAILURE;
    }
    let right = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["linear", tokens, shapes] => linear::run(&device, &numbers(tokens), &sizes(shapes)),
        ["support"] => support::run(&device, None),
        ["support", operators] => support::run(&device, Some(operators)),
        [operator @ ("retention" | "simple_gla" | "gla" | "retention:mma" | "simple_gla:mma" | "gla:mma"), shapes] => {
            recurrence::run(&device, operator, &sizes(shapes))
        }
        [operator, shapes] if family::OPERATORS.contains(&operator) => family::run(&device, operator, &sizes(shapes)),
        [operator, shapes] if delta::OPERATORS.contains(&operator) => delta::run(&device, operator, &sizes(shapes)),
        _ => {
            let operators = [&family::OPERATORS[..], &delta::OPERATORS[..]].concat().join("|");
            eprintln!(
                "usage: bench-hopper support [OPERATOR,…] | bench-hopper linear TOKENS,… NxK,… | bench-hopper retention[:mma]|simple_gla[:mma]|gla[:mma]|{operators} BxTxHxKxV,…"
            );
            false
        }
    };
    if right { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn numbers(list: &str) -> Vec<usize> {
    list.split(',').map(|n| n.parse().expect("a number")).collect()
}

fn sizes(list: &str) -> Vec<Vec<usize>> {
    list.split(',').map(|s| s.split('x').map(|n| n.parse().expect("a number")).collect()).collect()
}

/// The median of seconds that one call takes: groups of calls that last about 30 ms, each group with one wait at its end.
fn median(device: &Device, mut call: impl FnMut()) -> f64 {
    let mut group = |count: usize| {
        let start = Instant::now();
        (0..count).for_each(|_| call());
        device.sync().expect("the device answers");
        start.elapsed().as_secs_f64() / count as f64
    };
    group(2);
    let count = (0.03 / group(2)).clamp(1.0, 200.0) as usize;
    let mut times: Vec<f64> = (0..7).map(|_| group(count)).collect();
    times.sort_by(f64::total_cmp);
    times[3]
}
