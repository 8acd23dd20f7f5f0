//! gsa, rwkv6 and ssd, forward and backward, in value against their recurrence in f64 over the same bf16 inputs.

use burn::backend::DispatchTensor;
use burn::tensor::{DType, Device, Distribution, Tensor, activation};
use burn_fla_ops::bridge::apply;
use burn_fla_ops::{GsaOptions, SequenceOptions, SsdOptions, gsa, rwkv6, ssd};
use burn_fla_tests::{numbers, ratio};

use super::median;
use super::recurrence::{Pass, Seed};

/// The operators.
pub(super) const OPERATORS: [&str; 3] = ["gsa", "rwkv6", "ssd"];

/// Tokens times heads of the largest problem of ssd whose shared gradients are checked.
const MOST_SUMMED: usize = 8192;
/// Slots of a head of gsa.
const SLOTS: usize = 64;

/// An input: its name, and its tensor as `[B, T, H, D]` or as a parameter's shape.
type Inputs = Vec<(&'static str, Tensor<4>)>;

pub(super) fn run(device: &Device, operator: &str, shapes: &[Vec<usize>]) -> bool {
    println!("operator B T H K V forward_ms both_ms peak_GiB errors: o, and the gradients of the inputs");
    let mut all = true;
    for shape in shapes {
        let [b, t, h, dk, dv] = shape[..] else {
            eprintln!("error: a shape is BxTxHxKxV");
            return false;
        };
        all &= one(device, operator, [b, t, h, dk, dv]);
    }
    all
}

fn inputs(operator: &str, device: &Device, [b, t, h, dk, dv]: [usize; 5]) -> Inputs {
    let normal = |shape: [usize; 4]| -> Tensor<4> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), (device, DType::F32))
    };
    let leaf = |x: Tensor<4>, dtype| x.cast(dtype).detach().require_grad();
    let token = |heads: usize, width: usize| leaf(normal([b, t, heads, width]), DType::BF16);
    let gate = |width: usize, dtype| leaf(activation::log_sigmoid(normal([b, t, h, width])), dtype);
    match operator {
        "gsa" => vec![
            ("q", token(h, dk)),
            ("k", token(h, dk)),
            ("v", token(h, dv)),
            ("s", leaf(activation::softmax(normal([b, t, h, SLOTS]), 3), DType::BF16)),
            ("g", gate(SLOTS, DType::F32)),
        ],
        "rwkv6" => vec![
            ("r", token(h, dk)),
            ("k", token(h, dk)),
            ("v", token(h, dv)),
            ("w", gate(dk, DType::BF16)),
            ("u", leaf(normal([1, 1, h, dk]), DType::F32)),
        ],
        // One group of B and C for all heads, as Mamba2 has it.
        _ => vec![
            ("c", token(1, dk)),
            ("b", token(1, dk)),
            ("x", token(h, dv)),
            ("delta", leaf(activation::softplus(normal([b, t, h, 1]), 1.0), DType::F32)),
            ("a", leaf(activation::softplus(normal([1, 1, h, 1]), 1.0).neg(), DType::F32)),
            ("D", leaf(normal([1, 1, h, 1]), DType::F32)),
        ],
    }
}

