//! One operator at one size: its times, bytes and errors.

use burn::tensor::{DType, Device, Gradients, Tensor};
use burn_fla_ops::bridge::most_bytes;
use burn_fla_ops::{Engine, SequenceOptions};
use burn_fla_tests::operators::{Check, Draw, Error, Heads, Input, OPERATORS, Operator, SHARED_KEYS, Size};
use serde_json::json;

use super::seed::loss;
use super::timing::median;

/// An operator on one of its engines: `gla`, or `gla:mma`.
#[derive(Clone, Copy)]
pub(crate) struct Chosen {
    pub(crate) operator: &'static Operator,
    pub(crate) engine: Engine,
}

/// The operators of a list such as `gla,gla:mma`; `all` is every one.
///
/// # Errors
/// A name that is not in the list, or an engine that is none.
pub(crate) fn choose(list: &str) -> Result<Vec<Chosen>, String> {
    let names = || OPERATORS.map(|operator| operator.name).join(", ");
    let mut chosen = Vec::new();
    for text in list.split(',') {
        let (name, engine) = text.split_once(':').unwrap_or((text, "auto"));
        let engine = match engine {
            "auto" => Engine::Auto,
            "mma" => Engine::Mma,
            _ => return Err(format!("no engine {engine}; there are auto and mma")),
        };
        let found = OPERATORS.into_iter().filter(|operator| name == "all" || operator.name == name);
        let before = chosen.len();
        chosen.extend(found.map(|operator| Chosen { operator, engine }));
        if chosen.len() == before {
            return Err(format!("no operator {name}; there are {}", names()));
        }
    }
    Ok(chosen)
}

/// That all operators take these sizes.
///
/// # Errors
/// A size whose heads share keys, with an operator whose heads do not.
pub(crate) fn takes(chosen: &[Chosen], sizes: &[Size]) -> Result<(), String> {
    let Some(size) = sizes.iter().find(|size| size.key_heads != size.h) else { return Ok(()) };
    let alone = |chosen: &&Chosen| SHARED_KEYS.iter().all(|operator| operator.name != chosen.operator.name);
    match chosen.iter().find(alone) {
        Some(chosen) => {
            Err(format!("the heads of {} do not share keys, as those of `{size}` do", chosen.operator.name))
        }
        None => Ok(()),
    }
}

impl Chosen {
    pub(crate) fn engine_name(&self) -> &'static str {
        match self.engine {
            Engine::Mma => "mma",
            Engine::Reference => "reference",
            Engine::Auto => "auto",
        }
    }

    pub(crate) fn options(&self) -> SequenceOptions {
        SequenceOptions { engine: self.engine, ..Default::default() }
    }
}

/// What is needed to run a case again and again.
struct Problem {
    chosen: Chosen,
    inputs: Vec<Input>,
    grad: Tensor<4>,
}

impl Problem {
    fn draw(chosen: Chosen, plain: &Device, size: Size) -> Self {
        let device = plain.clone().autodiff();
        let dtype = if plain.supports_dtype(DType::BF16) { DType::BF16 } else { DType::F32 };
        let draw = Draw { device, size, dtype, wide: DType::F32 };
        let inputs = (chosen.operator.inputs)(&draw);
        let grad = draw.by_head(size.v).cast(dtype).detach();
        Self { chosen, inputs, grad }
    }

    fn forward(&self) -> Tensor<4> {
        let inputs: Vec<Tensor<4>> = self.inputs.iter().map(|input| input.tensor.clone()).collect();
        let result = (self.chosen.operator.forward)(&inputs, self.chosen.options());
        result.unwrap_or_else(|error| panic!("{error}")).0
    }

    fn both(&self) -> (Tensor<4>, Gradients) {
        let o = self.forward();
        let grads = loss(vec![o.clone()], vec![self.grad.clone()]).backward();
        (o, grads)
    }

    fn check(&self, size: Size, heads: Heads) -> Check {
        let (o, grads) = self.both();
        let gradients: Vec<Option<Tensor<4>>> = self.inputs.iter().map(|input| input.tensor.grad(&grads)).collect();
        let (o, grad) = (o.inner(), self.grad.clone().inner());
        Check::start(self.chosen.operator, size, &self.inputs, &grad, &o, &gradients, heads)
    }

    /// Bytes that must be read and written, forward, and forward and backward: inputs are read twice, outputs and gradients
    /// written once, and the gradient of the outputs is read.
    fn bytes(&self) -> [usize; 2] {
        let size = |x: &Tensor<4>| x.shape().num_elements() * x.dtype().size();
        let read: usize = self.inputs.iter().map(|input| size(&input.tensor)).sum();
        let gradients = self.inputs.iter().filter(|input| input.tensor.is_require_grad());
        let written: usize = gradients.map(|input| size(&input.tensor)).sum();
        [read + size(&self.grad), 2 * read + 2 * size(&self.grad) + written]
    }
}

