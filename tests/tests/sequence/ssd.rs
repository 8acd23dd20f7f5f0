//! The state space duality of Mamba2 against its token recurrence, and the norm of its output.

use burn::tensor::{DType, Tensor};
use burn_fla_ops::ssd::reference;
use burn_fla_ops::{CuSeqlens, Engine, GroupedGatedNorm, HeadGroups, OpError, SsdOptions, grouped_gated_rms_norm, ssd};
use burn_fla_tests::agree::{Input, assert_agree, assert_evaluations, assert_finite_differences, evaluate};
use burn_fla_tests::{assert_close, numbers, reference_device, tensor};

use super::{flat, view};

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    tokens: usize,
    heads: usize,
    width: usize,
    groups: usize,
    states: usize,
    sequences: usize,
    rule: HeadGroups,
    /// Whether D has a number for each channel.
    skip_by_channel: bool,
}

impl Sizes {
    fn new(batch: usize, tokens: usize, [heads, width]: [usize; 2], [groups, states]: [usize; 2]) -> Self {
        let (rule, skip_by_channel) = (HeadGroups::Contiguous, false);
        Self { batch, tokens, heads, width, groups, states, sequences: batch, rule, skip_by_channel }
    }

    /// x, Δ, A, B, C, D and the initial state, with Δ from `delta`.
    fn inputs(&self, delta: (f64, f64)) -> Vec<Input> {
        let s = self;
        let skip = if s.skip_by_channel { s.heads * s.width } else { s.heads };
        vec![
            Input::new("x", &[s.batch, s.tokens, s.heads, s.width], (-1.0, 1.0)),
            Input::new("delta", &[s.batch, s.tokens, s.heads], delta),
            Input::new("a", &[s.heads], (-4.0, -0.1)),
            Input::new("b", &[s.batch, s.tokens, s.groups, s.states], (-1.0, 1.0)),
            Input::new("c", &[s.batch, s.tokens, s.groups, s.states], (-1.0, 1.0)),
            Input::new("skip", &[skip], (-1.0, 1.0)),
            Input::new("state", &[s.sequences, s.heads, s.states, s.width], (-1.0, 1.0)),
        ]
    }

    fn operands(&self, x: &[Tensor<1>]) -> Operands {
        let s = self;
        Operands {
            x: view(&x[0], [s.batch, s.tokens, s.heads, s.width]),
            delta: view(&x[1], [s.batch, s.tokens, s.heads]),
            a: x[2].clone(),
            b: view(&x[3], [s.batch, s.tokens, s.groups, s.states]),
            c: view(&x[4], [s.batch, s.tokens, s.groups, s.states]),
            skip: x[5].clone(),
            state: view(&x[6], [s.sequences, s.heads, s.states, s.width]),
            rule: s.rule,
        }
    }
}

#[derive(Clone)]
struct Operands {
    x: Tensor<4>,
    delta: Tensor<3>,
    a: Tensor<1>,
    b: Tensor<4>,
    c: Tensor<4>,
    skip: Tensor<1>,
    state: Tensor<4>,
    rule: HeadGroups,
}

impl Operands {
    fn cut(&self, start: usize, count: usize, state: Tensor<4>) -> Self {
        let cut = |x: &Tensor<4>| x.clone().narrow(1, start, count);
        let delta = self.delta.clone().narrow(1, start, count);
        Self { x: cut(&self.x), delta, b: cut(&self.b), c: cut(&self.c), state, ..self.clone() }
    }

    fn run(self, cu_seqlens: Option<CuSeqlens>) -> (Tensor<4>, Tensor<4>) {
        let options = SsdOptions {
            skip: Some(self.skip),
            groups: self.rule,
            initial_state: Some(self.state),
            cu_seqlens,
            ..Default::default()
        };
        ssd(self.x, self.delta, self.a, self.b, self.c, options).expect("fitting operands")
    }

    fn recurrence(self) -> (Tensor<4>, Tensor<4>) {
        reference::recurrent(self.x, self.delta, self.a, self.b, self.c, Some(self.skip), self.rule, self.state)
    }
}

fn pair((y, end): (Tensor<4>, Tensor<4>)) -> Vec<Tensor<1>> {
    vec![flat(y), flat(end)]
}

fn cases() -> Vec<Sizes> {
    vec![
        Sizes::new(1, 1, [2, 5], [1, 7]),
        Sizes::new(2, 63, [4, 7], [2, 5]),
        Sizes { rule: HeadGroups::Tiled, ..Sizes::new(1, 64, [6, 5], [2, 7]) },
        Sizes { skip_by_channel: true, ..Sizes::new(1, 65, [2, 48], [2, 5]) },
        Sizes::new(1, 131, [3, 5], [1, 100]),
    ]
}

