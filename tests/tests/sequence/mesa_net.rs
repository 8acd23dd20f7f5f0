//! MesaNet: its token recurrence against plain arithmetic, its chunked form against the recurrence.

use burn::tensor::{DType, Tensor};
use burn_fla_ops::mesa_net::reference::{Inputs, recurrent};
use burn_fla_ops::{CuSeqlens, MesaOptions, MesaState, OpError, mesa_net};
use burn_fla_tests::agree::{Input, assert_agree, assert_finite_differences, evaluate};
use burn_fla_tests::{assert_close, numbers, reference_device, tensor, uniform};

use crate::{flat, view};

/// A problem; its inputs are, in this order, q, k, v, log decay, β, λ and the two parts of the initial state.
#[derive(Clone, Debug)]
struct Problem {
    batch: usize,
    tokens: usize,
    heads: usize,
    keys: usize,
    values: usize,
    decay: (f64, f64),
    packed: Option<Vec<usize>>,
    iterations: Option<usize>,
    chunk: Option<usize>,
    l2_norm: bool,
}

/// The tensors of a call.
#[derive(Clone)]
struct Call {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    g: Tensor<3>,
    beta: Tensor<3>,
    lambda: Tensor<2>,
    state: MesaState,
}

impl Problem {
    fn new(tokens: usize) -> Self {
        Self {
            batch: 2,
            tokens,
            heads: 2,
            keys: 5,
            values: 7,
            decay: (-0.5, 0.0),
            packed: None,
            iterations: None,
            chunk: None,
            l2_norm: true,
        }
    }

    fn sequences(&self) -> usize {
        self.packed.as_ref().map_or(self.batch, |offsets| offsets.len() - 1)
    }

    fn inputs(&self) -> Vec<Input> {
        let Self { batch: b, tokens: t, heads: h, keys, values, .. } = *self;
        let n = self.sequences();
        // A sum of squares of rows, as a state is: symmetric, with no negative eigenvalue.
        let mut kk = Input::new("state of keys", &[n, h, keys, keys], (-1.0, 1.0));
        for square in kk.values.chunks_mut(keys * keys) {
            let rows = square.to_vec();
            for (at, entry) in square.iter_mut().enumerate() {
                let (i, j) = (at / keys, at % keys);
                *entry = (0..keys).map(|row| rows[row * keys + i] * rows[row * keys + j]).sum();
            }
        }
        vec![
            Input::new("q", &[b, t, h, keys], (-1.0, 1.0)),
            Input::new("k", &[b, t, h, keys], (-1.0, 1.0)),
            Input::new("v", &[b, t, h, values], (-1.0, 1.0)),
            Input::new("g", &[b, t, h], self.decay),
            Input::new("beta", &[b, t, h], (0.0, 1.0)),
            Input::new("lambda", &[h, keys], (0.25, 2.0)),
            kk,
            Input::new("state of values", &[n, h, keys, values], (-1.0, 1.0)),
        ]
    }

    fn read(&self, x: &[Tensor<1>]) -> Call {
        let Self { batch: b, tokens: t, heads: h, keys, values, .. } = *self;
        let n = self.sequences();
        let kk: Tensor<4> = view(&x[6], [n, h, keys, keys]);
        Call {
            q: view(&x[0], [b, t, h, keys]),
            k: view(&x[1], [b, t, h, keys]),
            v: view(&x[2], [b, t, h, values]),
            g: view(&x[3], [b, t, h]),
            beta: view(&x[4], [b, t, h]),
            lambda: view(&x[5], [h, keys]),
            // Finite differences change one side of a pair: the operator takes the matrix to be symmetric.
            state: MesaState {
                keys: (kk.clone() + kk.swap_dims(2, 3)) * 0.5,
                values: view(&x[7], [n, h, keys, values]),
            },
        }
    }