/// A problem small enough that all heads are compared, and what they share.
fn small(size: Size) -> Size {
    let share = size.h / size.key_heads;
    let key_heads = size.key_heads.min(8usize.div_ceil(share));
    Size { b: 2, t: size.t.min(130), h: key_heads * share, key_heads, ..size }
}

fn bytes_in_use(device: &Device) -> u64 {
    device.sync().expect("the device answers");
    device.memory_pool_usage().map_or(0, |usage| usage.bytes_in_use)
}

/// The worst errors of a case, of a small problem of the same channels too.
pub(crate) fn check(plain: &Device, chosen: Chosen, size: Size) -> Vec<Error> {
    let mut errors: Vec<Error> = Vec::new();
    for (size, heads) in [(small(size), Heads::All), (size, Heads::Three)] {
        for error in Problem::draw(chosen, plain, size).check(size, heads).finish() {
            match errors.iter_mut().find(|other| other.name == error.name) {
                Some(other) if error.found > other.found || error.found.is_nan() => *other = error,
                Some(_) => {}
                None => errors.push(error),
            }
        }
    }
    // What it held is not for the next case.
    plain.memory_cleanup();
    errors
}

/// The times and bytes of a case.
pub(crate) struct Measured {
    seconds: [f64; 2],
    bytes: [usize; 2],
    most_bytes: u64,
    saved: f64,
}

pub(crate) fn measure(plain: &Device, chosen: Chosen, size: Size) -> Measured {
    let problem = Problem::draw(chosen, plain, size);
    let seconds = [median(plain, || drop(problem.forward())), median(plain, || drop(problem.both()))];
    let before = bytes_in_use(plain);
    let o = problem.forward();
    let kept = bytes_in_use(plain).saturating_sub(before) as f64;
    let output = (o.shape().num_elements() * o.dtype().size()) as f64;
    drop(o);
    let most_bytes = most_bytes(|| {
        drop(problem.both());
        bytes_in_use(plain);
    });
    let saved = (kept - output) / (size.b * size.t) as f64;
    let bytes = problem.bytes();
    drop(problem);
    plain.memory_cleanup();
    Measured { seconds, bytes, most_bytes, saved }
}

/// What the device gives: bytes a second of a copy, and its name.
pub(crate) struct Machine {
    pub(crate) name: String,
    pub(crate) copy: f64,
}

/// Floating-point operations a second that good kernels reach on Hopper's tensor cores.
const TENSOR_CORES: f64 = 650e12;

/// The columns of what [`report`] prints for a reader.
pub(crate) const HEAD: &str = "operator engine B T H K V: forward ms, both ms; TFLOP/s and TB/s of both; floor of both ms; most GiB; bytes saved a token; errors";

fn shown(errors: &[Error]) -> String {
    let shown: Vec<String> = errors.iter().map(|error| format!("{} {:.1e}", error.name, error.found)).collect();
    shown.join(", ")
}

/// Whether a case is right; says so where it is not.
pub(crate) fn is_right(chosen: Chosen, size: Size, errors: &[Error]) -> bool {
    let Some(wrong) = errors.iter().find(|error| error.is_wrong()) else { return true };
    let (name, engine, shown) = (chosen.operator.name, chosen.engine_name(), shown(errors));
    eprintln!("{name} {engine} {size}: WRONG in {} (at most {:.1e}): {shown}", wrong.name, wrong.bound);
    false
}

/// Prints a case that was right: for a reader into the standard error, for a program into the standard output.
pub(crate) fn report(chosen: Chosen, size: Size, errors: &[Error], measured: &Measured, machine: &Machine) {
    let Measured { seconds, bytes, most_bytes, saved } = measured;
    let (name, engine) = (chosen.operator.name, chosen.engine_name());
    let flops = (chosen.operator.flops)(size);
    let floor = |i: usize| (bytes[i] as f64 / machine.copy).max(flops[i] / TENSOR_CORES);
    eprintln!(
        "{name} {engine} {size}: {:.3} {:.3}; {:.0} {:.2}; {:.3}; {:.2}; {saved:.0}; {}",
        seconds[0] * 1e3,
        seconds[1] * 1e3,
        flops[1] / seconds[1] / 1e12,
        bytes[1] as f64 / seconds[1] / 1e12,
        floor(1) * 1e3,
        *most_bytes as f64 / (1u64 << 30) as f64,
        shown(errors),
    );
    let errors: serde_json::Map<String, serde_json::Value> =
        errors.iter().map(|error| (error.name.to_string(), json!(error.found))).collect();
    let row = json!({
        "operator": name,
        "engine": engine,
        "shape": [size.b, size.t, size.h, size.k, size.v],
        "key_heads": size.key_heads,
        "device": machine.name,
        "forward_ms": seconds[0] * 1e3,
        "both_ms": seconds[1] * 1e3,
        "peak_bytes": most_bytes,
        "saved_bytes_per_token": saved,
        "floor_ms": [floor(0) * 1e3, floor(1) * 1e3],
        "bytes": bytes,
        "flops": flops,
        "copy_TB_s": machine.copy / 1e12,
        "errors": errors,
    });
    println!("{row}");
}
