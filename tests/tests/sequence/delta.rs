//! The family of the delta rule.

#[path = "delta_problem.rs"]
mod problem;

use burn::tensor::{DType, Tensor};
use burn_fla_ops::{DecayGate, delta, gated_delta_product};
use burn_fla_tests::agree::{Input, assert_agree, assert_evaluations, assert_finite_differences, evaluate};
use burn_fla_tests::{assert_close, numbers, reference_device, tensor};

use self::problem::{OPS, Op, Problem, Views};
use super::flat;

/// The oracle itself, against sums and products written out.
#[test]
fn the_recurrence_is_the_equation() {
    let [b, t, h, dk, dv] = [1usize, 3, 1, 2, 2];
    let device = reference_device();
    let make = |seed: u64, width: usize| burn_fla_tests::uniform(seed, b * t * h * width, (-1.0, 1.0));
    let [q, k, p, g] = [1, 2, 3, 4].map(|seed| make(seed, dk));
    let (v, beta) = (make(5, dv), make(6, 1));
    let first = make(7, dk * dv)[..dk * dv].to_vec();
    let as4 = |x: &[f64], width: usize| tensor::<4>(x, [b, t, h, width], &device, DType::F64);
    for before in [false, true] {
        let (o, end) = delta::reference::recurrent(
            as4(&q, dk),
            as4(&k, dk),
            as4(&v, dv),
            before.then(|| as4(&p, dk)),
            Some(as4(&g, dk)),
            as4(&beta, 1),
            0.7,
            tensor(&first, [b, h, dk, dv], &device, DType::F64),
        );
        let mut s = first.clone();
        let mut expected = Vec::new();
        for i in 0..t {
            let decayed: Vec<f64> = (0..dk * dv).map(|at| g[i * dk + at / dv].exp() * s[at]).collect();
            let (reader, from) = if before { (&p, &s) } else { (&k, &decayed) };
            let rest: Vec<f64> = (0..dv)
                .map(|c| v[i * dv + c] - (0..dk).map(|r| from[r * dv + c] * reader[i * dk + r]).sum::<f64>())
                .collect();
            s = (0..dk * dv).map(|at| decayed[at] + beta[i] * k[i * dk + at / dv] * rest[at % dv]).collect();
            expected.extend((0..dv).map(|c| 0.7 * (0..dk).map(|r| s[r * dv + c] * q[i * dk + r]).sum::<f64>()));
        }
        assert_close("o", &numbers(o), &expected, 1e-15);
        assert_close("state", &numbers(end), &s, 1e-15);
    }
}

/// The gate inside is the gate written out before the operator, with its gradients.
#[test]
fn a_gate_makes_the_decays() {
    for op in OPS {
        let problem = Problem::new(op, 21);
        let mut inputs = problem.inputs();
        let views = |x: &[Tensor<1>]| problem.views(&x[..x.len() - 2]);
        let heads = problem.heads * problem.groups;
        let width = if op == Op::Kda { problem.keys } else { 1 };
        inputs.push(Input::new("a_log", &[heads], (-2.0, 2.0)));
        inputs.push(Input::new("bias", &[heads * width], (-2.0, 2.0)));
        let inside = |x: &[Tensor<1>]| {
            let [a_log, bias] = [2, 1].map(|i| x[x.len() - i].clone());
            problem.with_gate(&views(x), Some(DecayGate { a_log, bias: Some(bias) }))
        };
        if matches!(op, Op::Delta | Op::ProductUngated(_)) {
            let x: Vec<Tensor<1>> =
                inputs.iter().map(|x| tensor(&x.values, [x.values.len()], &reference_device(), DType::F64)).collect();
            let error = inside(&x).expect_err("nothing decays").to_string();
            assert!(error.contains("decay_gate"), "{error}");
            continue;
        }
        let written = |x: &[Tensor<1>]| {
            let [a_log, bias] = [2, 1].map(|i| x[x.len() - i].clone());
            let views = views(x);
            let step = (views.g.clone() + bias.reshape([1, 1, heads, width])).exp().add_scalar(1.0).log();
            let g = step * a_log.exp().neg().reshape([1, 1, heads, 1]);
            problem.public(&Views { g, ..views })
        };
        let both = |result: Result<(Tensor<4>, Tensor<4>), _>| {
            let (o, state) = result.expect("good inputs");
            vec![flat::<4>(o), flat::<4>(state)]
        };
        assert_agree(&format!("{op:?}"), &inputs, 1e-12, |x| both(inside(x)), |x| both(written(x)));
    }
}