    fn run(&self, call: Call) -> Result<(Tensor<4>, MesaState), OpError> {
        let Call { q, k, v, g, beta, lambda, state } = call;
        let options = MesaOptions {
            initial_state: Some(state),
            cu_seqlens: self.packed.clone().map(|offsets| CuSeqlens::new(offsets).unwrap()),
            iterations: self.iterations,
            l2_norm: self.l2_norm,
            chunk: self.chunk,
            ..Default::default()
        };
        mesa_net(q, k, v, g, beta, lambda, options)
    }

    /// By the token recurrence, one sequence at a time.
    fn oracle(&self, call: Call) -> (Tensor<4>, MesaState) {
        let norm = |x: Tensor<4>| {
            if self.l2_norm { x.clone() / (x.powi_scalar(2).sum_dim(3) + 1e-6).sqrt() } else { x }
        };
        let steps = self.iterations.unwrap_or(30);
        let run = |call: Call| {
            let inputs = Inputs {
                q: norm(call.q),
                k: norm(call.k),
                v: call.v,
                log_decay: call.g.unsqueeze_dim(3),
                beta: call.beta.unsqueeze_dim(3),
                lambda: call.lambda,
            };
            recurrent(inputs, steps, call.state)
        };
        let Some(offsets) = &self.packed else { return run(call) };
        let results: Vec<_> = offsets
            .windows(2)
            .enumerate()
            .map(|(i, pair)| {
                let state = MesaState {
                    keys: call.state.keys.clone().narrow(0, i, 1),
                    values: call.state.values.clone().narrow(0, i, 1),
                };
                match pair[1] - pair[0] {
                    0 => (None, state),
                    length => {
                        let (o, state) = run(Call { state, ..call.tokens(pair[0], length) });
                        (Some(o), state)
                    }
                }
            })
            .collect();
        let rows =
            |part: &dyn Fn(&MesaState) -> Tensor<4>| Tensor::cat(results.iter().map(|r| part(&r.1)).collect(), 0);
        let state = MesaState { keys: rows(&|s| s.keys.clone()), values: rows(&|s| s.values.clone()) };
        (Tensor::cat(results.iter().filter_map(|r| r.0.clone()).collect(), 1), state)
    }

    fn assert_chunked_is_recurrent(&self, bound: f64) {
        assert_agree(
            &format!("{self:?}"),
            &self.inputs(),
            bound,
            |x| all(self.run(self.read(x)).unwrap()),
            |x| all(self.oracle(self.read(x))),
        );
    }
}

impl Call {
    fn tokens(&self, start: usize, length: usize) -> Self {
        Self {
            q: self.q.clone().narrow(1, start, length),
            k: self.k.clone().narrow(1, start, length),
            v: self.v.clone().narrow(1, start, length),
            g: self.g.clone().narrow(1, start, length),
            beta: self.beta.clone().narrow(1, start, length),
            ..self.clone()
        }
    }
}

fn all((o, state): (Tensor<4>, MesaState)) -> Vec<Tensor<1>> {
    vec![flat(o), flat(state.keys), flat(state.values)]
}

/// (H + Λ)⁻¹ q by the steps of the format, in plain arithmetic.
fn steps(h: &[f64], lambda: &[f64], q: &[f64], iterations: usize) -> Vec<f64> {
    let n = q.len();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let (mut x, mut r, mut p) = (vec![0.0; n], q.to_vec(), q.to_vec());
    let mut delta = dot(&r, &r);
    for _ in 0..iterations {
        let y: Vec<f64> = (0..n).map(|i| dot(&h[i * n..(i + 1) * n], &p) + lambda[i] * p[i]).collect();
        let a = delta / (dot(&p, &y) + 1e-5);
        for i in 0..n {
            x[i] += a * p[i];
            r[i] -= a * y[i];
        }
        let next = dot(&r, &r);
        for i in 0..n {
            p[i] = r[i] + next / (delta + 1e-5) * p[i];
        }
        delta = next;
    }
    x
}

