//! The selective scan of Mamba against its token recurrence.

use burn::tensor::{DType, Tensor};
use burn_fla_ops::selective_scan::reference;
use burn_fla_ops::{CuSeqlens, OpError, SelectiveScanOptions, selective_scan};
use burn_fla_tests::agree::{Input, assert_agree, assert_evaluations, assert_finite_differences, evaluate};
use burn_fla_tests::{assert_close, numbers, reference_device, tensor, uniform};

use super::{flat, view};

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    tokens: usize,
    channels: usize,
    states: usize,
    sequences: usize,
}

impl Sizes {
    fn new(batch: usize, tokens: usize, channels: usize, states: usize) -> Self {
        Self { batch, tokens, channels, states, sequences: batch }
    }

    /// x, Δ, A, B, C, D, z and the initial state, with Δ from `delta`.
    fn inputs(&self, delta: (f64, f64)) -> Vec<Input> {
        let Self { batch, tokens, channels, states, sequences } = *self;
        let wide = [batch, tokens, channels];
        vec![
            Input::new("x", &wide, (-1.0, 1.0)),
            Input::new("delta", &wide, delta),
            Input::new("a", &[channels, states], (-4.0, -0.1)),
            Input::new("b", &[batch, tokens, states], (-1.0, 1.0)),
            Input::new("c", &[batch, tokens, states], (-1.0, 1.0)),
            Input::new("skip", &[channels], (-1.0, 1.0)),
            Input::new("z", &wide, (-2.0, 2.0)),
            Input::new("state", &[sequences, channels, states], (-1.0, 1.0)),
        ]
    }

    fn operands(&self, x: &[Tensor<1>]) -> Operands {
        let Self { batch, tokens, channels, states, sequences } = *self;
        Operands {
            x: view(&x[0], [batch, tokens, channels]),
            delta: view(&x[1], [batch, tokens, channels]),
            a: view(&x[2], [channels, states]),
            b: view(&x[3], [batch, tokens, states]),
            c: view(&x[4], [batch, tokens, states]),
            skip: x[5].clone(),
            gate: view(&x[6], [batch, tokens, channels]),
            state: view(&x[7], [sequences, channels, states]),
        }
    }
}

#[derive(Clone)]
struct Operands {
    x: Tensor<3>,
    delta: Tensor<3>,
    a: Tensor<2>,
    b: Tensor<3>,
    c: Tensor<3>,
    skip: Tensor<1>,
    gate: Tensor<3>,
    state: Tensor<3>,
}

impl Operands {
    /// `count` tokens from `start` on, from `state`.
    fn cut(&self, start: usize, count: usize, state: Tensor<3>) -> Self {
        let cut = |x: &Tensor<3>| x.clone().narrow(1, start, count);
        Self {
            x: cut(&self.x),
            delta: cut(&self.delta),
            b: cut(&self.b),
            c: cut(&self.c),
            gate: cut(&self.gate),
            state,
            ..self.clone()
        }
    }

    fn options(&self) -> SelectiveScanOptions {
        SelectiveScanOptions {
            skip: Some(self.skip.clone()),
            gate: Some(self.gate.clone()),
            initial_state: Some(self.state.clone()),
            ..Default::default()
        }
    }

    fn run(self, options: SelectiveScanOptions) -> (Tensor<3>, Tensor<3>) {
        selective_scan(self.x, self.delta, self.a, self.b, self.c, options).expect("fitting operands")
    }

    fn scan(self) -> (Tensor<3>, Tensor<3>) {
        let options = self.options();
        self.run(options)
    }

    /// The oracle, with the skip and the gate written out here.
    fn recurrence(self) -> (Tensor<3>, Tensor<3>) {
        let (y, end) = reference::recurrent(self.x.clone(), self.delta, self.a, self.b, self.c, self.state);
        let y = y + self.x * self.skip.unsqueeze::<3>();
        let open = self.gate.clone() / (self.gate.neg().exp().add_scalar(1.0));
        (y * open, end)
    }
}

fn pair((y, end): (Tensor<3>, Tensor<3>)) -> Vec<Tensor<1>> {
    vec![flat(y), flat(end)]
}

#[test]
fn the_chunked_form_equals_the_recurrence() {
    let cases = [(1, 1, 5, 7), (2, 63, 7, 5), (1, 64, 48, 4), (2, 65, 5, 16), (1, 131, 100, 3), (3, 33, 1, 1)];
    for (batch, tokens, channels, states) in cases {
        let sizes = Sizes::new(batch, tokens, channels, states);
        let what = format!("selective_scan, T = {tokens}, I = {channels}, N = {states}");
        assert_agree(
            &what,
            &sizes.inputs((0.0, 0.5)),
            1e-12,
            |x| pair(sizes.operands(x).scan()),
            |x| pair(sizes.operands(x).recurrence()),
        );
    }
}

