//! Times operators, and refuses to print a time for a wrong answer.
//!
//! - `bench-hopper operators OPERATOR,… B×T×H×K×V,… [FILE,…]` (H is 8/32 where 32 heads of values share 8 of keys): those of
//!   `burn_fla_tests::operators` (`all` is every one, `gla:mma` is one on the kernels for any NVIDIA GPU since Ampere),
//!   forward and backward. All cases are checked before the first is timed. Compiling and checking are the slow part;
//!   processes that are given the same files do these side by side. Who times waits until none of them checks, and is the
//!   only one with its first file: each GPU of a host has a file of its own, and they time side by side;
//! - `bench-hopper list`: their names;
//! - `bench-hopper step OPERATOR,… B×T×H×K×V,…`: one token a sequence;
//! - `bench-hopper linear TOKENS,… N×K,…`: the products of a linear layer (`linear:mma` as above, `linear:burn` by Burn's
//!   own product);
//! - `bench-hopper support [OPERATOR,…]`: what surrounds them.
//!
//! Lines of JSON, for `report operators`, go to the standard output. See `scripts/bench-hopper.sh`.

mod case;
mod linear;
mod seed;
mod step;
mod support;
mod timing;

use std::fs::File;
use std::process::ExitCode;

use burn::tensor::Device;
use burn_fla_tests::operators::{OPERATORS, Size};

use case::Machine;

const USAGE: &str = "bench-hopper list | bench-hopper operators OPERATOR,… BxTxHxKxV,… [FILE,…] | bench-hopper step OPERATOR,… BxTxHxKxV,… | bench-hopper linear[:mma|:burn] TOKENS,… NxK,… | bench-hopper support [OPERATOR,…]";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}\nusage: {USAGE}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[&str]) -> Result<bool, String> {
    if arguments == ["list"] {
        OPERATORS.iter().for_each(|operator| println!("{}", operator.name));
        return Ok(true);
    }
    let device = Device::cuda(0);
    match *arguments {
        ["operators", operators, shapes] => time_operators(&device, operators, shapes, &[]),
        ["operators", operators, shapes, files] => {
            let open = |file: &str| File::create(file).map_err(|error| format!("{file}: {error}"));
            let files = files.split(',').map(open).collect::<Result<Vec<_>, _>>()?;
            time_operators(&device, operators, shapes, &files)
        }
        ["step", operators, shapes] => {
            let (chosen, sizes, machine) = (case::choose(operators)?, sizes(shapes)?, machine(&device));
            case::takes(&chosen, &sizes)?;
            let mut right = true;
            for size in sizes {
                for chosen in &chosen {
                    right &= step::run(&device, *chosen, size, &machine);
                }
            }
            Ok(right)
        }
        [operator, tokens, shapes] if linear::OPERATORS.contains(&operator) => {
            if !burn_fla_ops::bridge::has_mma(&device) {
                return Err("no NVIDIA GPU since Ampere here, which the product needs".into());
            }
            let shapes = shapes.split(',').map(numbers::<2>).collect::<Result<Vec<_>, _>>()?;
            let tokens = tokens.split(',').map(numbers::<1>).collect::<Result<Vec<_>, _>>()?;
            Ok(linear::run(&device, operator, &tokens.concat(), &shapes))
        }
        ["support"] => Ok(support::run(&device, None)),
        ["support", operators] => Ok(support::run(&device, Some(operators))),
        _ => Err("no such command".into()),
    }
}

fn time_operators(device: &Device, operators: &str, shapes: &str, files: &[File]) -> Result<bool, String> {
    let (chosen, sizes) = (case::choose(operators)?, sizes(shapes)?);
    case::takes(&chosen, &sizes)?;
    let each = |files: &[File], lock: fn(&File) -> std::io::Result<()>| {
        files.iter().try_for_each(lock).map_err(|error| error.to_string())
    };
    let own = &files[..files.len().min(1)];
    each(files, File::lock_shared)?;
    let mut cases = Vec::new();
    for size in sizes {
        for chosen in &chosen {
            cases.push((*chosen, size, case::check(device, *chosen, size)));
        }
    }
    each(files, File::unlock)?;
    let all = cases.len();
    cases.retain(|(chosen, size, errors)| case::is_right(*chosen, *size, errors));
    // Those that check hold this one too, whatever their GPU.
    each(own, File::lock)?;
    let machine = machine(device);
    eprintln!("{}: a copy moves {:.2} TB/s\n{}", machine.name, machine.copy / 1e12, case::HEAD);
    for (chosen, size, errors) in &cases {
        let measured = case::measure(device, *chosen, *size);
        case::report(*chosen, *size, errors, &measured, &machine);
    }
    each(own, File::unlock)?;
    Ok(cases.len() == all)
}

fn machine(device: &Device) -> Machine {
    // As its driver calls it: CubeCL does not say.
    let query = ["--query-gpu=name", "--format=csv,noheader"];
    let output = std::process::Command::new("nvidia-smi").args(query).output();
    let name = output.ok().filter(|output| output.status.success()).and_then(|output| {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().next().map(|line| line.trim().to_string())
    });
    Machine { name: name.unwrap_or_else(|| "unknown GPU".into()), copy: timing::copy_speed(device) }
}

fn numbers<const N: usize>(text: &str) -> Result<[usize; N], String> {
    let parts: Result<Vec<usize>, _> = text.split('x').map(str::parse).collect();
    let parts = parts.map_err(|_| format!("`{text}` is not {N} numbers with x between them"))?;
    parts.try_into().map_err(|_| format!("`{text}` is not {N} numbers with x between them"))
}

fn sizes(list: &str) -> Result<Vec<Size>, String> {
    let one = |text: &str| {
        let (plain, key_heads) = match text.split('x').nth(2).and_then(|heads| heads.split_once('/')) {
            Some((keys, heads)) => (text.replacen(&format!("{keys}/{heads}"), heads, 1), Some(keys)),
            None => (text.to_string(), None),
        };
        let [b, t, h, k, v] = numbers::<5>(&plain)?;
        let key_heads = key_heads.map_or(Ok(h), str::parse);
        let key_heads =
            key_heads.map_err(|_| format!("the heads of `{text}` are not two numbers with / between them"))?;
        if [b, t, h, k, v, key_heads].contains(&0) {
            return Err(format!("a size of `{text}` is 0"));
        }
        if !h.is_multiple_of(key_heads) {
            return Err(format!("the {h} heads of `{text}` are no multiple of those of its keys"));
        }
        Ok(Size { b, t, h, key_heads, k, v })
    };
    list.split(',').map(one).collect()
}
