//! f32 products without tensor cores.

use burn::tensor::{DType, Shape, Tensor};
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::multi_level::Strategy as MultiLevel;
use cubek::matmul::strategy::Strategy;
use cubek::std::InputBinding;

use crate::bridge::{CubeTensor, Operator, TensorSpec, apply, contiguous, storage};

/// `c = a · b` over the last two dimensions; `da = dc · bᵀ`, `db = aᵀ · dc`.
#[derive(Debug)]
struct Product;

pub(super) fn product<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
    let mut outputs = apply(Product, vec![a.into_dispatch(), b.into_dispatch()], Vec::new());
    Tensor::from_dispatch(outputs.remove(0))
}

fn output_shape(a: &Shape, b: &Shape) -> Shape {
    let mut dims = a.to_vec();
    let last = dims.len() - 1;
    dims[last] = b.to_vec()[last];
    Shape::from(dims)
}

fn transposed(mut x: CubeTensor) -> CubeTensor {
    let rank = x.meta.shape().num_dims();
    x.meta.swap(rank - 2, rank - 1);
    x
}

pub(super) fn launch(a: CubeTensor, b: CubeTensor) -> CubeTensor {
    let shape = output_shape(a.meta.shape(), b.meta.shape());
    let out =
        burn_cubecl::ops::numeric::empty_device_contiguous_dtype(a.client.clone(), a.device.clone(), shape, DType::F32);
    let f32 = storage(DType::F32);
    let mut elems = MatmulElems::from_globals(&MatmulGlobalElems { lhs: f32, rhs: f32, out: f32 });
    let client = out.client.clone();
    let run = |strategy: Strategy, elems: &mut MatmulElems| {
        cubek::matmul::launch::launch_ref(
            &strategy,
            &client,
            InputBinding::new(a.clone().binding(), f32),
            InputBinding::new(b.clone().binding(), f32),
            out.clone().binding(),
            elems,
        )
    };
    // Register tiles on the plain cores; the naive form takes every layout that those refuse.
    if run(MultiLevel::SimpleUnit(Default::default()).into(), &mut elems).is_err() {
        run(MultiLevel::Naive.into(), &mut elems).expect("the naive product takes every shape");
    }
    out
}

impl Operator for Product {
    fn name(&self) -> &'static str {
        "exact_matmul"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![TensorSpec::new(output_shape(&inputs[0].shape, &inputs[1].shape), DType::F32)]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _ints: Vec<CubeTensor>, _save: bool) -> Vec<CubeTensor> {
        let [a, b] = inputs.try_into().expect("two operands");
        vec![launch(a, b)]
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        _ints: Vec<CubeTensor>,
        _saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let [a, b] = inputs.try_into().expect("two operands");
        let dc = grads.into_iter().flatten().next().expect("the only output's gradient");
        let dc = contiguous(dc);
        let da = wanted[0].then(|| launch(dc.clone(), transposed(b)));
        let db = wanted[1].then(|| launch(transposed(a), dc.clone()));
        vec![da, db]
    }
}

/// The product is chosen on CUDA alone, but any device of CubeCL runs it: what it makes of views is tested where CI is.
#[cfg(all(test, feature = "wgpu", feature = "flex"))]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    fn numbers(x: Tensor<4>) -> Vec<f64> {
        x.into_data().convert::<f64>().try_to_vec::<f64>().expect("floats")
    }

    fn filled(seed: usize, shape: [usize; 4], device: &Device) -> Tensor<4> {
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0).collect();
        Tensor::from_data(TensorData::new(values, shape), device)
    }

    /// Outputs and gradients of products of narrowed, expanded and transposed operands, as recurrences have them.
    fn run(device: &Device, product: impl Fn(Tensor<4>, Tensor<4>) -> Tensor<4>) -> Vec<Vec<f64>> {
        let device = device.clone().autodiff();
        let (b, n, c, d) = (3, 2, 64, 12);
        let triangle = filled(1, [1, 1, c, c], &device).require_grad();
        let x = filled(2, [b, n, c, d], &device).require_grad();
        let y = filled(3, [b, n, c, d], &device).require_grad();
        // A running sum, scores, and a narrowed block of them.
        let sums = product(triangle.clone().expand([b, n, c, c]), x.clone());
        let scores = product(sums.clone(), y.clone().swap_dims(2, 3));
        let block = product(
            scores.clone().narrow(2, 16, 16).narrow(3, 0, 16),
            y.clone().narrow(1, 1, 1).narrow(2, 0, 16).expand([b, n, 16, d]),
        );
        let weight = filled(4, [b, n, 16, d], &device);
        let loss = (block.clone() * weight).sum() + (scores.clone() * filled(5, [b, n, c, c], &device)).sum();
        let grads = loss.backward();
        let gradient = |x: &Tensor<4>| numbers(x.grad(&grads).expect("a gradient"));
        vec![numbers(sums), numbers(scores), numbers(block), gradient(&triangle), gradient(&x), gradient(&y)]
    }

    #[test]
    fn views_are_multiplied_as_they_stand() {
        let devices = Device::enumerate(burn::tensor::DeviceType::Wgpu).to_vec();
        let found = run(devices.first().expect("a Vulkan device"), super::product);
        let expected = run(&Device::flex(), |a, b| a.matmul(b));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let norm = |x: f64| x * x;
            let difference: f64 = found.iter().zip(expected).map(|(a, b)| norm(a - b)).sum();
            let scale: f64 = expected.iter().map(|b| norm(*b)).sum();
            let ratio = (difference / scale).sqrt();
            assert!(ratio < 1e-5, "result {i}: relative RMS error {ratio:.1e}");
        }
    }
}