/// The oracle itself, against sums and products written out; and its solutions, which solve the system as far as the early
/// stop lets them.
#[test]
fn the_recurrence_is_the_equation() {
    let [t, keys, values] = [4usize, 6, 3];
    let device = reference_device();
    let (q, k, v) =
        (uniform(1, t * keys, (-0.6, 0.6)), uniform(2, t * keys, (-0.6, 0.6)), uniform(3, t * values, (-1.0, 1.0)));
    let (g, beta, lambda) = (uniform(4, t, (-0.5, 0.0)), uniform(5, t, (0.0, 1.0)), uniform(6, keys, (0.3, 2.0)));
    let as4 = |x: &[f64], width: usize| tensor::<4>(x, [1, t, 1, width], &device, DType::F64);
    for iterations in [1, 2, 7, 30] {
        let inputs = Inputs {
            q: as4(&q, keys),
            k: as4(&k, keys),
            v: as4(&v, values),
            log_decay: as4(&g, 1),
            beta: as4(&beta, 1),
            lambda: tensor(&lambda, [1, keys], &device, DType::F64),
        };
        let zeros = |width| Tensor::zeros([1, 1, keys, width], (&device, DType::F64));
        let (o, state) = recurrent(inputs, iterations, MesaState { keys: zeros(keys), values: zeros(values) });
        let (mut kk, mut kv) = (vec![0.0; keys * keys], vec![0.0; keys * values]);
        let mut expected = Vec::new();
        for i in 0..t {
            let (q, k, v) = (&q[i * keys..][..keys], &k[i * keys..][..keys], &v[i * values..][..values]);
            let forget = g[i].exp();
            kk = (0..keys * keys).map(|at| forget * kk[at] + beta[i] * k[at / keys] * k[at % keys]).collect();
            kv = (0..keys * values).map(|at| forget * kv[at] + beta[i] * k[at / values] * v[at % values]).collect();
            let x = steps(&kk, &lambda, q, iterations);
            expected.extend((0..values).map(|c| (0..keys).map(|r| kv[r * values + c] * x[r]).sum::<f64>()));
            let left: f64 = (0..keys)
                .map(|r| (0..keys).map(|c| kk[r * keys + c] * x[c]).sum::<f64>() + lambda[r] * x[r] - q[r])
                .map(|rest| rest * rest)
                .sum();
            assert!(iterations < 30 || left < 1e-5, "the squared residual is {left}");
        }
        assert_close("o", &numbers(o), &expected, 1e-14);
        assert_close("keys", &numbers(state.keys), &kk, 1e-15);
        assert_close("values", &numbers(state.values), &kv, 1e-15);
    }
}

#[test]
fn chunked_is_recurrent() {
    for tokens in [1, 63, 64, 65, 131] {
        Problem { batch: 1, iterations: Some(9), ..Problem::new(tokens) }.assert_chunked_is_recurrent(1e-11);
    }
    let base = Problem::new(40);
    base.assert_chunked_is_recurrent(1e-11);
    Problem { heads: 3, keys: 48, values: 100, batch: 1, iterations: Some(6), ..base.clone() }
        .assert_chunked_is_recurrent(1e-11);
    Problem { keys: 1, values: 1, chunk: Some(12), l2_norm: false, ..base.clone() }.assert_chunked_is_recurrent(1e-11);
    Problem { tokens: 3, chunk: Some(1), ..base.clone() }.assert_chunked_is_recurrent(1e-11);
    for decay in [(0.0, 0.0), (-30.0, 0.0), (-300.0, 0.0)] {
        Problem { decay, iterations: Some(9), ..base.clone() }.assert_chunked_is_recurrent(1e-11);
    }
}

#[test]
fn packed_is_separate() {
    let packed = Some(vec![0, 0, 1, 1, 20, 40, 40]);
    Problem { packed, batch: 1, iterations: Some(9), ..Problem::new(40) }.assert_chunked_is_recurrent(1e-11);
    Problem { packed: Some(vec![0, 1, 2]), batch: 1, ..Problem::new(2) }.assert_chunked_is_recurrent(1e-11);
}