#[test]
fn the_chunked_form_equals_the_recurrence() {
    for sizes in cases() {
        let what = format!("ssd, T = {}, H = {}, G = {}, {:?}", sizes.tokens, sizes.heads, sizes.groups, sizes.rule);
        assert_agree(
            &what,
            &sizes.inputs((0.0, 0.5)),
            1e-12,
            |x| pair(sizes.operands(x).run(None)),
            |x| pair(sizes.operands(x).recurrence()),
        );
    }
}

/// Steps so long that a token forgets all before it, beside steps of zero, which forget nothing.
#[test]
fn extreme_steps() {
    let sizes = Sizes::new(1, 70, [3, 5], [1, 7]);
    let mut inputs = sizes.inputs((0.0, 0.1));
    for (i, delta) in inputs[1].values.iter_mut().enumerate() {
        match i % 7 {
            0 => *delta = 1e3,
            1..=3 => *delta = 0.0,
            _ => {}
        }
    }
    // The sums of log decays in a chunk reach 4e4: f64 keeps 1e-11 of what is left beside them.
    assert_agree(
        "ssd, extreme steps",
        &inputs,
        1e-10,
        |x| pair(sizes.operands(x).run(None)),
        |x| pair(sizes.operands(x).recurrence()),
    );
}

#[test]
fn f32_is_near_f64() {
    let sizes = Sizes::new(2, 131, [4, 9], [2, 16]);
    let inputs = sizes.inputs((0.0, 0.1));
    let device = reference_device();
    let found = evaluate(&inputs, &device, DType::F32, |x| pair(sizes.operands(x).run(None)));
    let exact = evaluate(&inputs, &device, DType::F64, |x| pair(sizes.operands(x).recurrence()));
    assert_evaluations("ssd in f32", &inputs, 1e-6, &found, &exact);
}

/// x, B and C in bf16, Δ, A, D and the state in f32. The values Δ x and the output are rounded.
#[test]
fn bf16_is_near_f32() {
    let sizes = Sizes::new(1, 70, [4, 8], [2, 8]);
    let device = reference_device();
    let inputs: Vec<Tensor<1>> = sizes
        .inputs((0.0, 0.3))
        .iter()
        .map(|i| tensor(&i.values, [i.values.len()], &device, DType::F32).cast(DType::BF16).cast(DType::F32))
        .collect();
    let exact = sizes.operands(&inputs);
    let half = |x: &Tensor<4>| x.clone().cast(DType::BF16);
    let rounded = Operands { x: half(&exact.x), b: half(&exact.b), c: half(&exact.c), ..exact.clone() };
    let ((y, end), (y16, end16)) = (exact.run(None), rounded.run(None));
    assert_eq!((y16.dtype(), end16.dtype()), (DType::BF16, DType::F32));
    // One rounding to 8 bits is 1.7e-3 in the mean; here are three on the way of a value.
    assert_close("y", &numbers(y16), &numbers(y), 4e-3);
    assert_close("state", &numbers(end16), &numbers(end), 4e-3);
}

