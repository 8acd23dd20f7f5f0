//! Layer norm and group norm.

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor};
use burn_fla_nn::ParamSource;
use burn_fla_nn::modules::{GroupNorm, LayerNorm};
use burn_fla_tests::{assert_close, kernel_devices, numbers, reference_device, tensor, uniform};

/// Rows of groups, by the formulas: the output, and the gradients of x, w and b for an incoming gradient.
struct Expected {
    y: Vec<f64>,
    dx: Vec<f64>,
    dw: Vec<f64>,
    db: Vec<f64>,
}

fn expected(x: &[f64], w: &[f64], b: &[f64], dy: &[f64], group: usize, eps: f64) -> Expected {
    let width = w.len();
    let mut out = Expected { y: vec![], dx: vec![], dw: vec![0.0; width], db: vec![0.0; width] };
    for start in (0..x.len()).step_by(group) {
        let at = |i: usize| (start + i) % width;
        let mean = |f: &dyn Fn(usize) -> f64| (0..group).map(f).sum::<f64>() / group as f64;
        let centre = mean(&|i| x[start + i]);
        let rstd = (mean(&|i| (x[start + i] - centre).powi(2)) + eps).sqrt().recip();
        let n = |i: usize| (x[start + i] - centre) * rstd;
        let c = |i: usize| w[at(i)] * dy[start + i];
        let (mean_c, mean_cn) = (mean(&c), mean(&|i| c(i) * n(i)));
        for i in 0..group {
            out.y.push(n(i) * w[at(i)] + b[at(i)]);
            out.dx.push(rstd * (c(i) - n(i) * mean_cn - mean_c));
            out.dw[at(i)] += dy[start + i] * n(i);
            out.db[at(i)] += dy[start + i];
        }
    }
    out
}

/// The numbers of one problem, `[2, 3, 4, 5]` with the last two dimensions as features.
fn problem(device: &Device) -> ([Vec<f64>; 4], impl Fn(&[f64]) -> Param<Tensor<1>>) {
    let f32s = |seed, count, range| -> Vec<f64> {
        uniform(seed, count, range).into_iter().map(|x| f64::from(x as f32)).collect()
    };
    // Far from zero beside its spread: a variance from the mean of squares would lose digits.
    let numbers =
        [f32s(1, 120, (29.0, 31.0)), f32s(2, 20, (0.5, 1.5)), f32s(3, 20, (-1.0, 1.0)), f32s(4, 120, (-1.0, 1.0))];
    let device = device.clone();
    (numbers, move |x: &[f64]| Param::from_tensor(tensor(x, [x.len()], &device, DType::F32)))
}

#[test]
fn norms_and_their_gradients_follow_the_formulas() {
    let mut devices = kernel_devices();
    devices.push(("flex", reference_device()));
    for (name, device) in devices {
        let device = device.autodiff();
        let ([x, w, b, dy], param) = problem(&device);
        let source = ParamSource::seeded(1, 0.02, &device);
        let mut layer = LayerNorm::new(&source.root(), 20, true, 1e-3);
        let mut group = GroupNorm::new(&source.root(), 20, true, 1e-3);
        (layer.weight, layer.bias) = (param(&w), Some(param(&b)));
        (group.weight, group.bias) = (param(&w), Some(param(&b)));
        let input = || tensor(&x, [2, 3, 4, 5], &device, DType::F32).require_grad();
        let weighted = |y: Tensor<4>| (y * tensor(&dy, [2, 3, 4, 5], &device, DType::F32)).sum().backward();

        let found = input();
        let y = group.forward(found.clone()).expect("an output");
        let gradients = weighted(y.clone());
        let right = expected(&x, &w, &b, &dy, 5, 1e-3);
        let what = format!("{name}, group norm");
        assert_close(&what, &numbers(y), &right.y, 1e-5);
        assert_close(&what, &numbers(found.grad(&gradients).expect("dx")), &right.dx, 1e-5);
        assert_close(&what, &numbers(group.weight.grad(&gradients).expect("dw")), &right.dw, 1e-5);
        assert_close(&what, &numbers(group.bias.expect("b").grad(&gradients).expect("db")), &right.db, 1e-6);

        let found = input();
        let y = layer.forward(found.clone().reshape([2, 3, 20])).expect("an output");
        let gradients = weighted(y.clone().reshape([2, 3, 4, 5]));
        let right = expected(&x, &w, &b, &dy, 20, 1e-3);
        let what = format!("{name}, layer norm");
        assert_close(&what, &numbers(y), &right.y, 1e-5);
        assert_close(&what, &numbers(found.grad(&gradients).expect("dx")), &right.dx, 1e-5);
        assert_close(&what, &numbers(layer.weight.grad(&gradients).expect("dw")), &right.dw, 1e-5);
        assert_close(&what, &numbers(layer.bias.expect("b").grad(&gradients).expect("db")), &right.db, 1e-6);
    }
}

#[test]
fn a_residual_is_added_before_the_norm() {
    let device = reference_device();
    let ([x, w, _, dy], param) = problem(&device);
    let source = ParamSource::seeded(1, 0.02, &device);
    let mut norm = LayerNorm::new(&source.root(), 20, false, 1e-5);
    norm.weight = param(&w);
    let rows = |x: &[f64], dtype| tensor(x, [6, 20], &device, DType::F32).cast(dtype);
    for dtype in [DType::F32, DType::BF16] {
        let (y, sum) = norm.forward_add(rows(&dy, dtype), rows(&x, dtype)).expect("an output");
        assert_eq!((y.dtype(), sum.dtype()), (dtype, dtype));
        // The sum of the rounded inputs is normalised before it is rounded itself.
        let exact = rows(&dy, dtype).cast(DType::F32) + rows(&x, dtype).cast(DType::F32);
        assert_eq!(numbers(sum), numbers(exact.clone().cast(dtype)));
        assert_eq!(numbers(y), numbers(norm.forward(exact).expect("an output").cast(dtype)));
    }
    let error = norm.forward(Tensor::<2>::zeros([6, 19], &device)).expect_err("another width").to_string();
    assert!(error.contains("20 features"), "{error}");
    let shorter = norm.forward_add(rows(&x, DType::F32), Tensor::<2>::zeros([5, 20], &device));
    assert!(shorter.expect_err("another shape").to_string().contains("residual"));
    let group = GroupNorm::new(&source.root(), 20, false, 1e-5);
    assert!(group.forward(Tensor::zeros([1, 2, 3, 5], &device)).is_err());
}
