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

/// Whether the elements lie in the order of the shape, or in that of the shape with its last two dimensions swapped. Views
/// of other kinds (narrowed, expanded) are copied: the kernels were written for these two.
fn is_plain(x: &CubeTensor) -> bool {
    let (shape, strides) = (x.meta.shape().to_vec(), x.meta.strides().to_vec());
    let rank = shape.len();
    let contiguous = |order: &[usize]| {
        let mut expected = 1;
        order.iter().rev().all(|dim| {
            let fits = shape[*dim] == 1 || strides[*dim] == expected;
            expected *= shape[*dim];
            fits
        })
    };
    let mut order: Vec<usize> = (0..rank).collect();
    if contiguous(&order) {
        return true;
    }
    order.swap(rank - 2, rank - 1);
    contiguous(&order)
}

fn plain(x: CubeTensor) -> CubeTensor {
    if is_plain(&x) { x } else { contiguous(x) }
}

fn launch(a: CubeTensor, b: CubeTensor) -> CubeTensor {
    let (a, b) = (plain(a), plain(b));
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