#[test]
fn chunked_is_recurrent() {
    for op in OPS {
        for tokens in [1, 63, 64, 65, 131] {
            Problem::new(op, tokens).assert_chunked_is_recurrent(1e-12);
        }
    }
}

#[test]
fn chunked_is_recurrent_in_other_shapes() {
    for op in OPS {
        let base = Problem::new(op, 40);
        Problem { heads: 3, groups: 1, keys: 48, values: 100, batch: 1, ..base.clone() }
            .assert_chunked_is_recurrent(1e-12);
        Problem { keys: 100, values: 48, batch: 1, l2_norm: false, scale: Some(1.0), ..base.clone() }
            .assert_chunked_is_recurrent(1e-12);
        Problem { heads: 2, groups: 3, chunk: Some(12), keys: 1, values: 1, ..base.clone() }
            .assert_chunked_is_recurrent(1e-12);
        Problem { chunk: Some(1), tokens: 3, ..base }.assert_chunked_is_recurrent(1e-12);
    }
}

#[test]
fn extreme_decays_stay_exact() {
    for op in [Op::Gated, Op::Kda, Op::Comba, Op::Product(2)] {
        // No decay at all, and sums over a chunk far below what an exponential holds.
        for decay in [(0.0, 0.0), (-30.0, 0.0), (-300.0, 0.0)] {
            Problem { decay, ..Problem::new(op, 70) }.assert_chunked_is_recurrent(1e-12);
        }
    }
}

#[test]
fn a_decay_that_forgets_everything_has_no_gradient() {
    let device = reference_device();
    for op in [Op::Gated, Op::Kda, Op::Comba, Op::Product(2)] {
        let problem = Problem { decay: (-300.0, -200.0), ..Problem::new(op, 70) };
        let both = |(o, state)| vec![flat::<4>(o), flat::<4>(state)];
        let run = |public: bool| {
            let mut found = evaluate(&problem.inputs(), &device, DType::F64, |x| {
                let x = problem.views(x);
                both(if public { problem.public(&x).unwrap() } else { problem.oracle(&x) })
            });
            // The gradient of the decay is of order e^-200. The chunked form takes it as a difference of terms of order
            // 1, so that it is zero up to their rounding and no relative bound can hold.
            let largest = found.gradients[4].iter().fold(0.0, |a: f64, x| a.max(x.abs()));
            assert!(largest < 1e-13, "{op:?}: {largest}");
            found.gradients[4].clear();
            found
        };
        let (found, expected) = (run(true), run(false));
        assert_evaluations(&format!("{op:?}"), &problem.inputs(), 1e-12, &found, &expected);
    }
}

#[test]
fn packed_is_separate() {
    for op in OPS {
        let packed = Some(vec![0, 0, 1, 1, 34, 70, 70]);
        Problem { packed, batch: 1, ..Problem::new(op, 70) }.assert_chunked_is_recurrent(1e-12);
        Problem { packed: Some(vec![0, 1, 2]), batch: 1, ..Problem::new(op, 2) }.assert_chunked_is_recurrent(1e-12);
    }
}

