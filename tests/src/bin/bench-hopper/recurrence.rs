//! Retention, simple_gla and gla, forward and backward, in value against the recurrence in f64 over the same bf16 inputs.

use burn::backend::DispatchTensor;
use burn::tensor::{DType, Device, Distribution, Shape, Tensor};
use burn_fla_ops::bridge::{CubeTensor, Operator, TensorSpec, alloc, apply};
use burn_fla_ops::{Engine, ScalarDecay, SequenceOptions, gla, simple_gla};
use burn_fla_tests::{numbers, ratio};

use super::median;

const NAMES: [&str; 5] = ["o", "dq", "dk", "dv", "dg"];
const BOUNDS: [f64; 5] = [5e-3, 8e-3, 8e-3, 8e-3, 2e-2];

/// The end of a graph: backward through it hands given gradients on, without a kernel. Its inputs are outputs, then their
/// gradients.
#[derive(Debug)]
pub(super) struct Seed;

impl Operator for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn outputs(&self, _inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![TensorSpec::new(Shape::from([1]), DType::F32)]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _ints: Vec<CubeTensor>, _save: bool) -> Vec<CubeTensor> {
        vec![alloc(&inputs[0], [1], DType::F32)]
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        _ints: Vec<CubeTensor>,
        _saved: Vec<CubeTensor>,
        _grads: Vec<Option<CubeTensor>>,
        _wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let grads = &inputs[inputs.len() / 2..];
        grads.iter().chain(grads).cloned().map(Some).collect()
    }
}

pub(super) fn run(device: &Device, operator: &str, shapes: &[Vec<usize>]) -> bool {
    println!("operator B T H K V forward_ms both_ms peak_GiB errors: o dq dk dv dg");
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
    let random = |shape: [usize; 4]| -> Tensor<4> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), (&device, DType::BF16)).require_grad()
    };
    let (q, k, v) = (random([b, t, h, dk]), random([b, t, h, dk]), random([b, t, h, dv]));
    let grad: Tensor<4> = random([b, t, h, dv]).detach();
    // Log decays are log σ(x) of normal numbers, bf16 where they are by key; those of retention are 1 − 2^{−5 − h}.
    let (by_key, by_head) = (operator.starts_with("gla"), operator.starts_with("retention"));
    let engine = if operator.ends_with(":mma") { Engine::Mma } else { Engine::Auto };
    let dtype = if by_key { DType::BF16 } else { DType::F32 };
    let across = if by_key { dk } else { 1 };
    let x: Tensor<4> = Tensor::random([b, t, h, across], Distribution::Normal(0.0, 1.0), (&device, DType::F32));
    let g = burn::tensor::activation::log_sigmoid(x).cast(dtype).detach().require_grad();
    let decays: Vec<f32> = (0..h).map(|head| (1.0 - (-5.0 - head as f32).exp2()).ln()).collect();
    let decays = Tensor::<1>::from_data(decays.as_slice(), (&device, DType::F32));
    let as_tokens = || decays.clone().inner().reshape([1, 1, h, 1]).expand([b, t, h, 1]);

    let forward = || {
        let (q, k, v, options) = (q.clone(), k.clone(), v.clone(), SequenceOptions { engine, ..Default::default() });
        let result = match (by_key, by_head) {
            (true, _) => gla(q, k, v, g.clone(), options),
            (_, true) => simple_gla(q, k, v, ScalarDecay::PerHead(decays.clone()), options),
            _ => simple_gla(q, k, v, ScalarDecay::PerToken(g.clone().reshape([b, t, h])), options),
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
    let of = |x: &Tensor<4>| x.grad(&grads).expect("a gradient");
    let found = [o.clone().inner(), of(&q), of(&k), of(&v)];
    let dg = g.grad(&grads);
    assert_eq!(dg.is_none(), by_head, "a constant decay has no gradient, any other has one");
    let mut errors = [0.0f64; 5];
    for head in [0, b * h / 2, b * h - 1] {
        let (row, head) = (head / h, head % h);
        let cut = |x: &Tensor<4>| numbers(x.clone().inner().narrow(0, row, 1).narrow(2, head, 1));
        let cut_plain = |x: &Tensor<4>| numbers(x.clone().narrow(0, row, 1).narrow(2, head, 1));
        let gates = |x: Tensor<4>| numbers(x.narrow(0, row, 1).narrow(2, head, 1));
        let [q, k, v, grad] = [&q, &k, &v, &grad].map(cut);
        let g = gates(if by_head { as_tokens() } else { g.clone().inner() });
        let scale = (dk as f64).powf(-0.5);
        let pass = Pass { q: &q, k: &k, v: &v, grad: &grad, g: &g, keys: dk, values: dv, scale };
        let exact = pass.run();
        for (i, x) in found.iter().enumerate() {
            errors[i] = errors[i].max(ratio(&cut_plain(x), &exact[i]));
        }
        if let Some(dg) = &dg {
            errors[4] = errors[4].max(ratio(&gates(dg.clone()), &exact[4]));
        }
    }
    drop((o, grads, found, dg));
    let shown: Vec<String> = errors.iter().map(|e| format!("{e:.1e}")).collect();
    if let Some(i) = (0..5).find(|i| errors[*i].is_nan() || errors[*i] > BOUNDS[*i]) {
        println!("{operator} {b} {t} {h} {dk} {dv}: WRONG in {}: {}", NAMES[i], shown.join(" "));
        return false;
    }
    let forward_time = median(plain, || drop(forward()));
    let both_time = median(plain, || drop(both()));
    let peak = plain.memory_pool_usage().map_or(f64::NAN, |usage| usage.bytes_reserved as f64 / (1u64 << 30) as f64);
    println!(
        "{operator} {b} {t} {h} {dk} {dv} {:.3} {:.3} {peak:.2} {}",
        forward_time * 1e3,
        both_time * 1e3,
        shown.join(" ")
    );
    true
}

/// One head of gated linear attention; `g` has one number a token, or one a token and key.
pub(super) struct Pass<'a> {
    pub(super) q: &'a [f64],
    pub(super) k: &'a [f64],
    pub(super) v: &'a [f64],
    pub(super) grad: &'a [f64],
    pub(super) g: &'a [f64],
    pub(super) keys: usize,
    pub(super) values: usize,
    pub(super) scale: f64,
}