#[test]
fn the_length_of_a_chunk_does_not_matter() {
    let sizes = Sizes::new(2, 37, 5, 7);
    for chunk in [1, 2, 7, 36, 37, 100] {
        assert_agree(
            &format!("selective_scan in chunks of {chunk}"),
            &sizes.inputs((0.0, 0.5)),
            1e-12,
            |x| {
                let operands = sizes.operands(x);
                let options = SelectiveScanOptions { chunk: Some(chunk), ..operands.options() };
                pair(operands.run(options))
            },
            |x| pair(sizes.operands(x).recurrence()),
        );
    }
}

/// Steps so long that a token forgets all before it, beside steps of zero, which forget nothing.
#[test]
fn extreme_steps() {
    let sizes = Sizes::new(1, 70, 6, 5);
    let mut inputs = sizes.inputs((0.0, 0.1));
    for (i, delta) in inputs[1].values.iter_mut().enumerate() {
        match i % 7 {
            0 => *delta = 1e4,
            1..=3 => *delta = 0.0,
            _ => {}
        }
    }
    let scan = |x: &[Tensor<1>]| pair(sizes.operands(x).scan());
    let recurrence = |x: &[Tensor<1>]| pair(sizes.operands(x).recurrence());
    assert_agree("selective_scan, extreme steps", &inputs, 1e-11, scan, recurrence);
    // In f32 the sums of steps in a chunk reach 1e5, and what is left of the shorter steps beside them is no longer
    // exact; where that matters, the exponential is zero.
    let device = reference_device();
    let (found, exact) =
        (evaluate(&inputs, &device, DType::F32, scan), evaluate(&inputs, &device, DType::F64, recurrence));
    assert_evaluations("selective_scan, extreme steps, f32", &inputs, 1e-5, &found, &exact);
}

#[test]
fn f32_is_near_f64() {
    let sizes = Sizes::new(2, 131, 9, 16);
    let inputs = sizes.inputs((0.0, 0.1));
    let device = reference_device();
    let found = evaluate(&inputs, &device, DType::F32, |x| pair(sizes.operands(x).scan()));
    let exact = evaluate(&inputs, &device, DType::F64, |x| pair(sizes.operands(x).recurrence()));
    assert_evaluations("selective_scan in f32", &inputs, 1e-6, &found, &exact);
}

/// bf16 operands are computed in f32: the answer is that of f32, rounded once.
#[test]
fn bf16_is_rounded_once() {
    let sizes = Sizes::new(1, 40, 7, 5);
    let device = reference_device();
    let inputs: Vec<Tensor<1>> = sizes
        .inputs((0.0, 0.3))
        .iter()
        .map(|i| tensor(&i.values, [i.values.len()], &device, DType::F32).cast(DType::BF16).cast(DType::F32))
        .collect();
    let exact = sizes.operands(&inputs);
    let half = |x: &Tensor<3>| x.clone().cast(DType::BF16);
    // Δ, A, D and the state stay f32.
    let rounded =
        Operands { x: half(&exact.x), b: half(&exact.b), c: half(&exact.c), gate: half(&exact.gate), ..exact.clone() };
    let ((y, end), (y16, end16)) = (exact.scan(), rounded.scan());
    assert_eq!((y16.dtype(), end16.dtype()), (DType::BF16, DType::F32));
    assert_close("y", &numbers(y16), &numbers(half(&y)), 0.0);
    assert_close("state", &numbers(end16), &numbers(end), 0.0);
}

#[test]
fn packed_equals_separate() {
    let offsets = [0usize, 5, 5, 6, 40, 75];
    let sizes = Sizes { sequences: offsets.len() - 1, ..Sizes::new(1, 75, 5, 7) };
    assert_agree(
        "selective_scan, packed",
        &sizes.inputs((0.0, 0.5)),
        1e-12,
        |x| {
            let operands = sizes.operands(x);
            let packed = Some(CuSeqlens::new(offsets.to_vec()).unwrap());
            let options = SelectiveScanOptions { cu_seqlens: packed, ..operands.options() };
            pair(operands.run(options))
        },
        |x| {
            let whole = sizes.operands(x);
            let (mut outputs, mut ends) = (Vec::new(), Vec::new());
            for (i, w) in offsets.windows(2).enumerate() {
                let state = whole.state.clone().narrow(0, i, 1);
                if w[0] == w[1] {
                    ends.push(state);
                    continue;
                }
                let (y, end) = whole.cut(w[0], w[1] - w[0], state).recurrence();
                outputs.push(y);
                ends.push(end);
            }
            vec![flat(Tensor::cat(outputs, 1)), flat(Tensor::cat(ends, 0))]
        },
    );
}