fn one(plain: &Device, operator: &str, shape: [usize; 5]) -> bool {
    let [b, t, h, dk, dv] = shape;
    let device = plain.clone().autodiff();
    let inputs = inputs(operator, &device, shape);
    let grad: Tensor<4> =
        Tensor::random([b, t, h, dv], Distribution::Normal(0.0, 1.0), (&device, DType::BF16)).detach();
    let forward = || {
        let x = |i: usize| inputs[i].1.clone();
        let result = match operator {
            "gsa" => gsa(x(0), x(1), x(2), x(3), x(4), GsaOptions::default()).map(|(o, _)| o),
            "rwkv6" => {
                let options = SequenceOptions { scale: Some(1.0), ..Default::default() };
                rwkv6(x(0), x(1), x(2), x(3), x(4).reshape([h, dk]), options).map(|(o, _)| o)
            }
            _ => {
                let options = SsdOptions { skip: Some(x(5).reshape([h])), ..Default::default() };
                ssd(x(2), x(3).reshape([b, t, h]), x(4).reshape([h]), x(1), x(0), options).map(|(o, _)| o)
            }
        };
        result.expect("a good problem")
    };
    let both = || {
        let o = forward();
        let floats: Vec<DispatchTensor> = vec![o.clone().into_dispatch(), grad.clone().into_dispatch()];
        let loss = Tensor::<1>::from_dispatch(apply(Seed, floats, Vec::new()).remove(0));
        (o, loss.backward())
    };
    let (o, grads) = both();
    let gradients: Vec<Option<Tensor<4>>> = inputs.iter().map(|(_, x)| x.grad(&grads)).collect();
    let mut errors = vec![0.0f64; 1 + inputs.len()];
    for head in [0, b * h / 2, b * h - 1] {
        // What all heads or rows share is summed over them: its gradient is checked where there is one head and row.
        let cut = |x: &Tensor<4>| {
            let [rows, _, heads, _] = x.dims();
            let x = if rows == 1 { x.clone() } else { x.clone().narrow(0, head / h, 1) };
            numbers(if heads == 1 { x } else { x.narrow(2, head % h, 1) })
        };
        let values: Vec<Vec<f64>> = inputs.iter().map(|(_, x)| cut(&x.clone().inner())).collect();
        let exact = exact(operator, &values, &cut(&grad.clone().inner()), [t, dk, dv]);
        errors[0] = errors[0].max(ratio(&cut(&o.clone().inner()), &exact[0]));
        for (i, (gradient, (_, input))) in gradients.iter().zip(&inputs).enumerate() {
            let [rows, _, heads, _] = input.dims();
            let shared = (rows == 1 && b > 1) || (heads == 1 && h > 1);
            match gradient {
                Some(gradient) if !shared => errors[1 + i] = errors[1 + i].max(ratio(&cut(gradient), &exact[1 + i])),
                Some(_) => {}
                None => errors[1 + i] = f64::NAN,
            }
        }
    }
    // Of small problems also what the heads of a row share, summed over them.
    if operator == "ssd" && t * h <= MOST_SUMMED {
        let row = |x: &Tensor<4>| numbers(x.clone().narrow(0, 0, 1));
        let cut = |x: &Tensor<4>, head: usize| {
            let [rows, _, heads, _] = x.dims();
            let x = if rows == 1 { x.clone() } else { x.clone().narrow(0, 0, 1) };
            numbers(if heads == 1 { x } else { x.narrow(2, head, 1) })
        };
        let mut sums = [vec![0.0; t * dk], vec![0.0; t * dk]];
        for head in 0..h {
            let values: Vec<Vec<f64>> = inputs.iter().map(|(_, x)| cut(&x.clone().inner(), head)).collect();
            let exact = exact(operator, &values, &cut(&grad.clone().inner(), head), [t, dk, dv]);
            for (sum, exact) in sums.iter_mut().zip(&exact[1..]) {
                sum.iter_mut().zip(exact).for_each(|(sum, x)| *sum += x);
            }
        }
        for (i, sum) in sums.iter().enumerate() {
            errors[1 + i] = gradients[i].as_ref().map_or(f64::NAN, |found| ratio(&row(found), sum));
        }
    }
    let names = ["o"].into_iter().chain(inputs.iter().map(|(name, _)| *name));
    let shown: Vec<String> = names.zip(&errors).map(|(name, e)| format!("{name} {e:.1e}")).collect();
    // Rounding to bf16: of the operands and outputs, in gsa of two passes and the probabilities between them; a decay's
    // gradient is a difference.
    let bound = |i: usize| match (i, operator) {
        (0, "gsa") => 8e-3,
        (0, _) => 5e-3,
        (i, _) if ["g", "w", "a", "delta"].contains(&inputs[i - 1].0) => 2e-2,
        (_, "gsa") => 1.2e-2,
        _ => 8e-3,
    };
    if errors.iter().enumerate().any(|(i, e)| e.is_nan() || *e > bound(i)) {
        println!("{operator} {b} {t} {h} {dk} {dv}: WRONG: {}", shown.join(", "));
        return false;
    }
    drop((o, grads, gradients));
    let forward_time = median(plain, || drop(forward()));
    let both_time = median(plain, || drop(both()));
    let peak = plain.memory_pool_usage().map_or(f64::NAN, |usage| usage.bytes_reserved as f64 / (1u64 << 30) as f64);
    println!(
        "{operator} {b} {t} {h} {dk} {dv} {:.3} {:.3} {peak:.2} {}",
        forward_time * 1e3,
        both_time * 1e3,
        shown.join(", ")
    );
    true
}

/// o and the gradients of the inputs of one head.
fn exact(operator: &str, x: &[Vec<f64>], grad: &[f64], size: [usize; 3]) -> Vec<Vec<f64>> {
    match operator {
        "gsa" => exact_gsa(x, grad, size),
        "rwkv6" => exact_rwkv6(x, grad, size),
        _ => exact_ssd(x, grad, size),
    }
}