impl Pass<'_> {
    /// o, dq, dk, dv, dg by the recurrence.
    pub(super) fn run(&self) -> [Vec<f64>; 5] {
        let &Self { q, k, v, grad, g, keys: dk, values: dv, scale } = self;
        let t = q.len() / dk;
        let across = g.len() / t;
        let decay_at = |i: usize, a: usize| g[i * across + a % across].exp();
        let mut state = vec![0.0; dk * dv];
        let (mut o, mut dq) = (vec![0.0; t * dv], vec![0.0; t * dk]);
        for i in 0..t {
            for a in 0..dk {
                let decay = decay_at(i, a);
                let (ka, qa) = (k[i * dk + a], q[i * dk + a] * scale);
                let mut sum = 0.0;
                for c in 0..dv {
                    let s = &mut state[a * dv + c];
                    *s = *s * decay + ka * v[i * dv + c];
                    o[i * dv + c] += qa * *s;
                    sum += grad[i * dv + c] * *s;
                }
                dq[i * dk + a] = sum * scale;
            }
        }
        let mut state = vec![0.0; dk * dv];
        let (mut dkey, mut dvalue) = (vec![0.0; t * dk], vec![0.0; t * dv]);
        for i in (0..t).rev() {
            for a in 0..dk {
                let decay = if i + 1 < t { decay_at(i + 1, a) } else { 1.0 };
                let (ka, qa) = (k[i * dk + a], q[i * dk + a] * scale);
                let mut sum = 0.0;
                for c in 0..dv {
                    let z = &mut state[a * dv + c];
                    *z = *z * decay + qa * grad[i * dv + c];
                    dvalue[i * dv + c] += ka * *z;
                    sum += v[i * dv + c] * *z;
                }
                dkey[i * dk + a] = sum;
            }
        }
        let mut dg = vec![0.0; t * across];
        let mut sums = vec![0.0; across];
        for i in (0..t).rev() {
            for a in 0..dk {
                let at = i * dk + a;
                sums[a % across] += q[at] * dq[at] - k[at] * dkey[at];
            }
            dg[i * across..(i + 1) * across].copy_from_slice(&sums);
        }
        [o, dq, dkey, dvalue, dg]
    }
}
