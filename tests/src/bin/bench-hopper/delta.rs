//! The delta rules and RWKV7, forward and backward, in value against the recurrence in f64 over the same inputs.

use burn::backend::DispatchTensor;
use burn::tensor::{DType, Device, Distribution, Tensor, activation};
use burn_fla_ops::bridge::apply;
use burn_fla_ops::{DeltaOptions, SequenceOptions, delta_rule, gated_delta_rule, kda, rwkv7};
use burn_fla_tests::{numbers, ratio};

use super::median;
use super::recurrence::Seed;

/// The operators, with the names of their gradients.
pub(super) const OPERATORS: [&str; 4] = ["delta_rule", "gated_delta_rule", "kda", "rwkv7"];

/// Relative RMS errors of bf16: of the outputs, of the gradients of what is a tensor of channels, of those of gates and
/// strengths.
const BOUND_O: f64 = 5e-3;
const BOUND_INPUT: f64 = 8e-3;
const BOUND_GATE: f64 = 2e-2;

pub(super) fn run(device: &Device, operator: &str, shapes: &[Vec<usize>]) -> bool {
    println!("operator B T H K V forward_ms both_ms errors: o, and the gradients of the inputs");
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

fn one(plain: &Device, operator: &str, [b, t, h, dk, dv]: [usize; 5]) -> bool {
    let device = plain.clone().autodiff();
    let dtype = if plain.supports_dtype(DType::BF16) { DType::BF16 } else { DType::F32 };
    let normal = |width: usize| -> Tensor<4> {
        Tensor::random([b, t, h, width], Distribution::Normal(0.0, 1.0), (&device, DType::F32))
    };
    let leaf = |x: Tensor<4>, dtype| x.cast(dtype).detach().require_grad();
    let unit = |x: Tensor<4>| x.clone() / x.square().sum_dim(3).sqrt();
    // Keys of length 1, gates and strengths σ of normal numbers; RWKV7's decays are between e^-0.6065 and 1.
    let removal = operator == "rwkv7";
    let across = if operator == "kda" || removal { dk } else { 1 };
    let g =
        if removal { activation::sigmoid(normal(across)) * -0.6065 } else { activation::log_sigmoid(normal(across)) };
    let mut inputs = vec![
        ("q", leaf(unit(normal(dk)), dtype)),
        ("k", leaf(unit(normal(dk)), dtype)),
        ("v", leaf(normal(dv), dtype)),
        ("g", leaf(g, if across == 1 { DType::F32 } else { dtype })),
    ];
    if removal {
        inputs.push(("kk", leaf(unit(normal(dk)), dtype)));
        inputs.push(("rate", leaf(activation::sigmoid(normal(dk)), dtype)));
    } else {
        inputs.push(("beta", leaf(activation::sigmoid(normal(1)), DType::F32)));
    }
    let grad = normal(dv).cast(dtype).detach();

    let forward = || {
        let x = |i: usize| inputs[i].1.clone();
        let token = |i: usize| x(i).reshape([b, t, h]);
        let result = match operator {
            "delta_rule" => delta_rule(x(0), x(1), x(2), token(4), DeltaOptions::default()),
            "gated_delta_rule" => gated_delta_rule(x(0), x(1), x(2), token(3), token(4), DeltaOptions::default()),
            "kda" => kda(x(0), x(1), x(2), x(3), token(4), DeltaOptions::default()),
            _ => rwkv7(x(0), x(3), x(1), x(2), x(4), x(5), SequenceOptions::default()),
        };
        result.expect("a good problem").0
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
    let cut = |head: usize, x: Tensor<4>| numbers(x.narrow(0, head / h, 1).narrow(2, head % h, 1));
    let heads = [0, b * h / 2, b * h - 1];
    let problems = heads.map(|head| {
        let values: Vec<Vec<f64>> = inputs.iter().map(|(_, x)| cut(head, x.clone().inner())).collect();
        (values, cut(head, grad.clone().inner()))
    });
    let references = std::thread::scope(|scope| {
        let jobs = problems.each_ref().map(|(x, grad)| scope.spawn(move || exact(operator, x, grad, dk, dv)));
        jobs.map(|job| job.join().expect("a reference"))
    });
    for (head, exact) in heads.into_iter().zip(references) {
        let cut = |x: Tensor<4>| cut(head, x);
        errors[0] = errors[0].max(ratio(&cut(o.clone().inner()), &exact[0]));
        for (i, gradient) in gradients.iter().enumerate() {
            if let Some(gradient) = gradient {
                errors[1 + i] = errors[1 + i].max(ratio(&cut(gradient.clone()), &exact[1 + i]));
            }
        }
    }
    let names = ["o"].into_iter().chain(inputs.iter().map(|(name, _)| *name));
    let shown: Vec<String> = names.zip(&errors).map(|(name, e)| format!("{name} {e:.1e}")).collect();
    let bounds = [BOUND_O].into_iter().chain(inputs.iter().map(|(name, _)| match *name {
        "g" | "beta" => BOUND_GATE,
        _ => BOUND_INPUT,
    }));
    if errors.iter().zip(bounds).any(|(e, bound)| e.is_nan() || *e > bound) {
        println!("{operator} {b} {t} {h} {dk} {dv}: WRONG: {}", shown.join(", "));
        return false;
    }
    drop((o, grads, gradients));
    let forward_time = median(plain, || drop(forward()));
    let both_time = median(plain, || drop(both()));
    println!("{operator} {b} {t} {h} {dk} {dv} {:.3} {:.3} {}", forward_time * 1e3, both_time * 1e3, shown.join(", "));
    true
}

/// o and the gradients of the inputs of one head, by the recurrence of the general form.
fn exact(operator: &str, x: &[Vec<f64>], grad: &[f64], dk: usize, dv: usize) -> Vec<Vec<f64>> {
    let t = x[0].len() / dk;
    let (removal, gated) = (operator == "rwkv7", operator != "delta_rule");
    let across = x[3].len() / t;
    let (q, k) = (&x[0], &x[1]);
    let strength = |i: usize| if removal { 1.0 } else { x[4][i] };
    let a: Vec<f64> = if removal { &x[4] } else { k }.iter().map(|x| -x).collect();
    let b: Vec<f64> = (0..t * dk).map(|i| if removal { x[4][i] * x[5][i] } else { k[i] * strength(i / dk) }).collect();
    let v: Vec<f64> = (0..t * dv).map(|i| x[2][i] * strength(i / dv)).collect();
    let decay: Vec<f64> =
        (0..t * dk).map(|i| if gated { x[3][i / dk * across + i % dk % across].exp() } else { 1.0 }).collect();
    let scale = (dk as f64).powf(-0.5);
    // States before every 64th token, from which the states between are made again.
    const PIECE: usize = 64;
    let step = |s: &mut [f64], i: usize| -> Vec<f64> {
        let mut u = vec![0.0; dv];
        for r in 0..dk {
            let from = if removal { 1.0 } else { decay[i * dk + r] };
            (0..dv).for_each(|c| u[c] += a[i * dk + r] * from * s[r * dv + c]);
        }
        for r in 0..dk {
            let at = i * dk + r;
            (0..dv).for_each(|c| s[r * dv + c] = s[r * dv + c] * decay[at] + b[at] * u[c] + k[at] * v[i * dv + c]);
        }
        u
    };
    let mut state = vec![0.0; dk * dv];
    let (mut o, mut starts) = (vec![0.0; t * dv], Vec::new());
    for i in 0..t {
        if i % PIECE == 0 {
            starts.push(state.clone());
        }
        step(&mut state, i);
        for r in 0..dk {
            (0..dv).for_each(|c| o[i * dv + c] += scale * q[i * dk + r] * state[r * dv + c]);
        }
    }
    let zeros = |width: usize| vec![0.0; t * width];
    let (mut dq, mut dkey, mut da, mut db, mut dg) = (zeros(dk), zeros(dk), zeros(dk), zeros(dk), zeros(dk));
    let mut dvalue = zeros(dv);
    let mut z = vec![0.0; dk * dv];
    for (piece, start) in starts.iter().enumerate().rev() {
        let first = piece * PIECE;
        let mut states = vec![start.clone()];
        let mut answers = Vec::new();
        for i in first..t.min(first + PIECE) {
            let mut next = states[i - first].clone();
            answers.push(step(&mut next, i));
            states.push(next);
        }
        for i in (first..t.min(first + PIECE)).rev() {
            let (before, after, u) = (&states[i - first], &states[i - first + 1], &answers[i - first]);
            let mut du = vec![0.0; dv];
            for r in 0..dk {
                let at = i * dk + r;
                for c in 0..dv {
                    let (e, d) = (r * dv + c, grad[i * dv + c]);
                    z[e] += scale * q[at] * d;
                    dq[at] += scale * after[e] * d;
                    dkey[at] += z[e] * v[i * dv + c];
                    db[at] += z[e] * u[c];
                    dvalue[i * dv + c] += k[at] * z[e];
                    du[c] += b[at] * z[e];
                }
            }
            for r in 0..dk {
                let at = i * dk + r;
                for (c, du) in du.iter().enumerate() {
                    let (e, back) = (r * dv + c, a[at] * du);
                    let from = if removal { 1.0 } else { decay[at] };
                    da[at] += du * from * before[e];
                    let inner = if removal { z[e] } else { z[e] + back };
                    dg[at] += inner * decay[at] * before[e];
                    z[e] = decay[at] * inner + if removal { back } else { 0.0 };
                }
            }
        }
    }
    let summed = (0..t * across).map(|i| {
        let row = &dg[i / across * dk..(i / across + 1) * dk];
        row.iter().enumerate().filter(|(r, _)| r % across == i % across).map(|(_, x)| x).sum()
    });
    let dg: Vec<f64> = summed.collect();
    if removal {
        let removed = (0..t * dk).map(|i| x[5][i] * db[i] - da[i]).collect();
        let rate = (0..t * dk).map(|i| x[4][i] * db[i]).collect();
        return vec![o, dq, dkey, dvalue, dg, removed, rate];
    }
    let strengths: Vec<f64> = (0..t)
        .map(|i| {
            let values: f64 = (0..dv).map(|c| x[2][i * dv + c] * dvalue[i * dv + c]).sum();
            values + (0..dk).map(|r| k[i * dk + r] * db[i * dk + r]).sum::<f64>()
        })
        .collect();
    let dkey = (0..t * dk).map(|i| dkey[i] - da[i] + strength(i / dk) * db[i]).collect();
    let dvalue = (0..t * dv).map(|i| dvalue[i] * strength(i / dv)).collect();
    vec![o, dq, dkey, dvalue, dg, strengths]
}
