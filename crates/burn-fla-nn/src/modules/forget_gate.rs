//! The forget gate of HGRN and HGRN2.

use burn::tensor::{DType, Tensor, activation};

use super::log_sigmoid;

/// A lower bound is taken to be at least this: where its softmax underflows, ln α and its gradient stay finite.
const SMALLEST_BOUND: f32 = 1e-30;

/// ln α and 1 − α of a forget gate α = β + (1 − β) σ(f), where β, the lower bound, is 0 when there is none. Both f32.
///
/// 1 − α is (1 − β) σ(−f): it keeps its digits where α is near 1.
///
/// # Shapes
/// - `f` and the outputs `[B, T, width]`
/// - `bound` `[width]`
pub(crate) fn forget_gate(f: Tensor<3>, bound: Option<Tensor<1>>) -> (Tensor<3>, Tensor<3>) {
    let f = f.cast(DType::F32);
    let rest = activation::sigmoid(f.clone().neg());
    match bound {
        None => (log_sigmoid(f), rest),
        Some(bound) => {
            let bound = bound.clamp_min(SMALLEST_BOUND).unsqueeze::<3>();
            let open = bound.clone().neg().add_scalar(1.0);
            ((bound + open.clone() * activation::sigmoid(f)).log(), open * rest)
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    /// Against the definition in f64, at gates and bounds that f32 cannot tell from 0 and 1; gradients stay finite.
    #[test]
    fn extreme_gates_keep_their_digits() {
        let device = Device::flex().autodiff();
        let f = [-90.0f64, -20.0, -1.0, 0.0, 3.0, 20.0, 90.0];
        for bound in [None, Some(0.0), Some(1e-6), Some(0.3), Some(1.0)] {
            let values: Vec<f32> = f.iter().map(|f| *f as f32).collect();
            let x = Tensor::<3>::from_data(TensorData::new(values, [1, 7, 1]), &device).require_grad();
            let beta = Tensor::<1>::full([1], bound.unwrap_or(0.0), &device).require_grad();
            let (log_decay, rest) = forget_gate(x.clone(), bound.map(|_| beta.clone()));
            let gradients = (log_decay.clone() + rest.clone()).sum().backward();
            let found = |x: Tensor<3>| x.into_data().convert::<f64>().try_to_vec::<f64>().expect("numbers");
            let (log_decay, rest) = (found(log_decay), found(rest));
            for (i, f) in f.iter().enumerate() {
                let beta = f64::from(bound.unwrap_or(0.0) as f32);
                let open = (1.0 - beta) / (1.0 + f.exp());
                assert!((rest[i] - open).abs() <= 1e-6 * open + 1e-37, "{bound:?}, {f}: {} {open}", rest[i]);
                let exact = match bound {
                    Some(beta) if beta > 0.0 => (-open).ln_1p(),
                    // The bound that stands for 0.
                    Some(_) => (1e-30 + 1.0 / (1.0 + (-f).exp())).ln(),
                    None => -(-f).exp().ln_1p(),
                };
                assert!((log_decay[i] - exact).abs() <= 1e-6 * exact.abs().max(1.0), "{bound:?}, {f}: {exact}");
            }
            let finite = |x: Tensor<3>| found(x).iter().all(|g| g.is_finite());
            assert!(finite(x.grad(&gradients).expect("a gradient")), "{bound:?}");
            if let Some(gradient) = beta.grad(&gradients) {
                assert!(finite(gradient.unsqueeze::<3>()), "{bound:?}");
            }
        }
    }
}
