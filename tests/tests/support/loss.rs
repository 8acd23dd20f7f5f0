//! The output layer fused with the cross entropy: against the loss of whole logits in f64.

use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation};
use burn_fla_ops::bridge::poison_outputs;
use burn_fla_ops::{CrossEntropyOptions, Engine, OpError, linear_cross_entropy};
use burn_fla_tests::agree::{Evaluation, Input, assert_evaluations, assert_finite_differences, evaluate};
use burn_fla_tests::{assert_close, kernel_devices, numbers, ratio, reference_device, tensor, uniform};

/// Tokens, channels, vocabulary, tokens of a strip, range of the weights.
#[derive(Clone, Copy, Debug)]
struct Case {
    n: usize,
    d: usize,
    v: usize,
    strip: Option<usize>,
    range: f64,
}

fn case(n: usize, d: usize, v: usize, strip: Option<usize>) -> Case {
    Case { n, d, v, strip, range: 1.0 }
}

/// Strips that end where tokens do and elsewhere, more than there are tokens, of one; vocabularies that end inside and
/// outside of vectors, and with more than a vector for every unit of a cube; logits far apart.
fn cases() -> Vec<Case> {
    let mut cases = vec![
        case(1, 1, 1, None),
        case(1, 3, 2, None),
        case(5, 8, 7, Some(1)),
        case(6, 4, 12, Some(3)),
        case(7, 5, 33, Some(3)),
        case(7, 5, 33, Some(100)),
        case(130, 16, 257, Some(128)),
        case(129, 12, 1030, Some(50)),
        case(33, 20, 2052, None),
    ];
    cases.push(Case { range: 40.0, ..case(20, 9, 300, Some(7)) });
    cases
}

impl Case {
    fn inputs(&self) -> Vec<Input> {
        let range = (-self.range, self.range);
        vec![Input::new("x", &[self.n, self.d], (-1.0, 1.0)), Input::new("weight", &[self.v, self.d], range)]
    }

    /// Every third token is not counted; the first and the last words of the vocabulary are among the labels.
    fn labels(&self, ignored: i32) -> Vec<i32> {
        let label = |i: usize| match i {
            i if i % 3 == 2 => ignored,
            0 => 0,
            1 => self.v as i32 - 1,
            i => ((i * 7919) % self.v) as i32,
        };
        (0..self.n).map(label).collect()
    }

    fn options(&self, engine: Engine) -> CrossEntropyOptions {
        CrossEntropyOptions { strip: self.strip, engine, ..Default::default() }
    }

    fn run(&self, device: &Device, dtype: DType, engine: Engine) -> Evaluation {
        self.run_with(device, dtype, &self.labels(-100), self.options(engine))
    }

    fn run_with(&self, device: &Device, dtype: DType, labels: &[i32], options: CrossEntropyOptions) -> Evaluation {
        evaluate(&self.inputs(), device, dtype, |inputs| {
            let (x, w) = self.shaped(inputs);
            vec![linear_cross_entropy(x, w, ints(labels, device), options).unwrap().0]
        })
    }

    fn shaped(&self, inputs: &[Tensor<1>]) -> (Tensor<2>, Tensor<2>) {
        (inputs[0].clone().reshape([self.n, self.d]), inputs[1].clone().reshape([self.v, self.d]))
    }

    /// The loss of whole logits in f64, on inputs rounded to `dtype`.
    fn whole(&self, labels: &[i32], dtype: DType) -> Evaluation {
        self.warped(labels, dtype, None)
    }

    /// The same with `l2_warp`.
    fn warped(&self, labels: &[i32], dtype: DType, l2_warp: Option<f64>) -> Evaluation {
        let device = reference_device();
        let round = |input: Input| {
            let flat: Tensor<1> = tensor(&input.values, [input.values.len()], &device, dtype);
            Input { values: numbers(flat), ..input }
        };
        let inputs: Vec<Input> = self.inputs().into_iter().map(round).collect();
        evaluate(&inputs, &device, DType::F64, |inputs| {
            let (x, w) = self.shaped(inputs);
            let counted: Vec<f64> = labels.iter().map(|label| f64::from(u8::from(*label >= 0))).collect();
            let counted: Tensor<1> = tensor(&counted, [self.n], &device, DType::F64);
            let target: Vec<i32> = labels.iter().map(|label| (*label).max(0)).collect();
            let logits = x.matmul(w.transpose());
            let log = activation::log_softmax(logits.clone(), 1);
            let own = log.gather(1, ints(&target, &device).unsqueeze_dim(1)).squeeze_dim::<1>(1);
            let loss = (own * counted.clone()).sum().neg();
            let Some(factor) = l2_warp else { return vec![loss] };
            let half_squares = logits.max_dim(1).powi_scalar(2).sum() * counted.sum() * (0.5 * factor / self.n as f64);
            vec![loss + half_squares.clone() - half_squares.detach()]
        })
    }
}