#[test]
fn a_continued_sequence_is_the_whole() {
    for op in OPS {
        let problem = Problem::new(op, 70);
        let whole = |x: &[Tensor<1>]| {
            let (o, state) = problem.public(&problem.views(x)).unwrap();
            vec![flat(o), flat(state)]
        };
        let pieces = |x: &[Tensor<1>]| {
            let mut x = problem.views(x);
            let all = x.clone();
            let n = problem.steps();
            let mut outputs = Vec::new();
            // By chunks, by one token, and by what is left.
            for (start, length) in [(0, 33), (33, 1), (34, 36)] {
                let part = |x: &Tensor<4>, n: usize| x.clone().narrow(1, start * n, length * n);
                x.q = part(&all.q, 1);
                x.k = part(&all.k, n);
                x.v = part(&all.v, n);
                x.p = part(&all.p, 1);
                x.g = part(&all.g, 1);
                x.beta = all.beta.clone().narrow(1, start * n, length * n);
                let (o, state) = problem.public(&x).unwrap();
                outputs.push(o);
                x.state = state;
            }
            vec![flat(Tensor::cat(outputs, 1)), flat(x.state)]
        };
        assert_agree(&format!("{op:?} continued"), &problem.inputs(), 1e-12, whole, pieces);
    }
}

#[test]
fn without_a_token_the_state_is_kept() {
    for op in OPS {
        let problem = Problem::new(op, 0);
        let device = reference_device();
        let state = Input::new("state", &[2, 2, 5, 7], (-1.0, 1.0)).values;
        let width = if op == Op::Kda { 5 } else { 1 };
        let [q, k, p] = [0; 3].map(|_| Tensor::zeros([2, 0, 1, 5], &device));
        let x = Views {
            q,
            k,
            v: Tensor::zeros([2, 0, 2, 7], &device),
            p,
            g: Tensor::zeros([2, 0, 2, width], &device),
            beta: Tensor::zeros([2, 0, 2], &device),
            state: tensor(&state, [2, 2, 5, 7], &device, DType::F32),
        };
        let (o, end) = problem.public(&x).unwrap();
        assert_eq!(o.dims(), [2, 0, 2, 7], "{op:?}");
        assert_eq!(numbers(end), numbers(x.state), "{op:?}");
    }
}

#[test]
fn gradients_are_finite_differences() {
    for op in OPS {
        // The last one goes on in a second chunk.
        let problem = Problem { batch: 1, chunk: Some(4), ..Problem::new(op, 6) };
        // Central differences of step 1e-5 are off by 1e-10, and by what rounding leaves of 1e-16 over 1e-5.
        assert_finite_differences(&format!("{op:?}"), &problem.inputs(), 12, 1e-8, |x| {
            let (o, state) = problem.public(&problem.views(x)).unwrap();
            vec![flat(o), flat(state)]
        });
    }
}

/// What a number is after it has been stored in `dtype`.
fn rounded<const D: usize>(x: Tensor<D>, dtype: DType, wide: DType) -> Tensor<D> {
    let stored: Tensor<D> = x.cast(dtype);
    stored.cast(wide)
}

#[test]
fn f32_and_bf16_stay_near_f64() {
    let device = reference_device();
    for op in OPS {
        let problem = Problem { keys: 48, values: 32, ..Problem::new(op, 131) };
        let run = |dtype, bound, what: &str| {
            let wide = evaluate(&problem.inputs(), &device, DType::F64, |x| {
                // What bf16 makes of the operands, so that the arithmetic alone differs.
                let x: Vec<_> = x.iter().map(|x| rounded(x.clone().cast(DType::F32), dtype, DType::F64)).collect();
                let (o, state) = problem.oracle(&problem.views(&x));
                vec![flat(o), flat(state)]
            });
            let found = evaluate(&problem.inputs(), &device, DType::F32, |x| {
                let mut x = problem.views(x);
                for operand in [&mut x.q, &mut x.k, &mut x.v, &mut x.p] {
                    *operand = operand.clone().cast(dtype);
                }
                for wide in [&mut x.g, &mut x.state] {
                    *wide = rounded(wide.clone(), dtype, DType::F32);
                }
                x.beta = rounded(x.beta, dtype, DType::F32);
                let (o, state) = problem.public(&x).unwrap();
                assert_eq!((o.dtype(), state.dtype()), (dtype, DType::F32));
                vec![flat(o), flat(state)]
            });
            for (i, (a, b)) in found.outputs.iter().zip(&wide.outputs).enumerate() {
                // The output is rounded to bf16, the state is not.
                let bound = if i == 1 { 3e-6 } else { bound };
                assert_close(&format!("{op:?} in {what}, output {i}"), a, b, bound);
            }
            for (input, (a, b)) in problem.inputs().iter().zip(found.gradients.iter().zip(&wide.gradients)) {
                assert_close(&format!("{op:?} in {what}, gradient of {}", input.name), a, b, bound);
            }
        };
        run(DType::F32, 3e-6, "f32");
        // Half a unit in the last place of bf16 is 2e-3.
        run(DType::BF16, 3e-3, "bf16");
    }
}

