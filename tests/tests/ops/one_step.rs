//! The kernel of one token a sequence, against the references in f64 on the CPU.

use burn::tensor::{DType, Device, Tensor};
use burn_fla_ops::bridge::poison_outputs;
use burn_fla_ops::{
    DeltaOptions, Engine, GsaOptions, GsaState, HeadGroups, OpError, SequenceOptions, SsdOptions, comba,
    gated_delta_rule, gsa, ssd,
};
use burn_fla_tests::operators::{Draw, OPERATORS, Size};
use burn_fla_tests::{assert_close, kernel_devices, numbers, reference_device, tensor, uniform};

/// K and V that fill a plan, that do not, and whose vectors are of four, two and one.
const SIZES: [(usize, usize); 4] = [(128, 128), (1, 3), (48, 100), (100, 130)];

/// Numbers of one shape on any device.
struct Numbers {
    shape: [usize; 4],
    values: Vec<f64>,
}

impl Numbers {
    fn new(seed: u64, shape: [usize; 4]) -> Self {
        // f32 holds them.
        let values = uniform(seed, shape.iter().product(), (-0.5, 0.5)).into_iter().map(|x| f64::from(x as f32));
        Self { shape, values: values.collect() }
    }

    fn on(&self, device: &Device, dtype: DType) -> Tensor<4> {
        tensor(&self.values, self.shape, device, dtype)
    }
}

type Call<'a> = &'a dyn Fn(Vec<Tensor<4>>, SequenceOptions) -> Result<Vec<Tensor<4>>, OpError>;

/// One token by the kernel, twice from a state that is kept, and by the reference.
fn compare(what: &str, inputs: &[Numbers], state: Option<&Numbers>, call: Call<'_>) {
    let run = |device: &Device, dtype, engine, state: Option<Tensor<4>>| {
        let options = SequenceOptions { engine, initial_state: state, ..Default::default() };
        call(inputs.iter().map(|x| x.on(device, dtype)).collect(), options).expect("good inputs")
    };
    let reference = reference_device();
    let right = run(&reference, DType::F64, Engine::Reference, state.map(|s| s.on(&reference, DType::F64)));
    for (name, device) in kernel_devices() {
        let first = state.map(|s| s.on(&device, DType::F32));
        poison_outputs(true);
        let found = run(&device, DType::F32, Engine::Auto, first.clone());
        let again = run(&device, DType::F32, Engine::Auto, first.clone());
        poison_outputs(false);
        assert_eq!(found.len(), right.len());
        for (i, ((x, again), right)) in found.into_iter().zip(again).zip(&right).enumerate() {
            let x = numbers(x);
            assert_eq!(x, numbers(again), "{name}, {what}: a state that is kept is not written over, output {i}");
            assert_close(&format!("{name}, {what}, output {i}"), &x, &numbers(right.clone()), 1e-6);
        }
    }
}

#[test]
fn one_step_of_every_operator_equals_its_reference() {
    let cpu = reference_device();
    for operator in OPERATORS {
        for (k, v) in SIZES {
            let size = Size { b: 3, t: 1, h: 2, key_heads: 2, k, v };
            let draw = Draw { device: cpu.clone().autodiff(), size, dtype: DType::F32, wide: DType::F32 };
            let drawn = (operator.inputs)(&draw).into_iter().map(|input| input.tensor.inner());
            let inputs: Vec<Numbers> = drawn.map(|x| Numbers { shape: x.dims(), values: numbers(x) }).collect();
            let call: Call<'_> =
                &|x, options| (operator.forward)(&x, options).map(|(o, state)| [o].into_iter().chain(state).collect());
            let what = format!("{} at {size}", operator.name);
            if (k, v) == SIZES[0] {
                compare(&what, &inputs, None, call);
            }
            compare(&what, &inputs, Some(&Numbers::new(9, [3, 2, k, v])), call);
        }
    }
}