/// Two passes of gated linear attention. The first is one with the sides of its state exchanged: what reads it is the
/// gradient of the scores, and its "gradient of the outputs" is q.
fn exact_gsa(x: &[Vec<f64>], grad: &[f64], [t, dk, dv]: [usize; 3]) -> Vec<Vec<f64>> {
    let [q, k, v, s, g] = [0, 1, 2, 3, 4].map(|i| &x[i][..]);
    let scale = (dk as f64).powf(-0.5);
    let first = |reading: &[f64]| Pass { q: reading, k: s, v: k, grad: q, g, keys: SLOTS, values: dk, scale }.run();
    let [_, scores, ..] = first(&vec![0.0; t * SLOTS]);
    let mut p = scores;
    for row in p.chunks_mut(SLOTS) {
        let most = row.iter().fold(f64::NEG_INFINITY, |most, x| most.max(*x));
        row.iter_mut().for_each(|x| *x = (*x - most).exp());
        let sum: f64 = row.iter().sum();
        row.iter_mut().for_each(|x| *x /= sum);
    }
    let [o, dp, ds, dvalue, dg] = Pass { q: &p, k: s, v, grad, g, keys: SLOTS, values: dv, scale: 1.0 }.run();
    let mut dscores = dp;
    for (row, p) in dscores.chunks_mut(SLOTS).zip(p.chunks(SLOTS)) {
        let mean: f64 = row.iter().zip(p).map(|(a, b)| a * b).sum();
        row.iter_mut().zip(p).for_each(|(a, b)| *a = b * (*a - mean));
    }
    let [dq, _, ds_first, dkey, dg_first] = first(&dscores);
    let sum = |a: Vec<f64>, b: Vec<f64>| a.into_iter().zip(b).map(|(a, b)| a + b).collect();
    vec![o, dq, dkey, dvalue, sum(ds, ds_first), sum(dg, dg_first)]
}

fn exact_rwkv6(x: &[Vec<f64>], grad: &[f64], [t, dk, dv]: [usize; 3]) -> Vec<Vec<f64>> {
    let [r, k, v, w, u] = [0, 1, 2, 3, 4].map(|i| &x[i][..]);
    let (mut o, mut dvalue) = (vec![0.0; t * dv], vec![0.0; t * dv]);
    let (mut dr, mut dkey, mut du) = (vec![0.0; t * dk], vec![0.0; t * dk], vec![0.0; dk]);
    // What the decay's gradient is a sum of, without a token's own part.
    let (mut by_r, mut by_k) = (vec![0.0; t * dk], vec![0.0; t * dk]);
    let mut state = vec![0.0; dk * dv];
    for i in 0..t {
        let (values, grads) = (&v[i * dv..(i + 1) * dv], &grad[i * dv..(i + 1) * dv]);
        let own: f64 = values.iter().zip(grads).map(|(a, b)| a * b).sum();
        for a in 0..dk {
            let at = i * dk + a;
            let (bonus, decay) = (r[at] * u[a] * k[at], w[at].exp());
            let mut sum = 0.0;
            for c in 0..dv {
                let s = &mut state[a * dv + c];
                o[i * dv + c] += r[at] * *s + bonus * values[c];
                dvalue[i * dv + c] += bonus * grads[c];
                sum += grads[c] * *s;
                *s = *s * decay + k[at] * values[c];
            }
            by_r[at] = r[at] * sum;
            dr[at] = sum + u[a] * k[at] * own;
            dkey[at] = u[a] * r[at] * own;
            du[a] += r[at] * k[at] * own;
        }
    }
    let mut state = vec![0.0; dk * dv];
    for i in (0..t).rev() {
        for a in 0..dk {
            let at = i * dk + a;
            let mut sum = 0.0;
            for c in 0..dv {
                let z = &mut state[a * dv + c];
                dvalue[i * dv + c] += k[at] * *z;
                sum += v[i * dv + c] * *z;
                *z = *z * w[at].exp() + r[at] * grad[i * dv + c];
            }
            by_k[at] = k[at] * sum;
            dkey[at] += sum;
        }
    }
    let mut dw = vec![0.0; t * dk];
    let mut sums = vec![0.0; dk];
    for i in (0..t).rev() {
        for a in 0..dk {
            sums[a] -= by_k[i * dk + a];
            dw[i * dk + a] = sums[a];
            sums[a] += by_r[i * dk + a];
        }
    }
    vec![o, dr, dkey, dvalue, dw, du]
}

/// Linear attention with a decay by token, from the gradients of which those of Δ, A and D follow.
fn exact_ssd(x: &[Vec<f64>], grad: &[f64], [t, dk, dv]: [usize; 3]) -> Vec<Vec<f64>> {
    let [c, b, input, delta] = [0, 1, 2, 3].map(|i| &x[i][..]);
    let (a, skip) = (x[4][0], x[5][0]);
    let v: Vec<f64> = (0..t * dv).map(|i| input[i] * delta[i / dv]).collect();
    let g: Vec<f64> = delta.iter().map(|delta| delta * a).collect();
    let pass = Pass { q: c, k: b, v: &v, grad, g: &g, keys: dk, values: dv, scale: 1.0 };
    let [mut o, dc, db, dvalue, dg] = pass.run();
    o.iter_mut().zip(input).for_each(|(o, x)| *o += skip * x);
    let dx = (0..t * dv).map(|i| dvalue[i] * delta[i / dv] + skip * grad[i]).collect();
    let ddelta = (0..t).map(|i| {
        let row = i * dv..(i + 1) * dv;
        a * dg[i] + dvalue[row.clone()].iter().zip(&input[row]).map(|(a, b)| a * b).sum::<f64>()
    });
    let da = dg.iter().zip(delta).map(|(a, b)| a * b).sum();
    let dskip = grad.iter().zip(input).map(|(a, b)| a * b).sum();
    vec![o, dc, db, dx, ddelta.collect(), vec![da], vec![dskip]]
}
