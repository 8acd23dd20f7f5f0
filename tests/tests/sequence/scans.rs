//! The scans along time that work on every channel by itself: `hgrn`, `logcumsumexp`, `running_softmax`.

use burn::tensor::{DType, Tensor};
use burn_fla_ops::hgrn::reference as hgrn_reference;
use burn_fla_ops::logcumsumexp::reference as logcumsumexp_reference;
use burn_fla_ops::running_softmax::reference as running_softmax_reference;
use burn_fla_ops::{CuSeqlens, OpError, ScanOptions, hgrn, logcumsumexp, running_softmax};
use burn_fla_tests::agree::{Input, assert_agree, assert_finite_differences, evaluate};
use burn_fla_tests::{assert_close, numbers, reference_device, tensor};

use super::{flat, view};

/// Double steps against token by token, in f64: the rounding of sums in another order.
const BOUND: f64 = 1e-13;

/// Inputs `[B, T, D]`, to outputs of that shape and the last state `[N, D]`.
type Outputs = (Vec<Tensor<3>>, Tensor<2>);

/// One of the operators, in both forms, with the ranges of its inputs and of its state.
#[derive(Clone, Copy)]
struct Scan {
    name: &'static str,
    inputs: &'static [(&'static str, (f64, f64))],
    nothing: f64,
    run: fn(&[Tensor<3>], ScanOptions) -> Outputs,
    recurrent: fn(&[Tensor<3>], Tensor<2>) -> Outputs,
}

const SCANS: [Scan; 3] = [
    Scan {
        name: "hgrn",
        inputs: &[("x", (-1.0, 1.0)), ("log_decay", (-0.5, 0.0))],
        nothing: 0.0,
        run: |x, options| {
            let (h, end) = hgrn(x[0].clone(), x[1].clone(), options).unwrap();
            (vec![h], end)
        },
        recurrent: |x, state| {
            let (h, end) = hgrn_reference::recurrent(x[0].clone(), x[1].clone(), state);
            (vec![h], end)
        },
    },
    Scan {
        name: "logcumsumexp",
        inputs: &[("x", (-4.0, 4.0))],
        nothing: f64::NEG_INFINITY,
        run: |x, options| {
            let (z, end) = logcumsumexp(x[0].clone(), options).unwrap();
            (vec![z], end)
        },
        recurrent: |x, state| {
            let (z, end) = logcumsumexp_reference::recurrent(x[0].clone(), state);
            (vec![z], end)
        },
    },
    Scan {
        name: "running_softmax",
        inputs: &[("scores", (-4.0, 4.0))],
        nothing: f64::NEG_INFINITY,
        run: |x, options| {
            let (weights, log_decay, end) = running_softmax(x[0].clone(), options).unwrap();
            (vec![weights, log_decay], end)
        },
        recurrent: |x, state| {
            let (weights, log_decay, end) = running_softmax_reference::recurrent(x[0].clone(), state);
            (vec![weights, log_decay], end)
        },
    },
];

impl Scan {
    /// Random inputs, and then the state.
    fn draw(&self, [b, t, d]: [usize; 3], sequences: usize) -> Vec<Input> {
        let mut inputs: Vec<Input> =
            self.inputs.iter().map(|(name, range)| Input::new(name, &[b, t, d], *range)).collect();
        inputs.push(Input::new("state", &[sequences, d], (-1.0, 1.0)));
        inputs
    }

    /// The inputs of a flat list, and the state.
    fn split(&self, x: &[Tensor<1>], shape: [usize; 3], sequences: usize) -> (Vec<Tensor<3>>, Tensor<2>) {
        let (inputs, state) = x.split_at(self.inputs.len());
        (inputs.iter().map(|x| view(x, shape)).collect(), view(&state[0], [sequences, shape[2]]))
    }
}

fn options(state: Option<Tensor<2>>, offsets: Option<&[usize]>) -> ScanOptions {
    let cu_seqlens = offsets.map(|offsets| CuSeqlens::new(offsets.to_vec()).unwrap());
    ScanOptions { initial_state: state, cu_seqlens, ..Default::default() }
}