#[test]
fn a_continued_sequence_is_the_whole() {
    let problem = Problem { iterations: Some(9), ..Problem::new(40) };
    let pieces = |x: &[Tensor<1>]| {
        let call = problem.read(x);
        let (mut outputs, mut state) = (Vec::new(), call.state.clone());
        // By chunks, by one token, and by what is left.
        for (start, length) in [(0, 19), (19, 1), (20, 20)] {
            let (o, next) = problem.run(Call { state, ..call.tokens(start, length) }).unwrap();
            outputs.push(o);
            state = next;
        }
        all((Tensor::cat(outputs, 1), state))
    };
    assert_agree("continued", &problem.inputs(), 1e-11, |x| all(problem.run(problem.read(x)).unwrap()), pieces);
}

#[test]
fn without_a_token_the_state_is_kept() {
    let device = reference_device();
    let [q, k] = [0; 2].map(|_| Tensor::zeros([2, 0, 2, 5], &device));
    let [g, beta] = [0; 2].map(|_| Tensor::zeros([2, 0, 2], &device));
    let draw = |seed, width| tensor(&uniform(seed, 20 * width, (-1.0, 1.0)), [2, 2, 5, width], &device, DType::F32);
    let state = MesaState { keys: draw(1, 5), values: draw(2, 7) };
    let call =
        Call { q, k, v: Tensor::zeros([2, 0, 2, 7], &device), g, beta, lambda: Tensor::ones([2, 5], &device), state };
    let (o, state) = Problem::new(0).run(call.clone()).unwrap();
    assert_eq!(o.dims(), [2, 0, 2, 7]);
    assert_eq!(numbers(state.keys), numbers(call.state.keys));
    assert_eq!(numbers(state.values), numbers(call.state.values));
}

/// The sizes of the problem whose gradients are computed in plain arithmetic: one row, one head.
const TOKENS: usize = 6;
const KEYS: usize = 4;
const VALUES: usize = 3;

/// Plain arithmetic on inputs as [`Problem::inputs`] has them, for one row and head, without norms: the weights of the loss,
/// and for each token the solution x and the solution y of its gradient, both constant.
struct Plain {
    weights: [Vec<f64>; 3],
    x: Vec<Vec<f64>>,
    y: Vec<Vec<f64>>,
}

/// The memories after each token.
fn memories(inputs: &[Input]) -> Vec<(Vec<f64>, Vec<f64>)> {
    let [k, v, g, beta] = [1, 2, 3, 4].map(|at| &inputs[at].values);
    let (mut kk, mut kv) = (inputs[6].values.clone(), inputs[7].values.clone());
    (0..TOKENS)
        .map(|t| {
            let (k, v, forget) = (&k[t * KEYS..][..KEYS], &v[t * VALUES..][..VALUES], g[t].exp());
            kk = (0..KEYS * KEYS).map(|at| forget * kk[at] + beta[t] * k[at / KEYS] * k[at % KEYS]).collect();
            kv = (0..KEYS * VALUES).map(|at| forget * kv[at] + beta[t] * k[at / VALUES] * v[at % VALUES]).collect();
            (kk.clone(), kv.clone())
        })
        .collect()
}

impl Plain {
    fn new(inputs: &[Input], weights: [Vec<f64>; 3], iterations: usize) -> Self {
        let (mut x, mut y) = (Vec::new(), Vec::new());
        for (t, (kk, kv)) in memories(inputs).iter().enumerate() {
            let lambda = &inputs[5].values;
            let w = &weights[0][t * VALUES..][..VALUES];
            let dx: Vec<f64> = (0..KEYS).map(|r| (0..VALUES).map(|c| kv[r * VALUES + c] * w[c]).sum()).collect();
            x.push(steps(kk, lambda, &inputs[0].values[t * KEYS..][..KEYS], iterations));
            y.push(steps(kk, lambda, &dx, iterations));
        }
        Self { weights, x, y }
    }