/// Every key the same and β = 2: each token reflects the state, and the inverse within a chunk is a difference of numbers a
/// thousand times its size.
#[test]
fn equal_keys_and_full_reflections_stay_near_f64() {
    let device = reference_device();
    for op in [Op::Delta, Op::Gated, Op::Kda] {
        let problem = Problem { keys: 16, values: 16, decay: (-1e-3, 0.0), ..Problem::new(op, 200) };
        let inputs = problem.inputs();
        let run = |dtype, oracle: bool| {
            evaluate(&inputs, &device, dtype, |x| {
                let mut x = problem.views(x);
                let dims = x.k.dims();
                x.k = x.k.narrow(1, 0, 1).expand(dims);
                x.beta = x.beta.clone() * 0.0 + 2.0;
                let (o, state) = if oracle { problem.oracle(&x) } else { problem.public(&x).unwrap() };
                vec![flat(o), flat(state)]
            })
        };
        let (found, exact) = (run(DType::F32, false), run(DType::F64, true));
        for (i, (a, b)) in found.outputs.iter().zip(&exact.outputs).enumerate() {
            // Rounding is reflected on and on, and never fades: 1.2e-5 after 200 tokens.
            assert_close(&format!("{op:?}, output {i}"), a, b, 2e-5);
        }
    }
}

#[test]
fn wrong_arguments_are_named() {
    let device = reference_device();
    let problem = Problem::new(Op::Kda, 4);
    let views = || {
        let inputs = problem.inputs();
        let x: Vec<Tensor<1>> =
            inputs.iter().map(|i| tensor(&i.values, [i.values.len()], &device, DType::F32)).collect();
        problem.views(&x)
    };
    let message = |change: &dyn Fn(&mut Views)| {
        let mut x = views();
        change(&mut x);
        problem.public(&x).unwrap_err().to_string()
    };
    let says = |message: String, words: &[&str]| {
        for word in words {
            assert!(message.contains(word), "{message}");
        }
    };
    says(message(&|x| x.k = x.k.clone().narrow(1, 0, 3)), &["kda", "`k`", "[2, 4, 1, 5]"]);
    says(message(&|x| x.v = x.v.clone().cast(DType::BF16)), &["`v`", "F32"]);
    says(message(&|x| x.v = Tensor::zeros([2, 4, 2, 0], &x.v.device())), &["`v`", "at least one"]);
    says(message(&|x| x.g = x.g.clone().narrow(3, 0, 1)), &["`log_decay`", "HV, K"]);
    says(message(&|x| x.beta = x.beta.clone().narrow(2, 0, 1)), &["`beta`", "HV"]);
    says(message(&|x| x.state = x.state.clone().narrow(0, 0, 1)), &["`initial_state`", "[2, 2, 5, 7]"]);
    says(message(&|x| x.q = x.q.clone().repeat_dim(2, 3)), &["`v`", "multiple of the 3"]);
    let of = |problem: Problem| problem.public(&views()).unwrap_err().to_string();
    says(of(Problem { chunk: Some(0), ..problem.clone() }), &["chunk", "at least one token"]);
    says(of(Problem { packed: Some(vec![0, 4]), ..problem.clone() }), &["batch of 1"]);

    let x = views();
    let product =
        |n| gated_delta_product(x.q.clone(), x.k.clone(), x.v.clone(), None, x.beta.clone(), n, Default::default());
    says(product(0).unwrap_err().to_string(), &["gated_delta_product", "`n`", "at least one step"]);
    says(product(2).unwrap_err().to_string(), &["`k`", "n·T"]);
}