#[test]
fn packed_equals_separate() {
    let offsets = [0usize, 5, 5, 6, 75];
    let sizes = Sizes { sequences: offsets.len() - 1, ..Sizes::new(1, 75, [4, 5], [2, 7]) };
    assert_agree(
        "ssd, packed",
        &sizes.inputs((0.0, 0.5)),
        1e-12,
        |x| pair(sizes.operands(x).run(Some(CuSeqlens::new(offsets.to_vec()).unwrap()))),
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
    let sizes = Sizes::new(2, 75, [4, 5], [2, 7]);
    assert_agree(
        "ssd, continued",
        &sizes.inputs((0.0, 0.5)),
        1e-12,
        |x| {
            let whole = sizes.operands(x);
            let mut state = whole.state.clone();
            let mut outputs = Vec::new();
            for (start, count) in [(0, 40), (40, 1), (41, 34)] {
                let (y, end) = whole.cut(start, count, state).run(None);
                outputs.push(y);
                state = end;
            }
            vec![flat(Tensor::cat(outputs, 1)), flat(state)]
        },
        |x| pair(sizes.operands(x).run(None)),
    );
}

#[test]
fn finite_differences() {
    let sizes = Sizes::new(2, 5, [4, 3], [2, 2]);
    assert_finite_differences("ssd", &sizes.inputs((0.1, 0.9)), 12, 1e-8, |x| pair(sizes.operands(x).run(None)));
}

#[test]
fn wrong_arguments_are_named() {
    let device = reference_device();
    let x = || Tensor::<4>::zeros([2, 5, 4, 3], (&device, DType::F32));
    let delta = || Tensor::<3>::zeros([2, 5, 4], (&device, DType::F32));
    let maps = |groups: usize| Tensor::<4>::zeros([2, 5, groups, 6], (&device, DType::F32));
    let vector = |n: usize| Tensor::<1>::zeros([n], (&device, DType::F32));
    let run = |delta, a, b, c, options| match ssd(x(), delta, a, b, c, options).unwrap_err() {
        OpError::Shape { argument, .. } | OpError::DType { argument, .. } => argument,
        OpError::Option { option, .. } => option,
        OpError::CuSeqlens { .. } => "cu_seqlens",
        other => panic!("{other}"),
    };
    let plain = SsdOptions::default;
    assert_eq!(run(delta().narrow(1, 0, 4), vector(4), maps(2), maps(2), plain()), "delta");
    assert_eq!(run(delta().cast(DType::BF16), vector(4), maps(2), maps(2), plain()), "delta");
    assert_eq!(run(delta(), vector(3), maps(2), maps(2), plain()), "a");
    assert_eq!(run(delta(), vector(4), maps(3), maps(3), plain()), "b");
    assert_eq!(run(delta(), vector(4), maps(2), maps(1), plain()), "c");
    let with = |options| run(delta(), vector(4), maps(2), maps(2), options);
    assert_eq!(with(SsdOptions { skip: Some(vector(3)), ..plain() }), "skip");
    assert_eq!(with(SsdOptions { initial_state: Some(x()), ..plain() }), "initial_state");
    assert_eq!(with(SsdOptions { chunk: Some(0), ..plain() }), "chunk");
    let packed = Some(CuSeqlens::new(vec![0, 5]).unwrap());
    assert_eq!(with(SsdOptions { cu_seqlens: packed, ..plain() }), "cu_seqlens");
}

/// The norm written out, group by group.
fn norm_by_hand(x: Tensor<3>, gate: Tensor<3>, weight: Tensor<1>, options: GroupedGatedNorm) -> Tensor<3> {
    let width = x.dims()[2];
    let size = options.group_size.unwrap_or(width);
    let open = gate.clone() / gate.neg().exp().add_scalar(1.0);
    let input = if options.norm_before_gate { x } else { x * open.clone() };
    let groups = (0..width / size)
        .map(|g| {
            let group = input.clone().narrow(2, g * size, size);
            let mean = (group.clone() * group.clone()).sum_dim(2).mul_scalar(1.0 / size as f64);
            group / mean.add_scalar(options.eps).sqrt()
        })
        .collect();
    let y = Tensor::cat(groups, 2) * weight.unsqueeze::<3>();
    if options.norm_before_gate { y * open } else { y }
}

#[test]
fn the_grouped_norm_is_its_formula() {
    let shape = [2, 3, 12];
    let inputs = [
        Input::new("x", &shape, (-1.0, 1.0)),
        Input::new("gate", &shape, (-3.0, 3.0)),
        Input::new("weight", &[12], (0.5, 1.5)),
    ];
    for norm_before_gate in [false, true] {
        for group_size in [None, Some(12), Some(4), Some(1)] {
            // An ε that shows.
            let options = GroupedGatedNorm { eps: 1e-2, group_size, norm_before_gate };
            let norm = |x: &[Tensor<1>]| {
                let (a, gate) = (view(&x[0], shape), view(&x[1], shape));
                vec![flat(grouped_gated_rms_norm(a, gate, x[2].clone(), options, Engine::Auto).unwrap())]
            };
            let by_hand = |x: &[Tensor<1>]| {
                vec![flat(norm_by_hand(view(&x[0], shape), view(&x[1], shape), x[2].clone(), options))]
            };
            let what = format!("{options:?}");
            assert_agree(&what, &inputs, 1e-13, norm, by_hand);
            // The norm of a single number has a third derivative of hundreds at this ε: 1e-8 is the differences' own error.
            assert_finite_differences(&what, &inputs, 6, 1e-7, norm);
        }
    }
    let device = reference_device();
    let x = || Tensor::<3>::ones(shape, (&device, DType::F32));
    let weight = || Tensor::<1>::ones([12], (&device, DType::F32));
    let run = |gate: Tensor<3>, group_size, eps| {
        let options = GroupedGatedNorm { eps, group_size, norm_before_gate: false };
        grouped_gated_rms_norm(x(), gate, weight(), options, Engine::Auto).unwrap_err()
    };
    assert!(matches!(run(x(), Some(5), 1e-5), OpError::Option { option: "group_size", .. }));
    assert!(matches!(run(x(), Some(0), 1e-5), OpError::Option { option: "group_size", .. }));
    assert!(matches!(run(x(), None, 0.0), OpError::Option { option: "eps", .. }));
    assert!(matches!(run(x().narrow(1, 0, 2), None, 1e-5), OpError::Shape { argument: "gate", .. }));
}