    /// The loss as a function of everything but the solutions, with `y · (q − (Hkk + Λ) x)` for what moves them: by the
    /// inputs it has the gradient `dq = y`, `dHkk = −y xᵀ`, `dλ = −y ∘ x`, and that of the outputs and states.
    fn surrogate(&self, inputs: &[Input]) -> f64 {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let all = memories(inputs);
        let mut sum = 0.0;
        for (t, (kk, kv)) in all.iter().enumerate() {
            let (x, y, q) = (&self.x[t], &self.y[t], &inputs[0].values[t * KEYS..][..KEYS]);
            for c in 0..VALUES {
                sum += self.weights[0][t * VALUES + c] * (0..KEYS).map(|r| kv[r * VALUES + c] * x[r]).sum::<f64>();
            }
            for r in 0..KEYS {
                sum += y[r] * (q[r] - dot(&kk[r * KEYS..][..KEYS], x) - inputs[5].values[r] * x[r]);
            }
        }
        let (kk, kv) = &all[TOKENS - 1];
        sum + dot(&self.weights[1], kk) + dot(&self.weights[2], kv)
    }

    /// The gradient of [`surrogate`](Self::surrogate) by one input, by central differences.
    fn gradient(&self, inputs: &[Input], at: usize) -> Vec<f64> {
        (0..inputs[at].values.len())
            .map(|element| {
                let shifted = |by: f64| {
                    let mut inputs = inputs.to_vec();
                    inputs[at].values[element] += by;
                    self.surrogate(&inputs)
                };
                (shifted(1e-4) - shifted(-1e-4)) / 2e-4
            })
            .collect()
    }
}

/// The gradient through a solution is that of the format: `dq = y`, `dHkk = −y xᵀ`, `dλ = −y ∘ x` with y from dx by the same
/// steps; the rest follows by the recurrences.
#[test]
fn gradients_are_those_of_solutions() {
    let device = reference_device();
    for iterations in [2, 30] {
        for (chunk, tokens_of_a_step) in [(Some(4), TOKENS), (None, 1)] {
            let sizes = Problem { batch: 1, heads: 1, keys: KEYS, values: VALUES, ..Problem::new(TOKENS) };
            let problem = Problem { chunk, iterations: Some(iterations), l2_norm: false, ..sizes };
            let inputs = problem.inputs();
            let weights = [TOKENS * VALUES, KEYS * KEYS, KEYS * VALUES];
            let weights = [0, 1, 2].map(|i| uniform(50 + i as u64, weights[i], (-1.0, 1.0)));
            let found = evaluate(&inputs, &device, DType::F64, |x| {
                let call = problem.read(x);
                let (mut outputs, mut state) = (Vec::new(), call.state.clone());
                for start in (0..TOKENS).step_by(tokens_of_a_step) {
                    let (o, next) = problem.run(Call { state, ..call.tokens(start, tokens_of_a_step) }).unwrap();
                    outputs.push(flat(o));
                    state = next;
                }
                let weighted = |x: Tensor<1>, i: usize| {
                    let weight: Tensor<1> = tensor(&weights[i], [weights[i].len()], &device, DType::F64);
                    (x * weight).sum()
                };
                let o = Tensor::cat(outputs, 0);
                vec![weighted(o, 0) + weighted(flat(state.keys), 1) + weighted(flat(state.values), 2)]
            });
            // What `evaluate` weighs the one output with.
            let weight = uniform(1000, 1, (-1.0, 1.0))[0];
            let plain =
                Plain::new(&inputs, weights.clone().map(|w| w.iter().map(|w| w * weight).collect()), iterations);
            for (at, input) in inputs.iter().enumerate() {
                let mut expected = plain.gradient(&inputs, at);
                if at == 6 {
                    // The matrix is read as the mean of itself and its transpose.
                    expected = (0..KEYS * KEYS)
                        .map(|at| 0.5 * (expected[at] + expected[at % KEYS * KEYS + at / KEYS]))
                        .collect();
                }
                let what = format!("{iterations} steps, {tokens_of_a_step} tokens, {}", input.name);
                assert_close(&what, &found.gradients[at], &expected, 1e-8);
            }
        }
    }
}