/// The state of a sequence without tokens may be −∞, which cannot be subtracted from itself: it becomes a number.
fn flatten((outputs, end): Outputs) -> Vec<Tensor<1>> {
    let nothing = end.clone().equal_elem(f64::NEG_INFINITY);
    outputs.into_iter().map(flat).chain([flat(end.mask_fill(nothing, 1e9))]).collect()
}

fn tokens(x: &[Tensor<3>], start: usize, length: usize) -> Vec<Tensor<3>> {
    x.iter().map(|x| x.clone().narrow(1, start, length)).collect()
}

/// The outputs of consecutive pieces as those of the whole.
fn join(pieces: Vec<Vec<Tensor<3>>>) -> Vec<Tensor<3>> {
    let count = pieces[0].len();
    (0..count).map(|i| Tensor::cat(pieces.iter().map(|piece| piece[i].clone()).collect(), 1)).collect()
}

#[test]
fn double_steps_equal_token_by_token() {
    for scan in SCANS {
        for t in [1, 2, 63, 64, 65, 131] {
            let shape = [2, t, 5];
            let what = format!("{}, {t} tokens", scan.name);
            let inputs = scan.draw(shape, 2);
            assert_agree(
                &what,
                &inputs,
                BOUND,
                |x| {
                    let (x, state) = scan.split(x, shape, 2);
                    flatten((scan.run)(&x, options(Some(state), None)))
                },
                |x| {
                    let (x, state) = scan.split(x, shape, 2);
                    flatten((scan.recurrent)(&x, state))
                },
            );
            if (scan.name, t) == ("hgrn", 1) {
                // Nothing is there to decay, so the decay has no gradient to compare.
                continue;
            }
            let nothing = |x: &[Tensor<3>]| Tensor::full([2, 5], scan.nothing, (&x[0].device(), x[0].dtype()));
            assert_agree(
                &format!("{what}, no state"),
                &inputs[..scan.inputs.len()],
                BOUND,
                |x| {
                    let x: Vec<_> = x.iter().map(|x| view(x, shape)).collect();
                    flatten((scan.run)(&x, options(None, None)))
                },
                |x| {
                    let x: Vec<_> = x.iter().map(|x| view(x, shape)).collect();
                    let state = nothing(&x);
                    flatten((scan.recurrent)(&x, state))
                },
            );
        }
    }
}

#[test]
fn packed_equals_separate() {
    let offsets = [0, 7, 7, 8, 40, 40];
    let shape = [1, 40, 3];
    let n = offsets.len() - 1;
    for scan in SCANS {
        for with_state in [true, false] {
            assert_agree(
                &format!("{}, packed, state {with_state}", scan.name),
                &scan.draw(shape, n),
                BOUND,
                |x| {
                    let (x, state) = scan.split(x, shape, n);
                    flatten((scan.run)(&x, options(with_state.then_some(state), Some(&offsets))))
                },
                |x| {
                    let (x, state) = scan.split(x, shape, n);
                    let nothing = state.clone().zeros_like().add_scalar(scan.nothing);
                    let state = if with_state { state } else { nothing };
                    let (mut outputs, mut ends) = (Vec::new(), Vec::new());
                    for (i, window) in offsets.windows(2).enumerate() {
                        let before = state.clone().narrow(0, i, 1);
                        if window[0] == window[1] {
                            ends.push(before);
                            continue;
                        }
                        let piece = tokens(&x, window[0], window[1] - window[0]);
                        let (output, end) = (scan.run)(&piece, options(Some(before), None));
                        outputs.push(output);
                        ends.push(end);
                    }
                    flatten((join(outputs), Tensor::cat(ends, 0)))
                },
            );
        }
    }
}

#[test]
fn a_continued_run_equals_the_whole() {
    let shape = [2, 23, 3];
    for scan in SCANS {
        let inputs = scan.draw(shape, 2);
        let inputs = &inputs[..scan.inputs.len()];
        assert_agree(
            &format!("{}, continued", scan.name),
            inputs,
            BOUND,
            |x| {
                let x: Vec<_> = x.iter().map(|x| view(x, shape)).collect();
                flatten((scan.run)(&x, options(None, None)))
            },
            |x| {
                let x: Vec<_> = x.iter().map(|x| view(x, shape)).collect();
                let (mut state, mut outputs, mut at) = (None, Vec::new(), 0);
                for length in [9, 1, 13] {
                    let (output, end) = (scan.run)(&tokens(&x, at, length), options(state, None));
                    outputs.push(output);
                    (state, at) = (Some(end), at + length);
                }
                flatten((join(outputs), state.unwrap()))
            },
        );
    }
}