#[test]
fn one_step_takes_heads_that_share_keys() {
    let [b, heads, k, v] = [2, 6, 20, 12];
    let state = Numbers::new(9, [b, heads, k, v]);
    let by_token = |x: &Tensor<4>| x.clone().reshape([b, 1, heads]);
    let [q, key, p] = [1, 2, 3].map(|seed| Numbers::new(seed, [b, 1, 3, k]));
    let [value, g, beta] = [(4, v), (5, 1), (6, 1)].map(|(seed, width)| Numbers::new(seed, [b, 1, heads, width]));
    compare("gated_delta_rule", &[q, key, value, g, beta], Some(&state), &|x, options| {
        let [q, k, v, g, beta] = <[_; 5]>::try_from(x).expect("five");
        let (g, options) = (by_token(&g).sub_scalar(1.0), DeltaOptions::from(options));
        gated_delta_rule(q, k, v, g, by_token(&beta), options).map(|(o, state)| vec![o, state])
    });
    let [q, key] = [1, 2].map(|seed| Numbers::new(seed, [b, 1, 3, k]));
    let [value, g, beta] = [(4, v), (5, 1), (6, 1)].map(|(seed, width)| Numbers::new(seed, [b, 1, heads, width]));
    compare("comba", &[q, key, p, value, g, beta], Some(&state), &|x, options| {
        let [q, k, p, v, g, beta] = <[_; 6]>::try_from(x).expect("six");
        let (g, options) = (by_token(&g).sub_scalar(1.0), DeltaOptions::from(options));
        comba(q, k, p, v, g, by_token(&beta), options).map(|(o, state)| vec![o, state])
    });
    // D by head is among the operators above.
    for (groups, by_channel) in
        [(HeadGroups::Contiguous, false), (HeadGroups::Tiled, false), (HeadGroups::Contiguous, true)]
    {
        let [bs, cs] = [1, 2].map(|seed| Numbers::new(seed, [b, 1, 3, k]));
        let [x, delta] = [(4, v), (5, 1)].map(|(seed, width)| Numbers::new(seed, [b, 1, heads, width]));
        let [a, skip] = [(6, 1), (7, v)].map(|(seed, width)| Numbers::new(seed, [1, 1, heads, width]));
        let what = format!("ssd, {groups:?}, D {by_channel}");
        compare(&what, &[x, delta, a, bs, cs, skip], Some(&state), &|x, options| {
            let [x, delta, a, b, c, skip] = <[_; 6]>::try_from(x).expect("six");
            let (delta, a) = (by_token(&delta).add_scalar(1.0), a.reshape([heads]).sub_scalar(1.0));
            let SequenceOptions { initial_state, engine, .. } = options;
            let skip = by_channel.then(|| skip.reshape([-1]));
            let options = SsdOptions { skip, groups, initial_state, engine, ..Default::default() };
            ssd(x, delta, a, b, c, options).map(|(y, state)| vec![y, state])
        });
    }
}

#[test]
fn one_step_decays_by_value() {
    let [b, h, k, v, slots] = [2, 3, 20, 12, 10];
    let widths = [k, k, v, slots, slots, k * slots, slots * v];
    let inputs: Vec<Numbers> = (1..).zip(widths).map(|(seed, width)| Numbers::new(seed, [b, 1, h, width])).collect();
    compare("gsa", &inputs, None, &|x, options| {
        let [q, key, value, s, g, keys, values] = <[_; 7]>::try_from(x).expect("seven");
        let (keys, values) = (keys.reshape([b, h, k, slots]), values.reshape([b, h, slots, v]));
        let state = Some(GsaState { keys, values });
        let options = GsaOptions { engine: options.engine, initial_state: state, ..Default::default() };
        let (o, state) = gsa(q, key, value, s, g.sub_scalar(1.0), options)?;
        Ok(vec![o, state.keys, state.values])
    });
}

/// bf16 inputs where the device has them: the state is not rounded.
#[test]
fn one_step_takes_bf16() {
    for (name, device) in kernel_devices().into_iter().filter(|(_, device)| device.supports_dtype(DType::BF16)) {
        for operator in OPERATORS {
            let size = Size { b: 3, t: 1, h: 2, key_heads: 2, k: 64, v: 96 };
            let draw = Draw { device: device.clone().autodiff(), size, dtype: DType::BF16, wide: DType::F32 };
            let inputs: Vec<Tensor<4>> =
                (operator.inputs)(&draw).into_iter().map(|input| input.tensor.inner()).collect();
            let cpu = reference_device();
            let wide: Vec<Tensor<4>> =
                inputs.iter().map(|x| tensor(&numbers(x.clone()), x.dims(), &cpu, DType::F64)).collect();
            let state = Numbers::new(9, [3, 2, 64, 96]);
            let run = |x: &[Tensor<4>], engine, state| {
                let options = SequenceOptions { engine, initial_state: Some(state), ..Default::default() };
                (operator.forward)(x, options).expect("good inputs")
            };
            let (o, next) = run(&inputs, Engine::Auto, state.on(&device, DType::F32));
            let (right_o, right_next) = run(&wide, Engine::Reference, state.on(&cpu, DType::F64));
            // gsa and abc round the scores between their two passes.
            let bound = if next.is_some() { 3e-3 } else { 5e-3 };
            assert_close(&format!("{name}, {}, o", operator.name), &numbers(o), &numbers(right_o), bound);
            if let (Some(next), Some(right)) = (next, right_next) {
                assert_close(&format!("{name}, {}, state", operator.name), &numbers(next), &numbers(right), 1e-5);
            }
        }
    }
}