fn ints(values: &[i32], device: &Device) -> Tensor<1, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), &device.clone().inner())
}

#[test]
fn strips_are_the_whole() {
    for case in cases() {
        let found = case.run(&reference_device(), DType::F64, Engine::Auto);
        let whole = case.whole(&case.labels(-100), DType::F64);
        assert_evaluations(&format!("{case:?}"), &case.inputs(), 1e-12, &found, &whole);
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for case in [case(5, 8, 7, Some(2)), case(7, 5, 33, None)] {
        let labels = case.labels(-100);
        let device = reference_device();
        assert_finite_differences(&format!("{case:?}"), &case.inputs(), 12, 1e-7, |inputs| {
            let (x, w) = case.shaped(inputs);
            vec![linear_cross_entropy(x, w, ints(&labels, &device), case.options(Engine::Auto)).unwrap().0]
        });
    }
}

#[test]
fn kernels_are_the_whole() {
    for (name, device) in kernel_devices() {
        poison_outputs(true);
        for case in cases() {
            let whole = case.whole(&case.labels(-100), DType::F32);
            for engine in [Engine::Auto, Engine::Reference] {
                let found = case.run(&device, DType::F32, engine);
                assert_evaluations(&format!("{name}, {engine:?}, {case:?}"), &case.inputs(), 1e-5, &found, &whole);
            }
        }
    }
}

#[test]
fn the_largest_logits_are_drawn_back() {
    for (name, device) in kernel_devices().into_iter().chain([("flex", reference_device())]) {
        poison_outputs(true);
        for case in cases() {
            let labels = case.labels(-100);
            // Far more than models use, so that it counts beside the loss.
            let whole = case.warped(&labels, DType::F32, Some(0.7));
            let options = CrossEntropyOptions { l2_warp: Some(0.7), ..case.options(Engine::Auto) };
            let found = case.run_with(&device, DType::F32, &labels, options);
            assert_evaluations(&format!("{name}, {case:?}"), &case.inputs(), 1e-5, &found, &whole);
        }
    }
}

#[test]
fn two_runs_are_equal_to_the_last_bit() {
    for (name, device) in kernel_devices() {
        let case = case(129, 12, 1030, Some(50));
        let bits = || {
            let found = case.run(&device, DType::F32, Engine::Auto);
            (found.outputs, found.gradients)
        };
        assert_eq!(bits(), bits(), "{name}");
    }
}

#[test]
fn rounding_to_bf16_is_all_that_is_lost() {
    let devices = kernel_devices().into_iter().filter(|(_, d)| d.supports_dtype(DType::BF16));
    for (name, device) in devices.chain([("flex", reference_device())]) {
        for case in [case(130, 16, 256, Some(128)), case(100, 64, 1000, None), case(70, 24, 33, Some(32))] {
            let whole = case.whole(&case.labels(-100), DType::BF16);
            let inputs = case.inputs();
            let found = case.run(&device, DType::BF16, Engine::Auto);
            // A logit, its gradient and a sum of these are each rounded to 8 bits: 2⁻⁹ at most, and about 1.1e-3 RMS.
            // Logits have a size of a few, so that their rounding counts some times.
            assert_evaluations(&format!("{name}, {case:?}"), &inputs, 8e-3, &found, &whole);

            // A weight in f32 is rounded for the products, and gets its gradient in f32.
            let device = device.clone().autodiff();
            let flat = |i: usize, dtype| -> Tensor<1> {
                tensor(&inputs[i].values, [inputs[i].values.len()], &device, dtype).require_grad()
            };
            let leaves = [flat(0, DType::BF16), flat(1, DType::F32)];
            let (x, w) = case.shaped(&leaves);
            let labels = ints(&case.labels(-100), &device);
            let (sum, _) = linear_cross_entropy(x, w, labels, case.options(Engine::Auto)).unwrap();
            assert_eq!(sum.dtype(), DType::F32);
            let grads = sum.backward();
            let [dx, dw] = leaves.map(|leaf| leaf.grad(&grads).unwrap());
            assert_eq!((dx.dtype(), dw.dtype()), (DType::BF16, DType::F32), "{name}");
            // The other runs weigh the loss by this number.
            let factor = 1.0 / uniform(1000, 1, (-1.0, 1.0))[0];
            let scaled = |values: &[f64]| values.iter().map(|x| x * factor).collect::<Vec<_>>();
            assert_close(&format!("{name}, dx"), &numbers(dx), &scaled(&whole.gradients[0]), 8e-3);
            assert_close(&format!("{name}, dW"), &numbers(dw), &scaled(&whole.gradients[1]), 8e-3);
        }
    }
}

#[test]
fn any_label_may_be_the_one_that_is_ignored() {
    for (name, device) in kernel_devices().into_iter().chain([("flex", reference_device())]) {
        let case = case(12, 6, 40, Some(5));
        let by_default = case.run(&device, DType::F32, Engine::Auto);
        for ignored in [-1, 7] {
            let labels: Vec<i32> = case
                .labels(ignored)
                .into_iter()
                .zip(case.labels(-100))
                .map(|(l, d)| if d < 0 { l } else { d })
                .collect();
            let clash = labels.iter().filter(|label| **label == ignored).count();
            assert_eq!(clash, 4, "no other label is {ignored}");
            let options = CrossEntropyOptions { ignored: Some(ignored), ..case.options(Engine::Auto) };
            let found = case.run_with(&device, DType::F32, &labels, options);
            assert_evaluations(&format!("{name}, {ignored}"), &case.inputs(), 0.0, &found, &by_default);
        }
    }
}

#[test]
fn nothing_counted_is_nothing_lost() {
    for (name, device) in kernel_devices().into_iter().chain([("flex", reference_device())]) {
        poison_outputs(true);
        let case = case(9, 6, 40, Some(4));
        let found = case.run_with(&device, DType::F32, &[-100; 9], case.options(Engine::Auto));
        assert_eq!(found.outputs, [[0.0]], "{name}");
        assert_eq!(found.gradients, [vec![0.0; 54], vec![0.0; 240]], "{name}");
        let empty = Tensor::<2>::zeros([0, 6], (&device, DType::F32));
        let weight = Tensor::<2>::zeros([40, 6], (&device, DType::F32));
        let (sum, count) = linear_cross_entropy(empty, weight, ints(&[], &device), Default::default()).unwrap();
        assert_eq!((numbers(sum), numbers(count)), (vec![0.0], vec![0.0]), "{name}");
    }
}

#[test]
fn one_input_alone_may_be_tracked() {
    for (name, device) in kernel_devices().into_iter().chain([("flex", reference_device())]) {
        let case = case(12, 6, 40, Some(5));
        let labels = case.labels(-100);
        let auto = device.clone().autodiff();
        let make = |i: usize, device: &Device| -> Tensor<1> {
            let values = &case.inputs()[i].values;
            tensor(values, [values.len()], device, DType::F32)
        };
        let loss = |inputs: &[Tensor<1>], device: &Device| {
            let (x, w) = case.shaped(inputs);
            linear_cross_entropy(x, w, ints(&labels, device), case.options(Engine::Auto)).unwrap()
        };
        let leaves = [make(0, &auto).require_grad(), make(1, &auto).require_grad()];
        let (sum, count) = loss(&leaves, &auto);
        assert_eq!(numbers(count), [8.0], "{name}");
        let both = sum.clone().backward();
        let (plain, _) = loss(&[make(0, &device), make(1, &device)], &device);
        assert!(!plain.is_tracked());
        assert_eq!(numbers(plain), numbers(sum), "{name}: with gradients or without, the loss is the same");
        for only in 0..2 {
            let alone: Vec<Tensor<1>> =
                (0..2).map(|i| if i == only { make(i, &auto).require_grad() } else { make(i, &auto) }).collect();
            let grads = (loss(&alone, &auto).0 * -2.5).backward();
            let found = numbers(alone[only].grad(&grads).unwrap());
            let expected: Vec<f64> = numbers(leaves[only].grad(&both).unwrap()).iter().map(|g| -2.5 * g).collect();
            assert!(ratio(&found, &expected) < 1e-6, "{name}, input {only}");
            assert!(alone[1 - only].grad(&grads).is_none(), "{name}");
        }
    }
}

#[test]
fn wrong_arguments_are_named() {
    let device = Device::flex();
    let ones = |shape: [usize; 2]| Tensor::<2>::ones(shape, (&device, DType::F32));
    let labels = |n: usize| ints(&vec![0; n], &device);
    let named = |found: Result<(Tensor<1>, Tensor<1>), OpError>, argument: &str| {
        let message = found.unwrap_err().to_string();
        assert!(message.starts_with("linear_cross_entropy") && message.contains(&format!("`{argument}`")), "{message}");
    };
    let options = CrossEntropyOptions::default();
    named(linear_cross_entropy(ones([3, 4]), ones([5, 3]), labels(3), options), "weight");
    named(linear_cross_entropy(ones([3, 4]), ones([0, 4]), labels(3), options), "weight");
    named(linear_cross_entropy(ones([3, 4]), ones([5, 4]).cast(DType::BF16), labels(3), options), "weight");
    named(linear_cross_entropy(ones([3, 4]).cast(DType::F16), ones([5, 4]), labels(3), options), "x");
    named(linear_cross_entropy(ones([3, 4]), ones([5, 4]), labels(2), options), "labels");
    let none = CrossEntropyOptions { strip: Some(0), ..options };
    named(linear_cross_entropy(ones([3, 4]), ones([5, 4]), labels(3), none), "strip");
    for (_, other) in kernel_devices() {
        named(linear_cross_entropy(ones([3, 4]), ones([5, 4]), ints(&[0; 3], &other), options), "labels");
    }
}