#[test]
fn no_tokens_leave_the_state() {
    let device = reference_device();
    for scan in SCANS {
        let x: Vec<Tensor<3>> = scan.inputs.iter().map(|_| Tensor::zeros([2, 0, 3], &device)).collect();
        let state = tensor(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &device, DType::F32);
        let (outputs, end) = (scan.run)(&x, options(Some(state.clone()), None));
        assert!(outputs.iter().all(|x| x.dims() == [2, 0, 3]), "{}", scan.name);
        assert_eq!(numbers(end), numbers(state), "{}", scan.name);
        let (_, end) = (scan.run)(&x, options(None, None));
        assert_eq!(numbers(end), [scan.nothing; 6], "{}", scan.name);
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let shape = [1, 6, 3];
    for scan in SCANS {
        assert_finite_differences(scan.name, &scan.draw(shape, 1), 9, 1e-8, |x| {
            let (x, state) = scan.split(x, shape, 1);
            flatten((scan.run)(&x, options(Some(state), None)))
        });
    }
}

/// Decays that leave nothing or all, and a decay of −∞, which is a restart.
#[test]
fn extreme_decays_of_hgrn() {
    let scan = SCANS[0];
    let shape = [1, 70, 4];
    for range in [(-1000.0, 0.0), (-1000.0, -900.0), (0.0, 0.0), (-1e-8, 0.0)] {
        let mut inputs = scan.draw(shape, 1);
        inputs[1] = Input::new("log_decay", &shape, range);
        for i in (0..70).step_by(9) {
            inputs[1].values[i * 4] = f64::NEG_INFINITY;
        }
        assert_agree(
            &format!("hgrn, log decays {range:?}"),
            &inputs,
            BOUND,
            |x| {
                let (x, state) = scan.split(x, shape, 1);
                flatten((scan.run)(&x, options(Some(state), None)))
            },
            |x| {
                let (x, state) = scan.split(x, shape, 1);
                flatten((scan.recurrent)(&x, state))
            },
        );
    }
}

/// A running softmax gives the weights `softmax_{j ≤ t}(s)_j`, here written out: `Σ_j w_j e^{Σ_{(j, t]} g} v_j`.
#[test]
fn a_running_softmax_is_a_softmax_over_the_tokens_so_far() {
    let shape = [1, 9, 2];
    let [_, t, d] = shape;
    let inputs = [Input::new("scores", &shape, (-4.0, 4.0)), Input::new("v", &shape, (-1.0, 1.0))];
    assert_agree(
        "mean of v",
        &inputs,
        BOUND,
        |x| {
            let (weights, log_decay, _) = running_softmax(view(&x[0], shape), options(None, None)).unwrap();
            let (mean, _) = hgrn(weights * view(&x[1], shape), log_decay, options(None, None)).unwrap();
            vec![flat(mean)]
        },
        |x| {
            let (scores, v) = (view(&x[0], shape), view(&x[1], shape));
            let rows = (1..=t).map(|n| {
                let weights = scores.clone().narrow(1, 0, n).exp();
                let total = weights.clone().sum_dim(1);
                ((weights * v.clone().narrow(1, 0, n)).sum_dim(1) / total).reshape([1, 1, d])
            });
            vec![flat(Tensor::cat(rows.collect(), 1))]
        },
    );
}

/// In f32, nothing overflows and no gradient is lost, whatever the inputs: up to ±10³⁷ in one channel.
#[test]
fn logcumsumexp_of_extreme_inputs() {
    let values = [-1e37, -1e37, 50.0, -1e30, 90.0, 1e37, -1e37, 1e37];
    let inputs = [Input { name: "x", values: values.to_vec() }];
    let found = evaluate(&inputs, &reference_device(), DType::F32, |x| {
        let (z, end) = logcumsumexp(view(&x[0], [1, 8, 1]), options(None, None)).unwrap();
        vec![flat(z), flat(end)]
    });
    // ln 2 vanishes beside 10³⁷.
    let z = [-1e37, -1e37, 50.0, 50.0, 90.0, 1e37, 1e37, 1e37].map(|z: f64| f64::from(z as f32));
    assert_eq!(found.outputs[0], z);
    assert!(found.gradients[0].iter().all(|g| g.is_finite()), "{:?}", found.gradients[0]);
    // Equal inputs share their gradient.
    let (weights, log_decay, _) =
        running_softmax(tensor(&values, [1, 8, 1], &reference_device(), DType::F32), options(None, None)).unwrap();
    assert_close("weights", &numbers(weights), &[1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0], 1e-7);
    assert!(numbers(log_decay).iter().all(|g| *g <= 0.0 && !g.is_nan()));
}

/// f32 against f64 where the inputs are far from zero: the digits that sums of that size have, and no fewer.
#[test]
fn f32_keeps_its_digits() {
    let shape = [1, 500, 4];
    for scan in SCANS {
        let mut inputs = scan.draw(shape, 1);
        if scan.name != "hgrn" {
            inputs[0] = Input::new("scores", &shape, (-30.0, 30.0));
        }
        let run = |dtype| {
            evaluate(&inputs, &reference_device(), dtype, |x| {
                let (x, state) = scan.split(x, shape, 1);
                flatten((scan.run)(&x, options(Some(state), None)))
            })
        };
        let (single, double) = (run(DType::F32), run(DType::F64));
        for (i, (a, b)) in single.outputs.iter().zip(&double.outputs).enumerate() {
            // An exponent of 60 is known to 60 · 2⁻²⁴.
            assert_close(&format!("{}, output {i}", scan.name), a, b, 2e-6);
        }
        for (input, (a, b)) in inputs.iter().zip(single.gradients.iter().zip(&double.gradients)) {
            assert_close(&format!("{}, gradient of {}", scan.name, input.name), a, b, 5e-6);
        }
    }
}

/// bf16 inputs are computed in f32: the only loss is the rounding of the outputs.
#[test]
fn bf16_is_computed_in_f32() {
    let shape = [1, 40, 4];
    let device = reference_device();
    for scan in SCANS {
        let inputs: Vec<Tensor<3>> = scan
            .draw(shape, 1)
            .iter()
            .take(scan.inputs.len())
            .map(|i| tensor(&i.values, shape, &device, DType::BF16))
            .collect();
        let wide: Vec<Tensor<3>> = inputs.iter().map(|x| x.clone().cast(DType::F32)).collect();
        let (outputs, end) = (scan.run)(&inputs, options(None, None));
        let (exact, exact_end) = (scan.run)(&wide, options(None, None));
        assert_eq!(end.dtype(), DType::F32, "{}: the state", scan.name);
        assert_eq!(numbers(end), numbers(exact_end), "{}: the state", scan.name);
        for (found, exact) in outputs.into_iter().zip(exact) {
            let rounded = exact.cast(found.dtype());
            assert_eq!(numbers(found), numbers(rounded), "{}: the outputs, rounded once", scan.name);
        }
    }
}

#[test]
fn wrong_arguments_are_named() {
    let device = reference_device();
    let x = || Tensor::<3>::zeros([2, 3, 4], &device);
    let message = |error: OpError| error.to_string();
    let error = message(hgrn(x(), Tensor::zeros([2, 3, 5], &device), options(None, None)).unwrap_err());
    assert!(error.contains("`log_decay`") && error.contains("[2, 3, 4]"), "{error}");
    let error = message(logcumsumexp(x(), options(Some(Tensor::zeros([1, 4], &device)), None)).unwrap_err());
    assert!(error.contains("`initial_state`") && error.contains("[2, 4]"), "{error}");
    let error = message(running_softmax(x(), options(None, Some(&[0, 6]))).unwrap_err());
    assert!(error.contains("batch of 1"), "{error}");
    let error = message(hgrn(Tensor::zeros([1, 3, 0], &device), x(), options(None, None)).unwrap_err());
    assert!(error.contains("at least one row and channel"), "{error}");
    let half = Tensor::<3>::zeros([2, 3, 4], (&device, DType::F16));
    assert!(matches!(logcumsumexp(half, options(None, None)), Err(OpError::DType { argument: "x", .. })));
}