#[test]
fn a_run_that_goes_on_equals_the_whole() {
    let sizes = Sizes::new(2, 75, 5, 7);
    assert_agree(
        "selective_scan, continued",
        &sizes.inputs((0.0, 0.5)),
        1e-12,
        |x| {
            let whole = sizes.operands(x);
            let mut state = whole.state.clone();
            let mut outputs = Vec::new();
            for (start, count) in [(0, 40), (40, 1), (41, 34)] {
                let (y, end) = whole.cut(start, count, state).scan();
                outputs.push(y);
                state = end;
            }
            vec![flat(Tensor::cat(outputs, 1)), flat(state)]
        },
        |x| pair(sizes.operands(x).scan()),
    );
}

/// Without a token the state stays, and the output is empty.
#[test]
fn no_tokens() {
    let device = reference_device();
    let floats = |shape: [usize; 3]| Tensor::<3>::ones(shape, (&device, DType::F32));
    let a = Tensor::<2>::zeros([4, 3], (&device, DType::F32));
    let options = SelectiveScanOptions { initial_state: Some(floats([2, 4, 3])), ..Default::default() };
    let (x, maps) = (floats([2, 0, 4]), floats([2, 0, 3]));
    let (y, state) = selective_scan(x.clone(), x, a, maps.clone(), maps, options).unwrap();
    assert_eq!(y.dims(), [2, 0, 4]);
    assert_eq!(numbers(state), [1.0; 24]);
}

#[test]
fn finite_differences() {
    let sizes = Sizes::new(2, 5, 3, 4);
    assert_finite_differences("selective_scan", &sizes.inputs((0.1, 0.9)), 12, 1e-8, |x| {
        let operands = sizes.operands(x);
        let options = SelectiveScanOptions { chunk: Some(2), ..operands.options() };
        pair(operands.run(options))
    });
}

#[test]
fn wrong_arguments_are_named() {
    let device = reference_device();
    let floats = |shape: [usize; 3]| -> Tensor<3> {
        tensor(&uniform(1, shape.iter().product(), (0.0, 1.0)), shape, &device, DType::F32)
    };
    let a = || Tensor::<2>::zeros([4, 3], (&device, DType::F32));
    let run = |x: Tensor<3>, delta: Tensor<3>, b: Tensor<3>, options: SelectiveScanOptions| -> OpError {
        selective_scan(x, delta, a(), b, floats([2, 5, 3]), options).unwrap_err()
    };
    let (x, b) = (floats([2, 5, 4]), floats([2, 5, 3]));
    let plain = SelectiveScanOptions::default;
    let argument = |error: OpError| match error {
        OpError::Shape { argument, .. } | OpError::DType { argument, .. } => argument,
        OpError::Option { option, .. } => option,
        OpError::CuSeqlens { .. } => "cu_seqlens",
        other => panic!("{other}"),
    };
    assert_eq!(argument(run(floats([2, 5, 0]), x.clone(), b.clone(), plain())), "x");
    assert_eq!(argument(run(x.clone(), floats([2, 4, 4]), b.clone(), plain())), "delta");
    assert_eq!(argument(run(x.clone(), x.clone().cast(DType::BF16), b.clone(), plain())), "delta");
    assert_eq!(argument(run(floats([2, 5, 7]), floats([2, 5, 7]), b.clone(), plain())), "a");
    assert_eq!(argument(run(x.clone(), x.clone(), floats([2, 5, 4]), plain())), "b");
    assert_eq!(argument(run(x.clone(), x.clone(), b.clone().cast(DType::BF16), plain())), "b");
    let with = |options: SelectiveScanOptions| argument(run(x.clone(), x.clone(), b.clone(), options));
    let state = Some(floats([1, 4, 3]));
    assert_eq!(with(SelectiveScanOptions { initial_state: state, ..plain() }), "initial_state");
    assert_eq!(with(SelectiveScanOptions { gate: Some(b.clone()), ..plain() }), "gate");
    let skip = Some(Tensor::<1>::zeros([3], (&device, DType::F32)));
    assert_eq!(with(SelectiveScanOptions { skip, ..plain() }), "skip");
    assert_eq!(with(SelectiveScanOptions { chunk: Some(0), ..plain() }), "chunk");
    let packed = Some(CuSeqlens::new(vec![0, 5]).unwrap());
    assert_eq!(with(SelectiveScanOptions { cu_seqlens: packed, ..plain() }), "cu_seqlens");
}