/// As far as the steps solve the systems, that is the gradient of what is computed: they leave a squared residual of about
/// 1e-5, so 3e-3 of x and 3e-3 of y, and the gradient of λ is their product.
#[test]
fn gradients_are_near_finite_differences() {
    // The last one goes on in a second chunk.
    let problem = Problem { batch: 1, heads: 1, chunk: Some(4), ..Problem::new(6) };
    assert_finite_differences("mesa_net", &problem.inputs(), 12, 1e-2, |x| all(problem.run(problem.read(x)).unwrap()));
}

#[test]
fn f32_and_bf16_stay_near_f64() {
    let device = reference_device();
    let problem = Problem { keys: 48, values: 32, ..Problem::new(131) };
    let mut inputs = problem.inputs();
    // Numbers that bf16 has, so that the arithmetic alone differs.
    for x in inputs.iter_mut().flat_map(|input| &mut input.values) {
        *x = (*x * 32.0).round() / 32.0;
    }
    let exact = evaluate(&inputs, &device, DType::F64, |x| all(problem.oracle(problem.read(x))));
    // Half a unit in the last place of bf16 is 2e-3.
    for (dtype, bound) in [(DType::F32, 5e-6), (DType::BF16, 3e-3)] {
        let found = evaluate(&inputs, &device, DType::F32, |x| {
            let mut call = problem.read(x);
            for operand in [&mut call.q, &mut call.k, &mut call.v] {
                *operand = operand.clone().cast(dtype);
            }
            let (o, state) = problem.run(call).unwrap();
            assert_eq!((o.dtype(), state.keys.dtype(), state.values.dtype()), (dtype, DType::F32, DType::F32));
            all((o, state))
        });
        for (i, (a, b)) in found.outputs.iter().zip(&exact.outputs).enumerate() {
            // The output is rounded to bf16, the states are not.
            assert_close(&format!("{dtype:?}, output {i}"), a, b, if i == 0 { bound } else { 5e-6 });
        }
        for (input, (a, b)) in inputs.iter().zip(found.gradients.iter().zip(&exact.gradients)) {
            assert_close(&format!("{dtype:?}, gradient of {}", input.name), a, b, bound);
        }
    }
}

#[test]
fn wrong_arguments_are_named() {
    let problem = Problem::new(4);
    let leaves: Vec<Tensor<1>> = (problem.inputs().iter())
        .map(|input| tensor(&input.values, [input.values.len()], &reference_device(), DType::F32))
        .collect();
    let says = |problem: &Problem, change: &dyn Fn(&mut Call), words: &[&str]| {
        let mut call = problem.read(&leaves);
        change(&mut call);
        let message = problem.run(call).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{message}");
        }
    };
    says(&problem, &|x| x.k = x.k.clone().narrow(1, 0, 3), &["mesa_net", "`k`", "[2, 4, 2, 5]"]);
    says(&problem, &|x| x.v = x.v.clone().cast(DType::BF16), &["`v`", "F32"]);
    says(&problem, &|x| x.g = x.g.clone().narrow(2, 0, 1), &["`log_decay`", "[B, T, H]"]);
    says(&problem, &|x| x.beta = x.beta.clone().narrow(1, 0, 1), &["`beta`", "[B, T, H]"]);
    says(&problem, &|x| x.lambda = x.lambda.clone().narrow(1, 0, 4), &["`lambda`", "[H, K]"]);
    says(&problem, &|x| x.state.keys = x.state.values.clone(), &["`initial_state.keys`", "[2, 2, 5, 5]"]);
    says(&problem, &|x| x.state.values = x.state.keys.clone(), &["`initial_state.values`", "[2, 2, 5, 7]"]);
    says(&Problem { chunk: Some(0), ..problem.clone() }, &|_| (), &["chunk", "at least one token"]);
    says(&Problem { iterations: Some(0), ..problem.clone() }, &|_| (), &["iterations", "is 0"]);
    says(&Problem { packed: Some(vec![0, 2, 4]), ..problem.clone() }, &|_| (), &["batch of 1"]);
}
